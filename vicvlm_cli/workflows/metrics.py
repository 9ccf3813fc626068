"""What a training logs: a JSON line every few steps, and each loss beside its trivial value."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vicvlm_cli.errors import UserError
from vicvlm_cli.report.progress import Progress
from vicvlm_cli.workflows.state import kept_step

LOG_STEPS = 10  # steps between two log lines; a device is waited for only there


@dataclass
class LossRow:
    """One loss over a run: first and last logged means, and its trivial value at the end."""

    name: str
    weight: float
    first: float
    last: float
    trivial: float


class Metrics:
    """Collects losses on the device, reduces them over processes and writes ``metrics.jsonl``.

    ``history`` (first, last and trivial of each loss) is what a resumed run needs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        progress: Progress,
        history: dict[str, Any] | None = None,
    ) -> None:
        self.accelerator, self.path, self.progress = accelerator, path, progress
        self.history: dict[str, Any] = history or {}
        self._rows: list[tuple[int, dict[str, Tensor], dict[str, Tensor]]] = []
        self._warned = False

    def add(self, step: int, values: Mapping[str, Tensor], trivial: Mapping[str, Tensor]) -> None:
        """Keep one step's raw losses; nothing is copied from the device yet."""
        kept = [{k: v.detach() for k, v in d.items()} for d in (values, trivial)]
        self._rows.append((step, kept[0], kept[1]))

    def flush(self, **facts: Any) -> dict[str, float]:
        """Reduce what was kept and write one line with ``facts`` (step, lr, rate, weights).

        Returns:
            The mean of each loss since the last flush.

        Raises:
            UserError: a loss is not finite; the message names it and the step.
        """
        means: dict[str, float] = {}
        guesses: dict[str, float] = {}
        bad: list[tuple[int, str]] = []
        for name in sorted({k for _, values, _ in self._rows for k in values}):
            rows = [(s, v[name], t[name]) for s, v, t in self._rows if name in v]
            device = rows[0][1].device
            table = torch.stack([torch.stack([v, t.to(device)]).float() for _, v, t in rows])
            table = self.accelerator.reduce(table, reduction="mean").cpu()  # [steps, 2]
            finite = table[:, 0].isfinite().tolist()
            bad += [(rows[i][0], name) for i, good in enumerate(finite) if not good]
            means[name], guesses[name] = table.mean(dim=0).tolist()
            seen = self.history.setdefault(name, {"first": means[name], "recent": []})
            seen["recent"] = [*seen["recent"], [means[name], guesses[name]]][-5:]
        if bad:
            step, name = min(bad)
            kept = kept_step(self.path.parent)
            of_then = f"; the state of step {kept} is in {self.path.parent}"
            raise UserError(
                f"the loss {name} is not finite at step {step}: lower the learning rate or its "
                f"weight{'' if kept is None else of_then}"
            )
        self._rows.clear()
        self.write({"kind": "train", **facts, "losses": means, "trivial": guesses})
        return means

    def write(self, row: dict[str, Any]) -> None:
        """Append one JSON line and send its numbers to the tracker, if there is one.

        A line that cannot be written is a warning, once: a training is worth more.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            self._append(json.dumps(row).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                self.progress.say(
                    f"warning: {self.path} cannot be written: {error.strerror}; the run goes on, "
                    "and its log lacks lines"
                )
            self._warned = True
        flat = dict(_flatten(row))
        self.accelerator.log(flat, step=int(row["step"]))

    def _append(self, line: bytes) -> None:
        with open(self.path, "ab", buffering=0) as file:
            end = file.tell()
            if file.write(line) < len(line):  # no part of it stays, or the next would be spoiled
                file.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def summary(self, weights: Mapping[str, float]) -> list[LossRow]:
        """First, last and trivial value of every loss that was trained."""
        rows = []
        for name, weight in weights.items():
            if name not in self.history:
                continue
            recent = self.history[name]["recent"]
            last, trivial = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            rows.append(LossRow(name, weight, self.history[name]["first"], last, trivial))
        return rows


def summary_dicts(rows: list[LossRow]) -> list[dict[str, Any]]:
    """Loss rows as plain data."""
    return [asdict(row) for row in rows]


def _flatten(row: Mapping[str, Any], prefix: str = "") -> Any:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
