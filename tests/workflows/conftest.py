"""A prepared data set large enough to train on for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.prepare import prepare


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes: 96 train, 16 val and 16 test images at 32 pixels."""
    sizes = {"train": 96, "val": 16, "test": 16}
    folder = tmp_path_factory.mktemp("scenes")
    quiet = Progress(quiet=True)
    return prepare("scenes", folder, image_side=32, sizes=sizes, workers=1, progress=quiet).path
