"""A row of a benchmark: a figure, what it is compared with, and the bar it should reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """``value`` and ``against`` in ``unit``, both of the same run; ``ratio`` is the first by the
    second.

    ``bar`` is what the ratio should be, as ">= 2.0" or "<= 0.5" (empty: none is set); ``spread``
    the lowest and highest ratio over the repeats.
    """

    name: str
    value: float
    against: float
    unit: str = ""
    bar: str = ""
    note: str = ""
    spread: tuple[float, float] | None = None
    ratio: float = field(init=False)
    passed: bool | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.value / self.against if self.against else 0.0)
        object.__setattr__(self, "passed", self._passed())

    def _passed(self) -> bool | None:
        if not self.bar:
            return None
        sign, number = self.bar.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)


def alternate(
    contestants: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns, so that a busy spell meets them all."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warmup, repeats):
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> tuple[float, tuple[float, float]]:
    """Median of the turn-by-turn ratios a / b, and their range."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return statistics.median(ratios), (min(ratios), max(ratios))
