"""The EMA target follows its arithmetic, and nothing else moves it."""

from __future__ import annotations

import torch
from torch import nn

from vicvlm_cli.objectives.momentum import EmaTarget


def online() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


def test_it_follows_its_arithmetic_over_several_steps() -> None:
    module = online()
    target = EmaTarget(module, decay=0.9)
    expected = {k: v.clone().double() for k, v in module.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape) * (step + 1))
            module(torch.randn(8, 3))  # moves the running statistics
        target.update(module)
        for name, value in module.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * value.detach().double()
            own = target.module.get_parameter(name)
            torch.testing.assert_close(own.double(), expected[name], rtol=1e-5, atol=1e-6)
    for name, buffer in module.named_buffers():  # statistics are taken over, not averaged
        torch.testing.assert_close(target.module.get_buffer(name), buffer)


def test_it_starts_as_a_copy_of_its_own() -> None:
    module = online()
    target = EmaTarget(module, decay=0.5)
    before = [p.clone() for p in target.module.parameters()]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, target.module.parameters(), strict=True))


def weight(target: EmaTarget) -> torch.Tensor:
    return target.module.get_parameter("0.weight")


def test_the_ends_of_the_decay() -> None:
    module, other = online(), online()
    with torch.no_grad():
        other.get_parameter("0.weight").add_(1)
    frozen, copied = EmaTarget(module, 1.0), EmaTarget(module, 0.0)
    frozen.update(other)
    copied.update(other)
    torch.testing.assert_close(weight(frozen), module[0].weight)
    torch.testing.assert_close(weight(copied), other[0].weight)


def test_it_takes_no_gradient_and_stays_in_evaluation_mode() -> None:
    target = EmaTarget(online().train(), decay=0.9)
    whole = nn.ModuleDict({"target": target, "other": nn.Dropout()})
    whole.train()
    assert whole["other"].training
    assert not any(m.training for m in target.module.modules())
    assert not any(p.requires_grad for p in target.parameters())
    x = torch.randn(4, 3)
    assert torch.equal(target.module(x), target.module(x))  # no dropout
    assert not target.module(x).requires_grad
