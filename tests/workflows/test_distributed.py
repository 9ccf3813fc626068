"""Two processes over gloo train as one process does on the joint batch."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from launched import HERE, PATIENCE, environment, launched
from tiny_training import BARE, LOSSES, TINY, rows, weights
from torch import Tensor
from two_processes import CACHED, CASES, WIDE, contrast_by_cache, losses_and_gradients

from vicvlm_cli.data.batches import Plan
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.objectives import OBJECTIVES
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.train import pretrain

SETTINGS = [
    *("pretrain.options.masked_stride=2", "pretrain.validate_every=1"),
    *("data.crop_scale=0.6", "data.word_dropout=0.2"),
    # The image encoder's only block joins on the way, and its processes must agree on that too.
    *("pretrain.frozen_blocks=1", "pretrain.frozen_epochs=0.5"),
]
Results = list[dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def both(folder: Path, scenes: Path) -> Results:
    """What each of two processes found."""
    (folder / "settings.json").write_text(json.dumps([*SETTINGS, "pretrain.batch_size=8"]))
    command = [sys.executable, str(HERE / "two_processes.py"), str(scenes), str(folder)]
    with (folder / "said.txt").open("w") as said:
        done = subprocess.run(command, env=environment(), stderr=said, timeout=PATIENCE)
    assert done.returncode == 0, (folder / "said.txt").read_text()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def one(folder: Path, scenes: Path) -> Path:
    """The run of one process on the joint batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        overrides = [*TINY, *SETTINGS, "pretrain.batch_size=16"]
        quiet = Progress(quiet=True)
        return pretrain(scenes, overrides=overrides, output=folder / "one", progress=quiet).run


def test_gathers_of_every_type_and_length(both: Results) -> None:
    for rank in range(2):
        got = both[rank]["primitives"]
        assert got["whole"].tolist() == [0, 1, 2, 10, 11, 12]
        # Each process computes the whole loss: its own rows get the gradient of both.
        assert got["gradient"].tolist() == [[0, 2, 4], [6, 8, 10]][rank]
        assert got["long"].tolist() == [0, 5, 1, 6]
        assert got["bool"].tolist() == [False, True, True, True]
        assert got["padded"].shape == (4, 4, 2)
        assert got["padded"][:, :, 0].tolist() == [[1, 1, 1, 0]] * 2 + [[2, 2, 2, 2]] * 2
        assert got["padded_gradient"].shape == (2, 3 + rank, 2)
        assert bool((got["padded_gradient"] == 4.0 * (rank + 1)).all())
        assert got["mask"].tolist() == [[True] * 3 + [False]] * 2 + [[True] * 4] * 2
        assert float(got["none"]) == 0
    shares = [float(r["primitives"]["mean"]) for r in both]
    assert sum(shares) / 2 == pytest.approx((2 + 6) / (1 + 3))


def test_every_objective_is_tried() -> None:
    assert {name for name, _, _ in CASES.values()} == OBJECTIVES.keys()


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_the_joint_batch(case: str, both: Results) -> None:
    joint = losses_and_gradients(case, None)
    assert {k for k in joint if k.startswith("loss.")}
    for rank in range(2):
        got = both[rank][case]
        assert set(got) == set(joint)
        for name, expected in joint.items():
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(
                got[name] / scale, expected / scale, rtol=1e-3, atol=2e-5, msg=f"{rank}: {name}"
            )


@pytest.mark.parametrize("case", CACHED)
def test_two_batches_of_two_processes_contrast_like_one(case: str, both: Results) -> None:
    joint = contrast_by_cache(case, None)
    for rank in range(2):
        got = both[rank][f"cached.{case}"]
        assert set(got) == set(joint)
        for name, expected in joint.items():
            scale = max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(
                got[name] / scale, expected / scale, rtol=1e-3, atol=2e-5, msg=f"{rank}: {name}"
            )


def test_a_training_of_two_processes_by_cached_gradients_is_that_of_one(
    both: Results, folder: Path, scenes: Path, fresh_accelerator: None
) -> None:
    joint = pretrain(
        scenes,
        overrides=[*BARE, *WIDE],  # a batch of 16
        output=folder / "joint",
        progress=Progress(quiet=True),
    )
    for mine, other in zip(rows(folder / "cached"), rows(joint.run), strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=1e-3)
        assert mine["trivial"] == other["trivial"]
        for key in ("step", "pairs", "epoch", "lr", "progress"):
            assert mine[key] == other[key]
    first, last = (
        weights(folder / "cached"),
        weights(joint.run),
    )
    for name, value in first.items():
        torch.testing.assert_close(value, last[name], rtol=0.01, atol=2e-3)


