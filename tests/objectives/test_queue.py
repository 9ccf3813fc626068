"""The queue by hand: what is in which slot, whose it is, and what has gone."""

from __future__ import annotations

import torch
from torch import Tensor

from vicvlm_cli.objectives.queue import FeatureQueue


def rows(*numbers: int) -> tuple[Tensor, Tensor]:
    """Features [n, n + 0.5] of pictures 10 n."""
    column = torch.tensor(numbers, dtype=torch.long)
    return torch.stack([column, column + 0.5], dim=1), 10 * column


def inside(queue: FeatureQueue) -> list[int]:
    """The numbers of what is in the slots, features and ids of one accord."""
    features, image_id = queue.filled()
    numbers = features[:, 0].long().tolist()
    expected = rows(*numbers)
    assert torch.equal(features, expected[0]) and torch.equal(image_id, expected[1])
    return numbers


def test_it_fills_and_then_goes_around() -> None:
    queue = FeatureQueue(5, 2)
    seen = [inside(queue)]
    for numbers in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11,)):
        queue.push(*rows(*numbers))
        seen.append(inside(queue))
    assert seen == [
        [],
        [1, 2],
        [1, 2, 3, 4],
        [6, 2, 3, 4, 5],  # 6 took the place of the oldest
        [6, 7, 8, 4, 5],
        [6, 7, 8, 9, 10],
        [11, 7, 8, 9, 10],
    ]
    assert int(queue.pushed) == 11


def test_of_too_many_the_last_remain() -> None:
    queue = FeatureQueue(3, 2)
    queue.push(*rows(1))
    queue.push(*rows(2, 3, 4, 5))
    assert sorted(inside(queue)) == [3, 4, 5]
    queue.push(*rows(6))
    assert sorted(inside(queue)) == [4, 5, 6]  # the oldest made room
    queue.push(*rows())
    assert sorted(inside(queue)) == [4, 5, 6]


def test_a_queue_of_no_size_stays_empty() -> None:
    queue = FeatureQueue(0, 2)
    queue.push(*rows(1, 2))
    features, image_id = queue.filled()
    assert features.shape == (0, 2) and image_id.shape == (0,)


def test_it_goes_on_from_its_state_and_takes_no_gradient() -> None:
    queue, again = FeatureQueue(5, 2), FeatureQueue(5, 2)
    features, image_id = rows(1, 2, 3, 4)
    queue.push(features.requires_grad_(), image_id)
    assert not queue.features.requires_grad
    again.load_state_dict(queue.state_dict())
    for one in (queue, again):
        one.push(*rows(5, 6))
        assert inside(one) == [6, 2, 3, 4, 5]
