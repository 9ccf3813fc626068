"""Which mismatched pairs are matched against: hard ones, by similarity."""

from __future__ import annotations

import torch
from torch import Tensor

from vicvlm_cli.errors import UserError


def hard_negatives(similarity: Tensor, excluded: Tensor, noise: Tensor, number: int) -> Tensor:
    """Columns drawn without replacement from each row's softmax (ALBEF, sec. 3.2), [R, number].

    Args:
        similarity: [R, C] logits.
        excluded: bool [R, C], the columns of the row's own picture.
        noise: uniform [R, C] in [0, 1): the Gumbel-top-k trick makes it a draw.

    Raises:
        UserError: a row has fewer than ``number`` columns to draw from.
    """
    if int((~excluded).sum(dim=1).min()) < number:
        raise UserError(
            f"a batch holds too few other pictures to draw {number} hard negatives from: raise "
            "--batch-size"
        )
    gumbel = -torch.log(-torch.log(noise.clamp(1e-9, 1 - 1e-7)))
    scores = (similarity.detach().float() + gumbel).masked_fill(excluded, float("-inf"))
    return scores.topk(number, dim=1).indices
