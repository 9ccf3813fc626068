"""A loss against its slow formula: the same value, and the same gradient everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def assert_same(value: Tensor, expected: Tensor, module: nn.Module) -> None:
    """Both, and their gradients to every trained parameter of ``module``, are equal."""
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    ours, theirs = (
        torch.autograd.grad(x, list(named.values()), retain_graph=True, allow_unused=True)
        for x in (value, expected)
    )
    assert any(gradient is not None and bool(gradient.any()) for gradient in theirs)
    for name, p, a, b in zip(named, named.values(), ours, theirs, strict=True):
        a, b = (torch.zeros_like(p) if gradient is None else gradient for gradient in (a, b))
        difference = float((a - b).abs().max())
        assert difference < 1e-4 + 1e-3 * float(b.abs().max()), name
