"""When a training ends, and when each loss is on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import LOSSES, rows, run

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.workflows import loop
from vicvlm_cli.workflows.metrics import Metrics
from vicvlm_cli.workflows.session import Session

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_the_schedule_ends_with_the_time(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))  # every look at the clock finds it a second later
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    result = run(scenes, tmp_path / "run", "pretrain.epochs=1000", "pretrain.max_minutes=0.5")
    assert 5 < result.steps < 30
    assert 30 <= result.seconds < 40
    last = rows(result.run)[-1]
    assert last["progress"] == 1.0
    rates = [line["lr"] for line in rows(result.run)]
    assert rates[-1] == pytest.approx(0.05 * 2e-3)  # down to its end, not cut off
    assert load_model(result.checkpoint, device="cpu").info.objective == "vicvlm"


def test_the_cpu_clock_counts_the_training_alone(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10**6))
    clock = SimpleNamespace(process_time=lambda: float(next(ticks)))
    monkeypatch.setattr(loop, "time", clock)  # which has no other clock to look at

    def seconds(name: str, *overrides: str) -> float:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        limits = ("pretrain.clock=cpu", "pretrain.epochs=1000", "pretrain.max_minutes=0.1")
        return run(scenes, tmp_path / name, *limits, *overrides).seconds

    assert seconds("plain") == pytest.approx(6, abs=1)  # of two threads: twelve ticks or so
    real = Session.validate

    def validate(self: Session) -> None:
        for _ in range(100):
            next(ticks)
        real(self)

    monkeypatch.setattr(Session, "validate", validate)
    assert seconds("validated", "pretrain.validate_every=0.2") == pytest.approx(6, abs=1.5)
    assert rows(tmp_path / "validated", "validation")


def test_the_shortest_of_limits_counts(scenes: Path, tmp_path: Path) -> None:
    result = run(scenes, tmp_path / "run", "pretrain.epochs=0.5", "pretrain.max_minutes=60")
    assert result.steps == 3


def test_a_loss_every_third_step_is_logged_and_weighed_as_such(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    real = Metrics.add

    def add(self: Metrics, step: int, values: Any, trivial: Any) -> None:
        if "itm" in values:
            steps.append(step)
        real(self, step, values, trivial)

    monkeypatch.setattr(Metrics, "add", add)
    result = run(scenes, tmp_path / "run", "pretrain.losses.itm.every=3")
    assert steps == [1, 4, 7, 10]
    assert [line["weights"]["itm"] for line in rows(result.run)] == [0.5, 0.5]


def test_losses_come_in_on_schedule(scenes: Path, tmp_path: Path) -> None:
    result = run(
        scenes,
        tmp_path / "run",
        "pretrain.losses.itm.start=0.5",
        "pretrain.losses.mim.weight=0",
        "pretrain.validate_every=0.5",
        "pretrain.rerank_top_k=0",
    )
    lines = rows(result.run)
    assert [line["step"] for line in lines] == [3, 6, 9, 10, 12]
    assert [line["weights"]["itm"] for line in lines] == [0, 0, 0.5, 0.5, 0.5]
    assert ["itm" in line["losses"] for line in lines] == [False, False, True, True, True]
    assert {row.name for row in result.losses} == set(LOSSES) - {"mim"}
    assert result.rerank_weights == (0, 0)
