"""Fine-tuning from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_training import QUIET, equal, weights

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.errors import UsageError
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.train import finetune

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_fine_tuning_starts_from_the_checkpoint(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    still = ["finetune.lr=1e-30", "finetune.epochs=0.2"]
    finetune(pretrained.checkpoint, scenes, overrides=still, output=tmp_path / "f", progress=QUIET)
    assert equal(weights(tmp_path / "f"), weights(pretrained.run))
    loaded = load_model(tmp_path / "f", device="cpu")
    before = load_model(pretrained.checkpoint, device="cpu")
    assert loaded.tokenizer.to_json() == before.tokenizer.to_json()
    assert loaded.info.config["pretrain"] == before.info.config["pretrain"]


def test_a_checkpoints_model_cannot_be_changed(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a checkpoint's model cannot be changed"):
        finetune(
            pretrained.checkpoint,
            scenes,
            overrides=["model.image_size=64"],
            output=tmp_path,
            progress=QUIET,
        )
