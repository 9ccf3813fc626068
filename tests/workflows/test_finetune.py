"""Fine-tuning from a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_training import QUIET, Heard, equal, weights

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.errors import UsageError
from vicvlm_cli.workflows import train
from vicvlm_cli.workflows.metrics import Metrics
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


def test_a_checkpoint_that_names_pretrained_weights_by_a_tag_is_fine_tuned(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    """As checkpoints of earlier versions do."""
    with safe_open(pretrained.checkpoint, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = '"vit_tiny_patch16_224"'
    tagged = {k: v.replace(name, name[:-1] + '.no_such_tag"') for k, v in header.items()}
    assert tagged != header
    save_file(tensors, tmp_path / "old.safetensors", metadata=tagged)
    short = ["finetune.epochs=0.2"]
    finetune(
        tmp_path / "old.safetensors",
        scenes,
        overrides=short,
        output=tmp_path / "f",
        progress=QUIET,
    )
    with pytest.raises(UsageError, match="cannot be changed"):
        finetune(
            tmp_path / "old.safetensors",
            scenes,
            overrides=["model.text_layers=2"],
            output=tmp_path / "g",
            progress=QUIET,
        )


def test_what_pretraining_saw_is_kept_and_told(
    pretrained: TrainResult, scenes: Path, tmp_path: Path
) -> None:
    own = load_model(pretrained.checkpoint, device="cpu").info.origins
    copy = tmp_path / "folder"
    shutil.copytree(scenes, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest |= {"source": "folder", "split_name": "random-hash-seed0"}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    heard, short = Heard(), ["finetune.epochs=0.2"]

    first = finetune(
        pretrained.checkpoint, copy, overrides=short, output=tmp_path / "a", progress=heard
    )
    assert not any("on val" in note for note in heard.notes)  # other sources share no pictures
    origins = load_model(first.checkpoint, device="cpu").info.origins
    assert [origin["source"] for origin in origins] == ["folder", "scenes"]
    assert origins[1:] == own

    manifest["split_hash"]["train"] = "0"  # a picture has come
    (copy / "manifest.json").write_text(json.dumps(manifest))
    second = finetune(
        first.checkpoint, copy, overrides=short, output=tmp_path / "b", progress=heard
    )
    told = [note for note in heard.notes if "on val" in note]
    assert len(told) == 1 and "may have seen some of these images" in told[0]
    assert load_model(second.checkpoint, device="cpu").info.origins[1:] == origins

    third = finetune(
        second.checkpoint, copy, overrides=short, output=tmp_path / "c", progress=QUIET
    )
    kept = load_model(third.checkpoint, device="cpu").info.data["before"]
    assert [origin["split_hash"] for origin in kept] == [o["split_hash"] for o in origins]


def test_what_pretraining_saw_outlives_a_stop(
    pretrained: TrainResult, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = train.load_model

    def earlier(*given: Any, **options: Any) -> Any:
        loaded = load(*given, **options)
        loaded.info = replace(loaded.info, data={"source": "flickr8k"})
        return loaded

    monkeypatch.setattr(train, "load_model", earlier)
    add = Metrics.add

    def stop(self: Metrics, step: int, *values: Any) -> None:
        add(self, step, *values)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(pretrained.checkpoint, scenes, output=tmp_path / "run", progress=QUIET)
    result = finetune(pretrained.checkpoint, scenes, resume=tmp_path / "run", progress=QUIET)
    assert load_model(result.checkpoint, device="cpu").info.data["before"] == [
        {"source": "flickr8k"}
    ]


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
