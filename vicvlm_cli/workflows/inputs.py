"""What the objective gets of each batch of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.objectives.cached import CachedContrast
from vicvlm_cli.objectives.masked_language import token_kinds
from vicvlm_cli.objectives.masking import drop_words
from vicvlm_cli.objectives.ranks import Noise
from vicvlm_cli.settings import ModelConfig

Ready = Callable[[Batch, int], tuple[Batch, Noise]]
Input = tuple[Batch, Noise, tuple[CachedContrast, ...]]


class WordDropout:
    """Hides words of a batch's captions, each by itself with probability ``share``.

    So that no one word is what a caption is known by. Whatever a method makes of its captions,
    targets of an EMA model among them, is of the words that are left.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: ModelConfig, share: float, device: torch.device
    ) -> None:
        kinds = token_kinds(tokenizer, config.vocab_size)
        self.special, self.continuation = (x.to(device) for x in kinds)
        self.mask_id, self.max_tokens, self.share = tokenizer.mask_id, config.max_tokens, share

    def __call__(self, batch: Batch, noise: Noise) -> None:
        """Hide words of ``batch``, in place; the tensors that it came with are left alone."""
        batch.input_ids = self._dropped(batch.input_ids, noise)
        if batch.more_ids is not None:
            each = [self._dropped(ids, noise) for ids in batch.more_ids.unbind(1)]
            batch.more_ids = torch.stack(each, dim=1)

    def _dropped(self, ids: Tensor, noise: Noise) -> Tensor:
        # Noise for max_tokens columns: as many whatever the longest caption of a process is.
        draw = noise.rand(len(ids), self.max_tokens)[:, : ids.shape[1]]
        hidden = drop_words(ids, self.continuation, self.special, draw, self.share)
        return ids.masked_fill(hidden, self.mask_id)


def plain_inputs(source: Iterator[Batch], start: int, ready: Ready) -> Iterator[Input]:
    """Each batch by itself; arguments as those of :func:`cached_inputs`."""
    for number, batch in enumerate(source, start):
        yield *ready(batch, number), ()


def cached_inputs(
    source: Iterator[Batch],
    start: int,
    ready: Ready,
    *,
    batches: int,
    parameters: Sequence[Tensor],
    objective: Callable[..., Any],
) -> Iterator[Input]:
    """Each batch with the contrast of its step, of which all batches are encoded beforehand.

    The next step's batches are encoded when they are asked for: after this step's weights changed.
    They wait as the loader gave them, bytes in the host's memory.

    Args:
        source: the run's batches from the ``start``-th on, which begins a step.
        ready: gives a batch, known by its number in the run, as the objective takes it, with its
            noise; the second time what it gave the first.
        batches: of a step.
        parameters: what is trained.
        objective: run without graph, and without anything else of a training's step.
    """
    while step := list(islice(source, batches)):
        cached = CachedContrast(batches, parameters)
        with torch.no_grad():
            for number, batch in enumerate(step, start):
                objective(*ready(batch, number), set(), cached)
        for number, batch in enumerate(step, start):
            yield *ready(batch, number), (cached,)
        start += batches
