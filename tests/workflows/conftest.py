"""A prepared data set large enough to train on for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from tiny_pictures import draw
from tiny_training import QUIET, Heard, run

from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.workflows.prepare import prepare
from vicvlm_cli.workflows.run import TrainResult

Reading = tuple[list[str], dict[str, Callable[[], object]]]


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


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """Eight pictures, 0.png to 7.png, the last four in a subfolder."""
    folder = tmp_path / "eight"
    (folder / "sub").mkdir(parents=True)
    for i in range(8):
        draw(folder / ("sub" if i > 3 else "") / f"{i}.png", i)
    return folder


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Reading:
    """The names of the files that are read, in order; ``at[name]`` is called before one is."""
    names: list[str] = []
    at: dict[str, Callable[[], object]] = {}

    def load(source: str | Path, at_least: int | None = None) -> Image.Image:
        names.append(Path(source).name)
        at.get(names[-1], lambda: None)()
        return load_rgb(source, at_least)

    monkeypatch.setattr("vicvlm_cli.workflows.embed.load_rgb", load)
    monkeypatch.setattr("vicvlm_cli.inference.os.cpu_count", lambda: 1)
    monkeypatch.setattr("vicvlm_cli.inference.supports_bf16", lambda _: False)
    return names, at
