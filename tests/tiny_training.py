"""Settings of a training as small as it gets, on top of the preset for ``scenes``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vicvlm_cli.checkpoint import BANK
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.run import TrainResult
from vicvlm_cli.workflows.train import pretrain

QUIET = Progress(quiet=True)

# All that VicVLM has, beside ITC: presets leave out what has not paid.
WEIGHTS = {
    **{"itm": 0.5, "mlm": 0.1, "mim": 0.1, "joint_mim": 0.1},
    **{"variance": 0.02, "covariance": 0.002, "invariance": 0.02},
}
LOSSES = ("itc", *WEIGHTS)
TINY = [
    "model.image_size=32",
    "model.image_options={patch_size = 8, embed_dim = 24, depth = 1, num_heads = 2}",
    "model.text_width=32",
    "model.text_heads=2",
    "model.text_layers=1",
    "model.fusion_layers=1",
    "model.vocab_size=200",
    "model.projection_dim=16",
    "data.workers=0",
    "data.captions=one",
    "data.crop_scale=1.0",
    "pretrain.options.predictor_width=32",
    "pretrain.options.masked_stride=1",
    *(f"pretrain.losses.{name}.start=0" for name in LOSSES),
    *(f"pretrain.losses.{name}.ramp=0" for name in LOSSES),
    *(f"pretrain.losses.{name}.every=1" for name in LOSSES),
    *(f"pretrain.losses.{name}.weight={weight}" for name, weight in WEIGHTS.items()),
    'pretrain.options.vicreg="multimodal"',
    "finetune.losses.itm={weight = 1, every = 1}",
    *(
        f"{kind}.{setting}"
        for kind in ("pretrain", "finetune")
        for setting in (
            "batch_size=16",
            "lr=2e-3",
            "warmup=0.1",
            "final_lr=0.05",
            "epochs=2",
            "max_minutes=0",
            "precision=no",
            "validate_every=0",
            "rerank_top_k=4",
        )
    ),
]
# An image encoder of which one block may be frozen.
TWO_BLOCKS = "model.image_options={patch_size = 8, embed_dim = 24, depth = 2, num_heads = 2}"
# Those of them that suit any method.
BARE = [s for s in TINY if ".losses." not in s and ".options." not in s]


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind in a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


class Heard(Progress):
    """Keeps what is said instead of printing it."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def say(self, message: str) -> None:
        self.notes.append(message)


def run(data: Path, output: Path, *overrides: str, **options: Any) -> TrainResult:
    """Pretrain with the tiny settings and ``overrides``."""
    options = {"progress": QUIET, **options}
    return pretrain(data, overrides=[*TINY, *overrides], output=output, **options)


def weights(path: Path) -> dict[str, Tensor]:
    """What a run has kept of the model itself."""
    kept = load_file(path / "model.safetensors")
    return {name: x for name, x in kept.items() if not name.startswith(BANK)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
