"""Retrieval fine-tuning: image-text contrast and image-text matching, nothing else."""

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
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, match, require_matching
from vicvlm_cli.objectives.cached import Cached
from vicvlm_cli.objectives.ranks import Noise

Losses = tuple[dict[str, Tensor], dict[str, Tensor]]


class Retrieval(nn.Module):
    """ITC + ITM with in-batch hard negatives (ALBEF, arXiv 2107.07651, sec. 3.2)."""

    LOSSES = ("itc", "itm")
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "pretrain": {"losses": {"itc": {}, "itm": {}}},
        "finetune": {"objective": "retrieval", "losses": {"itc": {}, "itm": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """``itm_negatives``: hard negatives a pair and direction."""

        itm_negatives: int = 1

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        require_matching(model, "retrieval")
        self.model, self.config = model, config

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active``, and the trivial value of each."""
        image = self.model.encode_image(batch.image, batch.begun)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        contrasted = contrast(self.model, image, text, batch, cached)
        values = {"itc": contrasted.loss}
        trivial = {"itc": contrasted.trivial}
        if "itm" in active:
            number = self.config.itm_negatives
            values["itm"], _ = match(self.model, image, text, contrasted, noise, number)
            trivial["itm"] = torch.tensor(losses.itm_base_rate(2 * number))
        return values, trivial

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)
