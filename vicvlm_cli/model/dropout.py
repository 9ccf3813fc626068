"""Dropout that takes little of a training step on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose masks come four of one random number where numbers are dear.

    On the CPU PyTorch draws a number an element, which takes 5 % of a step with all losses; 16 bits
    are enough to keep an element with a probability that is right to 1 in 65,536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Elements zeroed with probability ``p``, the others divided by 1 - p."""
        if not self.training or not 0 < self.p < 1 or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        out: Tensor = _Drop.apply(x, keep_mask(x.shape, self.p), 1 / (1 - self.p))
        return out


class _Drop(torch.autograd.Function):
    """Keeps its mask as a byte an element, where a product would keep a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (keep,) = ctx.saved_tensors
        return (gradients[0] * keep).mul_(ctx.scale), None, None


def keep_mask(shape: torch.Size, p: float) -> Tensor:
    """Bool of ``shape`` on the CPU, False with probability ``p``."""
    number = shape.numel()
    words = torch.empty((number + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    draw = words.view(torch.int16)[:number]  # uniform in [-32768, 32767]
    return (draw >= min(round(p * 65536) - 32768, 32767)).view(shape)


def replace_dropout(module: nn.Module) -> None:
    """Put :class:`Dropout` in the place of every ``nn.Dropout`` below ``module``."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout:
                setattr(parent, name, Dropout(child.p))
