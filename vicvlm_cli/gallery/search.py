"""Exact nearest-neighbour search in blocks: no score matrix of queries x gallery is ever held."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 4096


def running_top_k(blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of score blocks [Q, b] that lie side by side, best first.

    Returns values [Q, k'] and column numbers [Q, k'] with k' = min(k, columns); holds one block
    and k candidates a query at a time. Raises ValueError without a block or with k < 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    best: Tensor | None = None
    index: Tensor | None = None
    start = 0
    for scores in blocks:
        columns = torch.arange(start, start + scores.shape[1], device=scores.device)
        columns = columns.expand_as(scores)
        start += scores.shape[1]
        if best is not None and index is not None:
            scores, columns = torch.cat([best, scores], 1), torch.cat([index, columns], 1)
        best, at = scores.topk(min(k, scores.shape[1]), dim=1)
        index = columns.gather(1, at)
    if best is None or index is None:
        raise ValueError("no scores to search")
    return best, index


def exact_top_k(
    queries: Tensor, gallery: Tensor, k: int, off: Tensor | None = None, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """The k gallery rows [G, P] of highest inner product for each query [Q, P], best first.

    ``off`` [G] is taken off the rows' products. Returns scores and row numbers, both
    [Q, min(k, G)].
    """
    if off is None:
        off = gallery.new_zeros(len(gallery))
    parts = list(zip(gallery.split(block), off.split(block), strict=True))
    found = [
        running_top_k((rows @ part.T - less for part, less in parts), k)
        for rows in queries.split(block)
    ]
    return torch.cat([scores for scores, _ in found]), torch.cat([index for _, index in found])
