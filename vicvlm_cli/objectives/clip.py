"""CLIP and SigLIP: two encoders and a contrast between them, nothing else."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast
from vicvlm_cli.objectives.ranks import Noise, gather
from vicvlm_cli.objectives.retrieval import Losses


class CLIP(nn.Module):
    """Symmetric InfoNCE (arXiv 2103.00020, fig. 3), or SigLIP's pairwise sigmoid (2303.15343).

    Raises:
        UsageError: an unknown loss.
    """

    LOSSES = ("itc",)
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "none"},
        "pretrain": {"losses": {"itc": {}}},
        "finetune": {"objective": "clip", "losses": {"itc": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """``loss``: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP)."""

        loss: str = "softmax"

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        if config.loss not in ("softmax", "sigmoid"):
            raise UsageError(f"--loss is {config.loss!r}, not softmax or sigmoid")
        self.model, self.config = model, config
        # Nearly all pairs are negatives: the bias starts there (SigLIP, sec. 3.1). It moves every
        # score alike and changes no ranking, so it is no part of the model.
        self.bias = nn.Parameter(torch.tensor(-10.0)) if config.loss == "sigmoid" else None

    def forward(self, batch: Batch, noise: Noise, active: Set[str]) -> Losses:
        """The contrastive loss of the global batch, and what a constant guess gives."""
        image = self.model.encode_image(batch.image)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        if self.bias is None:
            contrasted = contrast(self.model, image, text, batch)
            return {"itc": contrasted.loss}, {"itc": contrasted.trivial}
        cosine = gather(image.features.float()) @ gather(text.features.float()).T  # [G, G]
        logits = self.model.logit_scale.exp() * cosine + self.bias
        image_id = gather(batch.image_id)
        same = image_id[:, None] == image_id[None, :]
        guess = losses.sigmoid_base_rate(same)
        return {"itc": losses.sigmoid(logits, same)}, {"itc": guess}

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)
