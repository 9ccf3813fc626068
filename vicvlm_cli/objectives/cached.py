"""A contrast over more pairs than fit in memory at once: cached gradients (arXiv 2101.06983)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vicvlm_cli.objectives.ranks import gather, rank, world_size

RowLoss = Callable[..., Any]  # rows of all pairs to a loss and its trivial value, both scalars


class CachedContrast:
    """One optimiser step's contrastive loss over the pairs of all its batches.

    Every batch goes through the objective twice, in the same order and with the same random
    numbers. First without graph, which leaves its features here. When the first comes again, the
    loss of all pairs is differentiated with respect to features and parameters (GradCache, sec.
    3.2, step 2); each batch then takes its own share of that gradient back through its graph
    (step 3), beside its other losses.

    Batches are to it what processes are to ``gather``: every batch is told the whole loss, and the
    mean over batches and processes has exactly the gradient of one batch of all pairs.

    Args:
        batches: how many batches a step has.
        parameters: what is trained; those that the loss itself uses (the temperature) get their
            gradient too.
    """

    def __init__(self, batches: int, parameters: Sequence[Tensor]) -> None:
        self.batches, self.parameters = batches, parameters
        # Of each batch: tensors of all processes' rows [G, ...].
        self._rows: list[list[Tensor]] = []
        self._returned = 0  # batches that came again
        self._value: tuple[Tensor, Tensor] | None = None
        self._row_gradients: list[Tensor | None] = []
        self._parameter_gradients: list[tuple[Tensor, Tensor]] = []

    def __call__(self, loss: RowLoss, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """``loss`` of the rows of all batches and processes, and its trivial value.

        Both are 0 as long as there are batches to come whose features are not known. Later the loss
        has its true value, and the gradient that is this batch's part.

        Args:
            loss: gives the loss and its trivial value first, of as many tensors [N, ...] as
                ``rows``; the order of pairs is that of ``gather``, batch after batch.
            rows: this batch's, of this process, [B, ...]; those with gradient in float32.
        """
        if len(self._rows) < self.batches:
            self._rows.append([gather(x.detach()) for x in rows])
            return rows[0].new_zeros(()), torch.zeros(())
        if self._value is None:
            self._differentiate(loss, [x.requires_grad for x in rows])
        assert self._value is not None
        value, trivial = self._value
        own = len(rows[0])
        first = (self._returned * world_size() + rank()) * own
        self._returned += 1
        # The mean over batches and processes, which is to be taken, divides by these.
        share = self.batches * world_size()
        part = value.new_zeros(())
        for x, gradient in zip(rows, self._row_gradients, strict=True):
            if gradient is not None:
                part = part + share * (x * gradient[first : first + own]).sum()
        for parameter, gradient in self._parameter_gradients:
            part = part + (parameter * gradient).sum()
        return value + (part - part.detach()), trivial

    def _differentiate(self, loss: RowLoss, wanted: list[bool]) -> None:
        whole = [torch.cat(parts) for parts in zip(*self._rows, strict=True)]
        for x, want in zip(whole, wanted, strict=True):
            x.requires_grad_(want)
        leaves = [x for x in whole if x.requires_grad]
        trained = [p for p in self.parameters if p.requires_grad]  # some may be frozen for a while
        # In float32: this loss is not scaled before its gradient, much of which fp16 would lose.
        with torch.autocast(whole[0].device.type, enabled=False):
            value, trivial = loss(*whole)[:2]
            found = torch.autograd.grad(value, [*leaves, *trained], allow_unused=True)
        of_rows = iter(found[: len(leaves)])
        self._row_gradients = [next(of_rows) if x.requires_grad else None for x in whole]
        of_parameters = zip(trained, found[len(leaves) :], strict=True)
        self._parameter_gradients = [(p, g) for p, g in of_parameters if g is not None]
        self._value = value.detach(), trivial


Cached = CachedContrast | None  # None: a batch is contrasted by itself


def over_step(loss: RowLoss, *rows: Tensor, cached: Cached = None) -> tuple[Tensor, Tensor]:
    """``loss`` of the rows [B, ...] of all processes and, with ``cached``, of all batches.

    Returns:
        The loss and its trivial value, the first two of what ``loss`` gives.
    """
    if cached is not None:
        return cached(loss, *rows)
    value, trivial = in_float32(loss, *(gather(x) for x in rows))[:2]
    return value, trivial


def in_float32(loss: RowLoss, *rows: Tensor) -> Any:
    """``loss`` of ``rows`` without autocast.

    Logits at a low temperature are tens: bfloat16 tells them apart by an eighth or a quarter, which
    is as much as a small contrastive loss has left to learn from.
    """
    with torch.autocast(rows[0].device.type, enabled=False):
        return loss(*rows)
