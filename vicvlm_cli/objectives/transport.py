"""Word-patch alignment: the cost of moving a caption's words onto a picture's patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def ipot(
    cost: Tensor, words: Tensor, patches: Tensor, *, beta: float = 0.5, iterations: int = 50
) -> Tensor:
    """The optimal transport plan by inexact proximal points (IPOT, arXiv 1802.04307, alg. 1).

    One inner iteration each, as in UNITER's code (arXiv 1909.11740), which ViLT uses.

    Args:
        cost: [B, L, N], from each word to each patch.
        words: bool [B, L], those that carry mass, all the same; ``patches``: bool [B, N].

    Returns:
        [B, L, N], summing to 1 in each row b; zeros where a caption has no word.
    """
    real = (words[:, :, None] & patches[:, None]).to(cost.dtype)
    lengths = [m.sum(1, keepdim=True).clamp(min=1).to(cost.dtype) for m in (words, patches)]
    word_count, patch_count = lengths  # [B, 1]
    affinity = (-cost / beta).exp() * real
    plan = real
    sigma = words / word_count  # [B, L]
    for _ in range(iterations):
        q = affinity * plan
        delta = patches / _positive(patch_count * (sigma[:, None] @ q)[:, 0])  # [B, N]
        sigma = words / _positive(word_count * (q @ delta[:, :, None])[:, :, 0])
        plan = sigma[:, :, None] * q * delta[:, None]
    return plan


def _positive(x: Tensor) -> Tensor:
    # Padding alone has nothing to divide by, and its numerator is 0.
    return x.masked_fill(x == 0, 1.0)


def alignment_distance(text: Tensor, image: Tensor, words: Tensor, patches: Tensor) -> Tensor:
    """Wasserstein distance [B], from 0 to 2, of words [B, L, D] and patches [B, N, D] (ViLT, 3.2).

    The cost is one minus the cosine; the plan takes no gradient. Masks as in :func:`ipot`.
    """
    with torch.autocast(text.device.type, enabled=False):
        a, b = F.normalize(text.float(), dim=-1), F.normalize(image.float(), dim=-1)
        cost = 1 - a @ b.mT  # [B, L, N]
        return (cost * ipot(cost.detach(), words, patches)).sum((1, 2))
