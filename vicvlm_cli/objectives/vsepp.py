"""VSE++: a margin between each pair and its hardest negative in the batch."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.cached import Cached, over_step
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.retrieval import Losses


class VSEPP(nn.Module):
    """Triplet loss with the hardest in-batch negative (VSE++, arXiv 1707.05612, eq. 6).

    From scratch the hardest negatives alone hold all features at one point for long, so the first
    ``mean_steps`` steps take the mean over all negatives that break the margin (VSE0, eq. 5). So
    does a later step whose hardest negatives cost as much as one point for all features would:
    there the shortest way down is to that point.
    """

    LOSSES = ("hinge",)
    CACHES_CONTRAST: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "none"},
        "pretrain": {"losses": {"hinge": {}}},
        "finetune": {
            "objective": "vsepp",
            "losses": {"hinge": {}},
            "options": {"mean_steps": 0},
        },
    }

    @dataclass(frozen=True)
    class Config:
        """``margin`` in cosine; ``mean_steps``: optimiser steps before the hardest alone count.

        With 0 they do so always, as in the paper.
        """

        margin: float = 0.2
        mean_steps: int = 100

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        self.model, self.config = model, config
        model.logit_scale.requires_grad_(False)  # the margin is the scale
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    steps: Tensor

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """The hinge of the global batch, and its value where all similarities are equal."""
        image = self.model.encode_image(batch.image, batch.begun)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        rows = image.features.float(), text.features.float(), batch.image_id
        loss, trivial = over_step(self._of_features, *rows, cached=cached)
        return {"hinge": loss}, {"hinge": trivial}

    def _of_features(
        self, images: Tensor, texts: Tensor, image_id: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of features [G, P]."""
        return self.hinge(images @ texts.T, image_id)

    def hinge(self, similarity: Tensor, image_id: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of [G, G] similarities, pictures in rows, and what equal ones would give."""
        margin, mean_steps = self.config.margin, self.config.mean_steps
        trivial = torch.tensor(2 * margin)
        if int(self.steps) < mean_steps:
            return losses.hinge(similarity, image_id, margin, hardest=False), trivial
        hardest = losses.hinge(similarity, image_id, margin, hardest=True)
        if mean_steps == 0:
            return hardest, trivial
        mean = losses.hinge(similarity, image_id, margin, hardest=False)
        return torch.where(hardest < 2 * margin, hardest, mean), trivial

    def after_step(self) -> None:
        """Count; once an optimiser step."""
        self.steps += 1
