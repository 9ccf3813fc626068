"""The perceptron that keeps less gives what PyTorch gives, and keeps less."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Mlp
from torch import nn

from vicvlm_cli.model.feed_forward import LeanMlp, gelu_linear, make_lean


@pytest.mark.parametrize("bf16", [False, True])
def test_it_is_gelu_and_linear_forward_and_back(bf16: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 24), nn.Linear(24, 5)
    weights = [*first.parameters(), *second.parameters()]
    results = []
    for lean in (True, False):
        torch.manual_seed(1)
        x = torch.randn(3, 4, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for _ in range(2):  # autocast keeps cast weights: the second use must have a gradient
                inner = first(x)
                y = gelu_linear(inner, second) if lean else second(nn.functional.gelu(inner))
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])])
        assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    for mine, theirs in zip(*results, strict=True):
        tolerance = 2e-2 if bf16 else 1e-5
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_the_activation_is_not_kept() -> None:
    linear, kept = nn.Linear(24, 5), []
    x = torch.randn(7, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        gelu_linear(x, linear)
    assert kept == [x.shape, linear.weight.shape]


def test_only_plain_perceptrons_are_changed_and_a_copy_is_a_copy() -> None:
    plain, others = Mlp(6, 24), [Mlp(6, 24, drop=0.1), Mlp(6, 24, act_layer=nn.ReLU)]
    module = nn.ModuleList([plain, *others])
    names = list(module.state_dict())
    x = torch.randn(2, 6)
    before = plain(x)
    make_lean(module)
    assert type(plain) is LeanMlp and all(type(other) is Mlp for other in others)
    assert list(module.state_dict()) == names
    torch.testing.assert_close(plain(x), before)
    twin = copy.deepcopy(plain)
    nn.init.zeros_(twin.fc2.weight)
    torch.testing.assert_close(plain(x), before)
    assert not torch.equal(twin(x), before)
