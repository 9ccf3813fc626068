"""Optimal transport against loops over single numbers, and against the best plan there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from vicvlm_cli.objectives.transport import alignment_distance, ipot


def slow(cost: list[list[float]], beta: float, iterations: int) -> list[list[float]]:
    """One pair without padding, as UNITER's code has it, number by number."""
    m, n = len(cost), len(cost[0])
    plan = [[1.0] * n for _ in range(m)]
    sigma = [1 / m] * m
    for _ in range(iterations):
        q = [[math.exp(-cost[i][j] / beta) * plan[i][j] for j in range(n)] for i in range(m)]
        delta = [1 / (n * sum(q[i][j] * sigma[i] for i in range(m))) for j in range(n)]
        sigma = [1 / (m * sum(q[i][j] * delta[j] for j in range(n))) for i in range(m)]
        plan = [[sigma[i] * q[i][j] * delta[j] for j in range(n)] for i in range(m)]
    return plan


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Costs of three captions of 1, 3 and 4 words, the first at column 1, to 5 patches."""
    cost = 2 * torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    words = torch.zeros(3, 6, dtype=torch.bool)
    for row, count in enumerate((1, 3, 4)):
        words[row, 1 : 1 + count] = True
    return cost, words, torch.ones(3, 5, dtype=torch.bool)


@pytest.mark.parametrize("iterations", [1, 7, 50])
def test_the_plan_is_the_slow_one_whatever_is_padded(iterations: int) -> None:
    cost, words, patches = example()
    plan = ipot(cost, words, patches, iterations=iterations)
    for row in range(3):
        expected = slow(cost[row][words[row]].tolist(), 0.5, iterations)
        torch.testing.assert_close(plan[row][words[row]], torch.tensor(expected).double())
        assert not plan[row][~words[row]].any()
    patches[:, 4] = False
    plan = ipot(cost, words, patches, iterations=iterations)
    expected = slow(cost[2][words[2]][:, :4].tolist(), 0.5, iterations)
    torch.testing.assert_close(plan[2][words[2]][:, :4], torch.tensor(expected).double())


def test_the_plan_moves_all_mass_and_costs_as_little_as_can_be() -> None:
    cost = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(2)).double()
    every = torch.ones(1, 4, dtype=torch.bool)
    plan = ipot(cost, every, every, iterations=500)
    torch.testing.assert_close(plan.sum(2), torch.full((1, 4), 0.25).double())
    torch.testing.assert_close(plan.sum(1), torch.full((1, 4), 0.25).double())
    best = min(
        sum(float(cost[0, i, j]) for i, j in enumerate(order)) / 4
        for order in itertools.permutations(range(4))
    )
    assert float((cost * plan).sum()) == pytest.approx(best, rel=1e-3)


def test_the_distance_worked_out_by_hand() -> None:
    # One word on two patches, one of them the same way and one the opposite: half its mass each.
    text = torch.tensor([[[2.0, 0.0]]], requires_grad=True)
    image = torch.tensor([[[3.0, 0.0], [-1.0, 0.0]]])
    one, two = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool)
    distance = alignment_distance(text, image, one, two)
    torch.testing.assert_close(distance.detach(), torch.tensor([1.0]))
    distance.sum().backward()
    assert text.grad is not None
    nothing = alignment_distance(text.detach(), image, ~one, two)  # a caption without a word
    assert nothing.tolist() == [0.0]


def test_the_gradient_takes_the_plan_as_given() -> None:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 3, 4, generator=generator, requires_grad=True)
    image = torch.randn(2, 5, 4, generator=generator)
    words, patches = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    cosine = torch.cosine_similarity(text[:, :, None], image[:, None], dim=-1)
    plan = ipot((1 - cosine).detach(), words, patches)
    expected = torch.autograd.grad(((1 - cosine) * plan).sum(), text)
    ours = torch.autograd.grad(alignment_distance(text, image, words, patches).sum(), text)
    torch.testing.assert_close(ours, expected)
