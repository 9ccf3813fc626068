"""Where the time of a few training steps went, and how that is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from vicvlm_cli.report.blocks import block, table, words


@dataclass(frozen=True)
class Cost:
    """What a part of the step, or an operator without those that it calls, costs a step.

    `calls` a step, of all recorded steps' mean, as the milliseconds are. `host_ms` passed on the
    host, `device_ms` on the GPU (None: there is none). `share` is from 0 to 1: a part's of the
    step's time on the host; an operator's of all operators', on the GPU if there is one.
    """

    name: str
    calls: float
    host_ms: float
    device_ms: float | None
    share: float


@dataclass(frozen=True)
class Profile:
    """A trace that was written, and the parts and the dearest operators of its steps."""

    path: Path
    steps: int
    step_ms: float
    parts: list[Cost]
    operators: list[Cost]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "path": str(self.path)}


def profile_blocks(profile: Profile) -> list[Group]:
    """The parts of a step in their order, and its dearest operators, dearest first."""
    lines = [
        f"{profile.steps:,} step{'s' * (profile.steps != 1)} of {profile.step_ms:,.1f} ms recorded "
        f"in {profile.path} (open it in https://ui.perfetto.dev or chrome://tracing)"
    ]
    return [
        block("Profile: parts of a step", _costs("part", profile.parts), []),
        block("Profile: dearest operators", _costs("operator", profile.operators), lines),
    ]


def _costs(first: str, rows: Iterable[Cost]) -> Table:
    rows = list(rows)
    on_device = any(row.device_ms is not None for row in rows)
    names = ("calls", "ms", "GPU ms", "share") if on_device else ("calls", "ms", "share")
    made = table(first, right=names)
    for row in rows:
        made.add_row(
            words(row.name),
            f"{row.calls:,.4g}",
            f"{row.host_ms:,.2f}",
            *([f"{row.device_ms or 0:,.2f}"] if on_device else []),
            f"{100 * row.share:.1f} %",
        )
    return made
