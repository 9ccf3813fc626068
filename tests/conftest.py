"""A tiny untrained model and a tiny prepared data set, made once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vicvlm_cli.checkpoint import load_model, save_model
from vicvlm_cli.data.prepared import PreparedDataset
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.inference import LoadedModel
from vicvlm_cli.model.create import create_model
from vicvlm_cli.model.vlm import RerankWeights
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.settings import ModelConfig
from vicvlm_cli.workflows.prepare import prepare

torch.set_num_threads(1)  # threads cost more than they give on models this small


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A prepared data set of drawn scenes: 8 train, 6 val and 12 test images."""
    sizes = {"train": 8, "val": 6, "test": 12}
    folder = tmp_path_factory.mktemp("raw")
    return prepare(
        "scenes", folder, image_side=32, sizes=sizes, workers=1, progress=Progress(quiet=True)
    ).path


@pytest.fixture(scope="session")
def make_checkpoint(tiny_data, tmp_path_factory):
    """A function that writes a tiny random checkpoint and returns its path."""
    captions = [
        c for group in PreparedDataset.open(tiny_data).split("train").captions for c in group
    ]
    tokenizer = Tokenizer.train(captions, 300)

    def make(seed: int = 0, weights=(0.5, 0.5), **options) -> Path:
        torch.manual_seed(seed)
        config = ModelConfig(
            image_encoder="vit_tiny_patch16_224",
            image_size=16,
            image_options={"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
            text_layers=1,
            fusion_layers=1,
            text_width=32,
            text_heads=2,
            projection_dim=24,
            max_tokens=24,
            **options,
        )
        path = tmp_path_factory.mktemp("run") / "model.safetensors"
        save_model(
            path,
            create_model(config, tokenizer.vocab_size),
            tokenizer,
            config={},
            data={"source": "scenes", "split_name": "other", "split_hash": "0"},
            objective="vicvlm",
            rerank_weights=RerankWeights(*weights),
        )
        return path

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint) -> Path:
    """The checkpoint of a tiny random model with ITM weight 0.5."""
    return make_checkpoint()


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint) -> LoadedModel:
    """The same, loaded on the CPU in float32, so that figures are exact."""
    model = load_model(tiny_checkpoint, device="cpu")
    model.precision = "no"
    return model


@pytest.fixture
def forgetful(tmp_path, monkeypatch):
    """A test that begins in an empty folder, with nothing remembered."""
    monkeypatch.setenv("VICVLM_STATE", str(tmp_path / "state.json"))
    monkeypatch.chdir(tmp_path)