def test_both_processes_end_with_the_same_weights(both: Results, folder: Path) -> None:
    first, second = both[0]["training"], both[1]["training"]
    assert first.keys() == second.keys()
    for name in first:
        if name != "token_counts":  # of each process's own words
            assert torch.equal(first[name], second[name]), name
    kept = weights(folder / "run")
    assert all(torch.equal(kept[name], first[f"model.{name}"]) for name in kept)


def test_training_is_that_of_one_process_on_the_joint_batch(
    both: Results, one: Path, folder: Path
) -> None:
    ours, theirs = rows(folder / "run"), rows(one)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [6, 10, 12]
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine["losses"]) == set(LOSSES)
        assert mine["losses"] == pytest.approx(other["losses"], rel=2e-3)
        for key in ("pairs", "epoch", "lr", "progress"):
            assert mine[key] == other[key]
    first, last = (
        weights(folder / "run"),
        weights(one),
    )
    for name, value in first.items():
        torch.testing.assert_close(value, last[name], rtol=0.05, atol=0.01)
    validation = [[r["dual"]["rsum"] for r in rows(f, "validation")] for f in (folder / "run", one)]
    assert len(validation[0]) == len(validation[1]) == 2  # by the first process alone


def test_the_command_that_users_type(one: Path, scenes: Path, tmp_path: Path) -> None:
    settings = [word for s in [*TINY, *SETTINGS] for word in ("--set", s)]
    words = [*("pretrain", "--target", "byol", "--data", str(scenes)), *settings]
    words += ["--output", str(tmp_path / "run"), "--batch-size", "8", "--json"]
    with launched(*words, state=tmp_path / "state.json") as launch:
        code, said = launch.ended(), launch.said
    assert code == 0, said
    result: dict[str, Any] = json.loads(launch.out)  # one document, from one process
    assert result["steps"] == 12 and result["pairs"] == 192
    assert said.count("12 steps of 16 pairs, cpu no, 2 processes") == 1
    # Frozen random blocks, and captions that are too long: each is said by one process.
    assert said.count("warning: blocks of an image encoder") == 1
    assert said.count("of the captions are cut at") == 1
    assert said.count("warning:") == 2
    for mine, other in zip(rows(tmp_path / "run"), rows(one), strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=2e-3)


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_at_one_step_and_go_on(
    which: signal.Signals, scenes: Path, tmp_path: Path
) -> None:
    folder, steps = tmp_path / "run", 240
    settings = [word for s in [*BARE, "pretrain.epochs=40"] for word in ("--set", s)]
    words = ["pretrain", "--data", str(scenes), "--output", str(folder), "--batch-size", "8"]
    words += [*settings, "--set", "data.workers=1"]
    with launched(*words, state=tmp_path / "state.json") as launch:
        while not (folder / "metrics.jsonl").exists() and launch.is_running():
            time.sleep(0.05)
        launch.signal(which)
        code, said = launch.ended(), launch.said
    assert code != 0
    stopped = rows(folder)[-1]["step"]
    assert said.count(f"stopped at step {stopped}: --resume {folder} goes on") == 1, said
    assert 10 <= stopped < steps
    if which is signal.SIGINT:  # the state is the same
        words = ["pretrain", "--data", str(scenes), "--resume", str(folder)]
        with launched(*words, state=tmp_path / "state.json") as launch:
            code, said = launch.ended(), launch.said
        assert code == 0, said
        assert f"resuming {folder} at step {stopped}" in said
        seen = sorted({*range(10, steps + 1, 10), stopped})
        assert [row["step"] for row in rows(folder)] == seen
        assert not (folder / "state").exists()


def test_a_process_says_what_it_alone_has_met(scenes: Path, tmp_path: Path) -> None:
    data = shutil.copytree(scenes, tmp_path / "data")
    split = PreparedDataset.open(data).split("train")
    number = tuple(len(group) for group in split.captions)
    second = Plan(number, "one", 8, 0, rank=1, world_size=2)
    picture = int(second.epoch(0)[2][3, 0])  # in the third step
    content = split._pictures[picture]["bytes"].as_py()
    (shard,) = (data / "train").glob("*.arrow")
    whole = shard.read_bytes()
    assert whole.count(content) == 1
    shard.write_bytes(whole.replace(content, b"x" * len(content)))
    words = ["pretrain", "--data", str(data), "--output", str(tmp_path / "run")]
    words += [word for s in [*BARE, "data.workers=1"] for word in ("--set", s)]
    with launched(*words, "--batch-size", "8", state=tmp_path / "state.json") as launch:
        code, said = launch.ended(), launch.said
    assert code != 0
    name = split.image_ids[picture]
    (line,) = [line for line in said.splitlines() if line.startswith("process 1: ")]
    assert line.startswith(f"process 1: error: image {name} of scenes train (")
    assert "the shards are damaged" in line
    assert "this is a bug" not in said and "Original Traceback" not in said
