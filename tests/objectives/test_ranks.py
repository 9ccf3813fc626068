"""One process alone: gathers are the plain thing and the noise is reproducible.

What two processes do is tested in workflows/test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch

from vicvlm_cli.objectives import ranks
from vicvlm_cli.objectives.ranks import Noise, gather, gather_padded, global_mean

CPU = torch.device("cpu")


def test_one_process_gathers_its_own() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert gather(x) is x and gather_padded(x) is x
    assert ranks.rank() == 0 and ranks.world_size() == 1


def test_the_global_mean_of_one_process() -> None:
    total = torch.tensor(6.0, requires_grad=True)
    mean = global_mean(total, 4)
    assert float(mean) == 1.5
    mean.backward()
    assert float(total.grad) == 0.25  # type: ignore[arg-type]
    assert float(global_mean(torch.tensor(0.0), 0)) == 0  # nothing was masked anywhere


def test_noise_depends_on_seed_and_step_alone() -> None:
    torch.manual_seed(1)
    first = Noise(3, 7, CPU)
    a, b = first.rand(4, 2), first.rand(5)
    assert a.shape == (4, 2) and b.shape == (5,)
    torch.manual_seed(2)
    again = Noise(3, 7, CPU)
    assert torch.equal(again.rand(4, 2), a) and torch.equal(again.rand(5), b)
    assert not torch.equal(Noise(3, 8, CPU).rand(4, 2), a)
    assert not torch.equal(Noise(4, 7, CPU).rand(4, 2), a)
    assert float(a.min()) >= 0 and float(a.max()) < 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_out_the_noise_of_one(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint = Noise(0, 0, CPU)
    whole = [joint.rand(6, 3), joint.rand(6)]
    monkeypatch.setattr(ranks, "world_size", lambda: processes)
    rows = 6 // processes
    parts = []
    for number in range(processes):
        monkeypatch.setattr(ranks, "rank", lambda number=number: number)
        noise = Noise(0, 0, CPU)
        parts.append([noise.rand(rows, 3), noise.rand(rows)])
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])
