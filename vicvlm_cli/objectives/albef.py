"""ALBEF: align before fuse, with a momentum model that fills queues and softens the targets."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UsageError
from vicvlm_cli.model.vlm import VLM, Encoded
from vicvlm_cli.objectives import losses
from vicvlm_cli.objectives.alignment import Contrast, clamp_temperature, match, require_matching
from vicvlm_cli.objectives.cached import Cached, over_step
from vicvlm_cli.objectives.heads import MLMHead
from vicvlm_cli.objectives.masked_language import hide_words, token_kinds
from vicvlm_cli.objectives.momentum import EmaTarget
from vicvlm_cli.objectives.queue import FeatureQueue
from vicvlm_cli.objectives.ranks import Noise, gather, global_mean
from vicvlm_cli.objectives.retrieval import Losses


class ALBEF(nn.Module):
    """ITC against a momentum model and its queues, ITM, and MLM with the picture in view.

    The targets of ITC and MLM are in part what the momentum model believes (arXiv 2107.07651,
    sec. 3.3, eq. 6 and 7). All features and captions of a row's own picture are positives, those in
    the queues too, and none of them is a negative for ITM.

    Raises:
        UsageError: an option is out of range, or the model has no fusion encoder.
    """

    LOSSES = ("itc", "itm", "mlm")
    CACHES_CONTRAST: ClassVar[bool] = True
    RECIPE: ClassVar[dict[str, Any]] = {
        "model": {"fusion": "cross_attention"},
        "pretrain": {"losses": {"itc": {}, "itm": {}, "mlm": {}}},
        # Not the momentum model again: it looks back some 200 steps, and a fine-tuning is short.
        "finetune": {"objective": "retrieval", "losses": {"itc": {}, "itm": {}}},
    }

    @dataclass(frozen=True)
    class Config:
        """Options of the method.

        ``queue_size``: momentum features kept of each modality (the paper: 65,536; 0: none). They
        count after ``queue_steps`` optimiser steps (the paper: at once, at a rate 20 times lower):
        while the encoders change fast, a feature's age alone tells those of earlier steps from the
        batch's own, and that is learned instead of what pictures and captions share.
        ``alpha``: share of the momentum model's belief in the targets, reached by a straight line
        over ``alpha_steps`` optimiser steps (the paper: an epoch; 0: at once). ``text_mask``: share
        of words hidden.
        """

        queue_size: int = 4096
        queue_steps: int = 1000
        alpha: float = 0.4
        alpha_steps: int = 1000
        ema_decay: float = 0.995
        text_mask: float = 0.15
        itm_negatives: int = 1

    def __init__(self, model: VLM, tokenizer: Tokenizer, config: Config) -> None:
        super().__init__()
        require_matching(model, "albef")
        for name in ("queue_size", "queue_steps", "alpha_steps"):
            if getattr(config, name) < 0:
                raise UsageError(f"options.{name} must be 0 or more")
        for name in ("alpha", "ema_decay"):
            if not 0 <= getattr(config, name) <= 1:
                raise UsageError(f"options.{name} must be from 0 to 1")
        if not 0 < config.text_mask < 1:
            raise UsageError("options.text_mask must be between 0 and 1")
        self.model, self.config = model, config
        width, vocab_size = model.config.projection_dim, model.config.vocab_size
        self.mlm_head = MLMHead(model.config.text_width, vocab_size)
        self.target = EmaTarget(model, config.ema_decay)
        self.head_target = EmaTarget(self.mlm_head, config.ema_decay)
        self.image_queue = FeatureQueue(config.queue_size, width)
        self.text_queue = FeatureQueue(config.queue_size, width)
        self.mask_id = tokenizer.mask_id
        special, continuation = token_kinds(tokenizer, vocab_size)
        self.register_buffer("special", special, persistent=False)
        self.register_buffer("continuation", continuation, persistent=False)
        # How often each token was a masked one: the trivial guess for masked language modelling.
        self.register_buffer("token_counts", torch.ones(vocab_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        # Pictures', captions' features and ids of this step's batches, for the queues at its end:
        # with accumulated gradients, all batches of a step meet the same candidates.
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    special: Tensor
    continuation: Tensor
    token_counts: Tensor
    steps: Tensor

    @property
    def alpha(self) -> float:
        """The momentum model's share of the targets in this step."""
        if self.config.alpha_steps == 0:
            return self.config.alpha
        return self.config.alpha * min(1.0, int(self.steps) / self.config.alpha_steps)

    def forward(
        self, batch: Batch, noise: Noise, active: Set[str], cached: Cached = None
    ) -> Losses:
        """Raw losses named in ``active`` (ITC always), and the trivial value of each."""
        model, number = self.model, self.config.itm_negatives
        image = model.encode_image(batch.image, batch.begun)
        text = model.encode_text(batch.input_ids, batch.attention_mask)
        with torch.no_grad():
            image_m = self._momentum.encode_image(batch.image, batch.begun)
            text_m = self._momentum.encode_text(batch.input_ids, batch.attention_mask)
        images, texts = image.features.float(), text.features.float()
        rows = images, texts, image_m.features.float(), text_m.features.float(), batch.image_id
        loss, guess = over_step(self._contrast, *rows, cached=cached)
        values, trivial = {"itc": loss}, {"itc": guess}
        if "itm" in active:
            images, texts = gather(images), gather(texts)
            with torch.no_grad():
                similarity = model.logit_scale.exp() * images @ texts.T  # [G, G]
            ids = gather(batch.image_id)
            contrasted = Contrast(loss, guess, similarity, ids, images, texts)
            values["itm"], _ = match(model, image, text, contrasted, noise, number)
            trivial["itm"] = torch.tensor(losses.itm_base_rate(2 * number))
        if "mlm" in active:
            values["mlm"], trivial["mlm"] = self._mlm(batch, image, image_m, noise)
        return values, trivial

    def after_step(self) -> None:
        """Bound the temperature; in training also move the momentum model and fill the queues.

        Once an optimiser step.
        """
        clamp_temperature(self.model)
        if not self.training:
            return
        self.target.update(self.model)
        self.head_target.update(self.mlm_head)
        for images, texts, image_id in self._pending:
            self.image_queue.push(images, image_id)
            self.text_queue.push(texts, image_id)
        self._pending.clear()
        self.steps += 1

    @property
    def _momentum(self) -> VLM:
        model: Any = self.target.module
        return model

    def _contrast(
        self, images: Tensor, texts: Tensor, images_m: Tensor, texts_m: Tensor, image_id: Tensor
    ) -> tuple[Tensor, Tensor]:
        """ITC of features [G, P] both ways against batch and queue, and that of a constant guess.

        The momentum model's, ``images_m`` and ``texts_m``, wait for the queues.
        """
        (old_images, old_id), (old_texts, _) = self.image_queue.filled(), self.text_queue.filled()
        if int(self.steps) < self.config.queue_steps:
            old_images, old_texts, old_id = old_images[:0], old_texts[:0], old_id[:0]
        same = image_id[:, None] == torch.cat([image_id, old_id])[None, :]  # [G, G + K]
        scale, alpha = self.model.logit_scale.exp(), self.alpha
        total, guess = images.new_zeros(()), images.new_zeros(())
        for query, query_m, candidates in (
            (images, images_m, torch.cat([texts_m, old_texts])),
            (texts, texts_m, torch.cat([images_m, old_images])),
        ):
            with torch.no_grad():
                belief = scale * query_m @ candidates.T if alpha else None
                target = losses.soft_targets(same, belief, alpha)
                guess += losses.divergence_sum(torch.zeros_like(target), target)
            total = total + losses.divergence_sum(scale * query @ candidates.T, target)
        if self.training:
            self._pending.append((images_m, texts_m, image_id))
        return total / (2 * len(image_id)), guess / (2 * len(image_id))

    def _mlm(
        self, batch: Batch, image: Encoded, image_m: Encoded, noise: Noise
    ) -> tuple[Tensor, Tensor]:
        """Masked language modelling with soft targets, and its trivial value."""
        ids, hidden = hide_words(
            batch,
            self.special,
            self.continuation,
            noise,
            ratio=self.config.text_mask,
            max_tokens=self.model.config.max_tokens,
            mask_id=self.mask_id,
            as_bert=True,
        )
        words, alpha = batch.input_ids[hidden], self.alpha
        logits = _read(self.model, self.mlm_head, image, ids, batch.attention_mask, hidden)
        with torch.no_grad():
            belief = None
            if alpha:
                head: Any = self.head_target.module
                belief = _read(self._momentum, head, image_m, ids, batch.attention_mask, hidden)
            own = words[:, None] == torch.arange(len(self.token_counts), device=words.device)
            target = losses.soft_targets(own, belief, alpha)  # [M, vocab_size]
            if self.training:
                self.token_counts += torch.bincount(words, minlength=len(self.token_counts))
            frequency = self.token_counts / self.token_counts.sum()
            guess = losses.divergence_sum(frequency.log().expand_as(target), target)
        total = losses.divergence_sum(logits, target)
        return global_mean(total, len(words)), guess / max(len(words), 1)


def _read(
    model: VLM, head: MLMHead, image: Encoded, ids: Tensor, mask: Tensor, hidden: Tensor
) -> Tensor:
    """Logits [M, vocab_size] at the ``hidden`` positions, bool [B, L], of captions [B, L]."""
    fused = model.fuse(image.tokens, None, model.text_encoder(ids, mask), mask, want="text")
    logits: Tensor = head(fused.text[hidden], model.text_encoder.word_embeddings)
    return logits
