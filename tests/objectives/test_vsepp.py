"""When the hardest negatives count alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_objectives import make


def test_the_hardest_negatives_alone_come_later() -> None:
    objective: Any = make("vsepp", {"mean_steps": 2, "margin": 0.2})
    # Of one negative each way the hardest costs 0.1, of the other it does not break the margin.
    similarity = torch.tensor([[0.9, 0.8, 0.0], [0.8, 0.9, 0.0], [0.0, 0.0, 0.9]])
    seen = []
    for _ in range(3):
        seen.append(float(objective.hinge(similarity, torch.arange(3))[0]))
        objective.after_step()
    assert seen == pytest.approx([0.2, 0.2, 0.4 / 3])


@pytest.mark.parametrize("steps", [0, 5])
def test_hardest_negatives_worse_than_one_point_for_all_do_not_count_alone(steps: int) -> None:
    objective: Any = make("vsepp", {"mean_steps": 2, "margin": 0.2})
    objective.steps += steps
    similarity = torch.tensor([[0.3, 0.9, 0.2], [0.9, 0.3, 0.2], [0.2, 0.2, 0.3]])
    # Each way 0.8, 0.1; 0.8, 0.1; 0.1, 0.1 break the margin.
    assert float(objective.hinge(similarity, torch.arange(3))[0]) == pytest.approx(2 * 2.0 / 6)
    always: Any = make("vsepp", {"mean_steps": 0, "margin": 0.2})
    assert float(always.hinge(similarity, torch.arange(3))[0]) == pytest.approx(2 * 1.7 / 3)
