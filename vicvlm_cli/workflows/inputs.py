"""What the objective gets of each batch of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from vicvlm_cli.data.batches import Batch
from vicvlm_cli.objectives.cached import CachedContrast
from vicvlm_cli.objectives.ranks import Noise

Ready = Callable[[Batch, int], tuple[Batch, Noise]]
Input = tuple[Batch, Noise, tuple[CachedContrast, ...]]


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
