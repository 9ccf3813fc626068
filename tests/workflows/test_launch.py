"""Processes, precision, tracker and folder of a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from tiny_training import QUIET, TINY, Heard, equal, rows, run, weights

from vicvlm_cli.data.batches import Plan
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.settings import DataConfig
from vicvlm_cli.workflows import train
from vicvlm_cli.workflows.launch import join, require_processes, run_folder, with_workers
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.train import pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_folder_that_holds_a_run_is_refused(pretrained: TrainResult, scenes: Path) -> None:
    before = weights(pretrained.run)
    # It has finished, so that there is nothing to go on with.
    with pytest.raises(UserError, match="already holds a run: choose another --output$"):
        run(scenes, pretrained.run)
    assert equal(weights(pretrained.run), before)


@pytest.mark.parametrize("name", ["model.safetensors", "result.json"])
def test_what_is_left_of_a_run_is_not_taken(name: str, scenes: Path, tmp_path: Path) -> None:
    for file in (name, "metrics.jsonl"):
        (tmp_path / file).write_text("old")
    with pytest.raises(UserError, match="already holds a run: choose another --output$"):
        run(scenes, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == "old"


def test_a_run_that_was_killed_before_its_first_state_begins_anew(
    scenes: Path, tmp_path: Path
) -> None:
    folder, heard = tmp_path / "run", Heard()
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 10}\n')
    with pytest.raises(UserError) as told:
        pretrain(scenes, resume=folder, progress=QUIET)
    assert f"give the command that begins it, with --output {folder} and" in str(told.value)
    run(scenes, folder, "pretrain.epochs=0.5", progress=heard)  # as it was told to
    anew = f"{folder} holds a run that ended before its first state: it begins anew, and the log"
    assert any(anew in note for note in heard.notes)
    assert [row["step"] for row in rows(folder)] == [3]
    assert '"step": 10' in (folder / "metrics.old.jsonl").read_text()


def test_a_run_at_work_keeps_its_folder(scenes: Path, tmp_path: Path) -> None:
    data, folder = PreparedDataset.open(scenes), tmp_path / "run"
    with run_folder("pretrain", data, folder, QUIET):
        with (
            pytest.raises(UserError, match="another training is at work in .*run: wait for"),
            run_folder("pretrain", data, folder, QUIET),
        ):
            pass
        assert folder.is_dir()
    with run_folder("pretrain", data, folder, QUIET):
        pass


def test_runs_that_start_together_get_folders_of_their_own(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = PreparedDataset.open(scenes)
    with (
        run_folder("pretrain", data, None, QUIET) as one,
        run_folder("pretrain", data, None, QUIET) as other,
    ):
        assert one == Path("runs/pretrain-scenes") and other == Path("runs/pretrain-scenes-2")
        assert one.is_dir() and other.is_dir()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for output in (None, Path("new"), Path("mine")):
        with pytest.raises(UserError, match="none.pth"):
            overrides = [*TINY, "model.image_weights=none.pth"]
            pretrain(scenes, overrides=overrides, output=output, progress=QUIET)
    assert list((tmp_path / "runs").iterdir()) == []
    assert not (tmp_path / "new").exists() and (tmp_path / "mine").is_dir()


def test_an_output_that_cannot_be_a_folder_is_named_before_there_is_a_model(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "create_model", None)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(UserError, match=f"--output {file} is a file: name a folder"):
        run(scenes, file)
    with pytest.raises(UserError, match=f"cannot write to {file / 'run'}: Not a directory; choose"):
        run(scenes, file / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Permission denied; choose"):
        run(scenes, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(UserError, match="cannot write to runs: File exists; choose another --out"):
        pretrain(scenes, overrides=TINY, progress=QUIET)


def test_runs_get_folders_of_their_own(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pretrain-scenes", "pretrain-scenes-2"):
        result = pretrain(scenes, overrides=[*TINY, "pretrain.epochs=0.1"], progress=QUIET)
        assert result.run == Path("runs") / name
        assert (tmp_path / "runs" / name / "model.safetensors").is_file()


def test_a_precision_that_cannot_be_had_is_named(scenes: Path, tmp_path: Path) -> None:
    Accelerator(cpu=True, mixed_precision="no")  # and it cannot be changed in this process
    with pytest.raises(UsageError, match="--precision bf16 does not work here"):
        run(scenes, tmp_path / "run", "pretrain.precision=bf16")


def test_fp16_is_not_float32_by_another_name(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--precision fp16 does not work on a CPU: leave it out"):
        run(scenes, tmp_path / "run", "pretrain.precision=fp16")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_named(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--track wandb needs its package"):
        run(scenes, tmp_path / "run", track="wandb")


def test_a_launch_that_got_fewer_processes_than_asked_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    join()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were launched and 1 came together"):
        join()


@pytest.mark.parametrize(
    ("then", "now", "device", "words"),
    [
        (1, 2, "cpu", "of 1 process and cannot go on with 2: use vicvlm finetune --resume r,"),
        (4, 1, "cpu", "of 4 processes .* torchrun --nproc_per_node 4 -m vicvlm_cli finetune"),
        (4, 2, "cuda", "use accelerate launch --num_processes 4 -m vicvlm_cli finetune --resume r"),
    ],
)
def test_a_run_goes_on_with_as_many_processes(
    then: int, now: int, device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(num_processes=now, device=SimpleNamespace(type=device))
    monkeypatch.setattr("vicvlm_cli.workflows.launch.PartialState", lambda: state)
    with pytest.raises(UserError, match=words):
        require_processes(then, "finetune", Path("r"))
    require_processes(now, "finetune", Path("r"))


@pytest.mark.parametrize(
    ("free", "cached", "workers"),
    [(64, False, 0), (74, False, 1), (2 * 2 * 3 * 19 + 1, False, 3), (10**5, False, 7)]
    + [(2 * (2 * 3 * 19 + 100), True, 3), (2 * (2 * 3 * 19), True, 0)],
)
def test_loader_processes_fit_into_shared_memory(
    free: int, cached: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free << 20))
    monkeypatch.setattr("vicvlm_cli.workflows.launch.SHARED_MEMORY", Path("shm"))
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # of eight: other machines have the rest
    accelerator: Any = SimpleNamespace(num_processes=8, device=SimpleNamespace(type="cuda"))
    # Of 252 pixels; 25 pictures four batches ahead are 18.2 MiB a loader process, 500 are 91.
    plan = Plan((1,) * 500, "one", 25, 0)
    data = DataConfig(crop_scale=0.5, cache_mb=2000 if cached else 0)
    heard = Heard()
    assert with_workers(data, accelerator, 224, plan, heard).workers == workers
    lowered = f"shm has room for {workers} loader processes, not 7"
    assert (lowered in "".join(heard.notes)) == (workers < 7)
    given = replace(data, workers=5)
    assert with_workers(given, accelerator, 224, plan, heard).workers == 5
    accelerator.device.type = "cpu"
    assert with_workers(data, accelerator, 224, plan, heard).workers == 0
