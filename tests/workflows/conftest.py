"""A prepared data set large enough to train on for a few steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_training import QUIET, Heard, run

from vicvlm_cli.workflows.prepare import prepare
from vicvlm_cli.workflows.train import TrainResult


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes: 96 train, 16 val and 16 test images at 32 pixels."""
    sizes = {"train": 96, "val": 16, "test": 16}
    folder = tmp_path_factory.mktemp("scenes")
    return prepare("scenes", folder, image_side=32, sizes=sizes, workers=1, progress=QUIET).path


@pytest.fixture
def fresh_accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On the CPU whatever the machine; the library's singletons as in a new process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def pretrained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A whole pretraining of 12 steps, a validation after each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(True)
        output = tmp_path_factory.mktemp("pretrained") / "run"
        heard = Heard()
        result = run(scenes, output, "pretrain.validate_every=1", progress=heard)
        result.notes = heard.notes  # type: ignore[attr-defined]
        return result


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return Accelerator()
