"""Captions in groups of like length, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

GROUPS = 4
FEWEST = 16  # rows of a group: below, one pass more costs what the padding would


def by_length(mask: Tensor, run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``run`` over groups of rows, each cut to its longest caption.

    Captions of a batch are half padding. On a GPU, where a pass more costs more than the padding,
    all rows are one group.

    Args:
        mask: bool [B, L], True at real tokens, which come first in every row.
        run: given the rows, long [R], and a length n: their tokens [R, n, D].

    Returns:
        [B, L, D], zeros where a row was cut.
    """
    rows, longest = mask.shape
    groups = min(GROUPS, rows // FEWEST) if mask.device.type == "cpu" else 1
    if groups < 2:
        return run(torch.arange(rows, device=mask.device), longest)
    lengths = mask.sum(1)
    order = lengths.argsort()
    parts = []
    for part in order.chunk(groups):
        length = int(lengths[part[-1]])
        parts.append(F.pad(run(part, length), (0, 0, 0, longest - length)))
    return torch.cat(parts)[order.argsort()]
