"""How long ITC alone takes on this machine, by two short trainings of it."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from recall_rows import AT_ONCE
from trainings import vicvlm  # beside this file

PAIRS = 88_000
FROZEN_PAIRS = 6 * 31 * 192  # of them: the preset's six epochs of a text side that learns first


class Pace(NamedTuple):
    """Of a training: seconds before the first step, and seconds a pair."""

    before: float
    a_pair: float


def minutes_of_itc(words: tuple[str, ...], settings: tuple[str, ...], jobs: int) -> float:
    """CPU minutes for :data:`PAIRS`, the mean of ``jobs`` measurements side by side.

    ``words`` of `vicvlm pretrain` and ``settings`` are those of ITC alone.

    Raises:
        SystemExit: a training failed.
    """

    def one(folder: Path) -> float:
        folder.mkdir()
        resting = _pace(folder, "frozen", words, (*settings, *FROZEN))
        moving = _pace(folder, "thawed", words, (*settings, *THAWED))
        seconds = resting.before + FROZEN_PAIRS * resting.a_pair
        return (seconds + (PAIRS - FROZEN_PAIRS) * moving.a_pair) / 60

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(jobs) as pool:
        return mean(pool.map(one, [Path(place) / str(number) for number in range(jobs)]))


SHORT = (
    *("pretrain.max_minutes=0", "pretrain.clock=cpu", "model.eval_views=1"),
    *("pretrain.validate_every=9", "pretrain.validation_images=16"),
)
FROZEN = (*SHORT, "pretrain.epochs=1", "pretrain.frozen_epochs=0")  # for good
THAWED = (*SHORT, "pretrain.epochs=0.65", *AT_ONCE)


def _pace(folder: Path, name: str, words: tuple[str, ...], settings: tuple[str, ...]) -> Pace:
    """Of one training, between its first logged line and its last."""
    command = ["pretrain", *words, "--output", str(folder / name)]
    command += [word for setting in settings for word in ("--set", setting)]
    if vicvlm(command, folder, None)[0]:
        raise SystemExit((folder / "log.txt").read_text("utf-8"))
    lines = (folder / name / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    seconds, pairs = (rows[-1][key] - rows[0][key] for key in ("seconds", "pairs"))
    return Pace(rows[0]["seconds"] - rows[0]["pairs"] * seconds / pairs, seconds / pairs)
