"""The second half of a transformer's perceptron, which keeps half of what PyTorch would."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


class _GeluLinear(torch.autograd.Function):
    """Keeps what goes into the activation, and computes the activation again for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # Cast here and not by autocast, which would keep the cast weight for its next use, without
        # a gradient: gradients are off in here.
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.gelu(x), weight.to(x.dtype), bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient: Tensor = gradients[0]  # [..., out]
        flat = gradient.flatten(0, -2)
        of_weight = flat.T @ F.gelu(x).flatten(0, -2)
        of_x = torch.ops.aten.gelu_backward(gradient @ weight.to(x.dtype), x)
        return of_x, of_weight.to(weight.dtype), flat.sum(0).to(weight.dtype)


def gelu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(F.gelu(x))`` of [..., width], at half the memory.

    The widest tensors of a transformer are those on both sides of this activation: of a ViT's block
    they are nearly half of what is kept for the backward pass.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return linear(F.gelu(x))
    out: Tensor = _GeluLinear.apply(x, linear.weight, linear.bias)
    return out


class LeanMlp(Mlp):
    """timm's perceptron with :func:`gelu_linear` in it."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., out]."""
        return gelu_linear(self.fc1(x), self.fc2)


def make_lean(module: nn.Module) -> None:
    """Turn every plain ``Mlp`` of timm's below ``module`` into a :class:`LeanMlp`."""
    for mlp in module.modules():
        if type(mlp) is Mlp and _is_plain(mlp):
            mlp.__class__ = LeanMlp  # its weights, and their names, stay


def _is_plain(mlp: Any) -> bool:
    act, last = mlp.act, mlp.fc2
    return (
        (type(act) is nn.GELU and act.approximate == "none")
        and type(mlp.norm) is nn.Identity
        and mlp.drop1.p == mlp.drop2.p == 0
        and (type(last) is nn.Linear and last.bias is not None)
    )
