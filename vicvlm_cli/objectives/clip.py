"""CLIP and SigLIP: two encoders and a contrast between them, nothing else."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import clamp_temperature, contrast, contrasted_rows
from vicvlm_cli.objectives.cached import Cached, over_step
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.objectives.retrieval import Losses


class CLIP(nn.Module):
    """Symmetric InfoNCE (arXiv 2103.00020, fig. 3), or SigLIP's pairwise sigmoid (2303.15343).

    Raises:
        UsageError: an unknown loss.
    """

    LOSSES = ("itc",)
    CACHES_CONTRAST: ClassVar[bool] = True
    MORE_CAPTIONS: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "none"},
        "pretrain": {"losses": {"itc": {}}},
        "finetune": {"objective": "clip", "losses": {"itc": {}}, "options": {"fit_bias": True}},
    }

    @dataclass(frozen=True)
    class Config:
        """``loss``: ``softmax`` (CLIP) or ``sigmoid`` (SigLIP).

        ``fit_bias``: the sigmoid's bias starts where the first batch wants it, not at -10. It moves
        by no more than the learning rate a step, and is another one once features are trained.
        """

        loss: str = "softmax"
        fit_bias: bool = False

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        if config.loss not in ("softmax", "sigmoid"):
            raise UsageError(f"--loss is {config.loss!r}, not softmax or sigmoid")
        self.model, self.config = model, config
        # Nearly all pairs are negatives: the bias starts there (SigLIP, sec. 3.1). It moves every
        # score alike and changes no ranking, so it is no part of the model.
        self.bias = nn.Parameter(torch.tensor(-10.0)) if config.loss == "sigmoid" else None
        fits = config.loss == "sigmoid" and config.fit_bias
        self.register_buffer("fitted", torch.tensor(False) if fits else None)

    fitted: Tensor | None

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """The contrastive loss of the global batch, and what a constant guess gives."""
        image = self.model.encode_image(batch.image, batch.begun)
        text = self.model.encode_text(batch.input_ids, batch.attention_mask)
        if self.bias is None:
            contrasted = contrast(self.model, image, text, batch, cached)
            return {"itc": contrasted.loss}, {"itc": contrasted.trivial}
        rows = contrasted_rows(self.model, image, text, batch)
        loss, guess = over_step(self._sigmoid, *rows, cached=cached)
        return {"itc": loss}, {"itc": guess}

    def _sigmoid(
        self, images: Tensor, texts: Tensor, image_id: Tensor, more: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """SigLIP's loss of features [G, P], and that of the best constant guess.

        ``more``: further captions [G, E, P].
        """
        assert self.bias is not None
        captions = image_id
        if more is not None:
            texts = torch.cat([texts, *more.unbind(1)])  # [(1 + E) * G, P]
            captions = image_id.repeat(1 + more.shape[1])
        scores = self.model.logit_scale.exp() * (images @ texts.T)  # [G, (1 + E) * G]
        same = image_id[:, None] == captions[None, :]
        if self.fitted is not None and self.training and not self.fitted:
            self.bias.data.copy_(losses.sigmoid_bias(scores, same))
            self.fitted.fill_(True)
        logits = scores + self.bias
        return losses.sigmoid(logits, same), losses.sigmoid_base_rate(same)

    def after_step(self) -> None:
        """Bound the temperature; once an optimiser step."""
        clamp_temperature(self.model)
