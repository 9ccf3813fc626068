"""Processes, precision, tracker and folder of a run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from tiny_training import QUIET, TINY, equal, run, weights

from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.settings import DataConfig
from vicvlm_cli.workflows.launch import join, with_workers
from vicvlm_cli.workflows.train import TrainResult, pretrain

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_a_folder_that_holds_a_run_is_refused(pretrained: TrainResult, scenes: Path) -> None:
    before = weights(pretrained.run)
    with pytest.raises(UserError, match="already holds a run: choose another --output"):
        run(scenes, pretrained.run)
    assert equal(weights(pretrained.run), before)


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


@pytest.mark.parametrize(("free", "workers"), [(64, 0), (2 * 2 * 3 * 19 + 1, 3), (10**5, 7)])
def test_loader_processes_fit_into_shared_memory(
    free: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free << 20))
    monkeypatch.setattr("vicvlm_cli.workflows.launch.SHARED_MEMORY", Path())
    accelerator: Any = SimpleNamespace(num_processes=2, device=SimpleNamespace(type="cuda"))
    # 25 pictures of 252 pixels, four batches ahead: 18.2 MiB a loader process.
    data = with_workers(DataConfig(crop_scale=0.5), accelerator, 224, 25)
    assert data.workers == workers
    assert with_workers(DataConfig(workers=5), accelerator, 224, 25).workers == 5
    accelerator.device.type = "cpu"
    assert with_workers(DataConfig(), accelerator, 224, 25).workers == 0
