"""Targets that follow the trained weights slowly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EmaTarget(nn.Module):
    """An exponential moving average of a module (BYOL, arXiv 2006.07733, eq. 1).

    ``target = decay * target + (1 - decay) * online`` after each optimiser step. It takes no
    gradient and never leaves evaluation mode.
    """

    def __init__(self, online: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(online).requires_grad_(False).eval()
        self.decay = decay

    def train(self, mode: bool = True) -> EmaTarget:
        """Stay in evaluation mode: a target has no dropout."""
        return self

    @torch.no_grad()
    def update(self, online: nn.Module) -> None:
        """Move one step towards ``online``."""
        targets: list[Tensor] = list(self.module.parameters())
        sources: list[Tensor] = list(online.parameters())
        torch._foreach_lerp_(targets, sources, 1 - self.decay)
        for mine, theirs in zip(self.module.buffers(), online.buffers(), strict=True):
            mine.copy_(theirs)
