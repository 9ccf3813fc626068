"""Hard negatives: drawn from the softmax, without replacement, never the row's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from vicvlm_cli.errors import UserError
from vicvlm_cli.objectives.negatives import hard_negatives


def draw(similarity: Tensor, excluded: Tensor, rows: int, number: int = 1) -> Tensor:
    """``rows`` independent draws from one row of similarities."""
    noise = torch.rand(rows, len(similarity), generator=torch.Generator().manual_seed(0))
    return hard_negatives(similarity.expand(rows, -1), excluded.expand(rows, -1), noise, number)


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected) ** 2 / expected).sum())


def test_hard_negatives_follow_the_softmax() -> None:
    similarity = torch.tensor([2.0, 0.5, -1.0, 4.0, 1.0, 0.0])
    excluded = torch.tensor([False, False, False, True, False, False])
    rows = 20_000
    picked = draw(similarity, excluded, rows)[:, 0]
    observed = picked.bincount(minlength=6).double()
    assert float(observed[3]) == 0  # the most similar of all, but the row's own
    allowed = ~excluded
    expected = rows * similarity[allowed].double().softmax(0)
    assert chi_square(observed[allowed], expected) < 23.5  # 4 degrees of freedom, p = 1e-4


def test_several_negatives_are_drawn_without_replacement() -> None:
    similarity = torch.tensor([1.0, 0.0, 2.0, -1.0])
    excluded = torch.tensor([False, False, False, False])
    rows = 20_000
    picked = draw(similarity, excluded, rows, number=2)
    assert bool((picked[:, 0] != picked[:, 1]).all())
    p = similarity.double().softmax(0)
    pairs = list(itertools.permutations(range(4), 2))
    expected = torch.stack([p[i] * p[j] / (1 - p[i]) for i, j in pairs]) * rows
    codes = (picked[:, 0] * 4 + picked[:, 1]).bincount(minlength=16).double()
    observed = torch.stack([codes[4 * i + j] for i, j in pairs])
    assert chi_square(observed, expected) < 35.6  # 11 degrees of freedom, p = 2e-4


def test_hard_negatives_are_never_the_rows_own_picture() -> None:
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    same = ids[:, None] == ids[None, :]
    similarity = 30.0 * same  # its own captions look by far the best
    for seed in range(50):
        noise = torch.rand(6, 6, generator=torch.Generator().manual_seed(seed))
        picked = hard_negatives(similarity, same, noise, 3)
        assert picked.shape == (6, 3)
        assert not bool(same.gather(1, picked).any())


@pytest.mark.parametrize("value", [0.0, 1 - 2**-24])
def test_the_ends_of_the_noise_are_no_trouble(value: float) -> None:
    picked = hard_negatives(
        torch.zeros(1, 3), torch.tensor([[True, False, False]]), torch.full((1, 3), value), 2
    )
    assert sorted(picked[0].tolist()) == [1, 2]


def test_a_batch_with_too_few_pictures_is_refused() -> None:
    same = torch.tensor([[True, True], [True, True]])
    with pytest.raises(UserError, match="too few other pictures to draw 1 hard negatives"):
        hard_negatives(torch.zeros(2, 2), same, torch.rand(2, 2), 1)
