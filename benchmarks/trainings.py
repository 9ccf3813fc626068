"""Whole trainings as rows of a comparison: resumable, and cut into pieces of a few minutes.

A run is a `vicvlm pretrain`, perhaps a `finetune`, and an `evaluate`, in processes of their own, in
one folder. What has been done is not done again, and a piece that is over is stopped as by Ctrl-C,
so that the next one resumes it. Trainings are measured by their own CPU time, on one thread each
where memory has room for several of them: a run waits on a busy machine and is not charged for it,
though shared memory and caches may leave it some per cent fewer pairs. Of another kind of machine
it is another run: what one core does in a minute differs by twice and more.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANY_EPOCHS = 1000  # the time ends a run, not the epochs
EVERY_IMAGE = 10**6  # validate on all there are


@dataclass(frozen=True)
class Run:
    """One row: its settings (`--set`), its minutes of CPU time, and what it is measured on.

    ``tune`` is 0 where pretraining is all. The minutes are those of all ``threads`` together.
    """

    name: str
    seed: int
    data: Path
    minutes: float
    tune: float
    pretrain: tuple[str, ...] = ()
    finetune: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # further words for `vicvlm pretrain`
    split: str = "val"
    top_k: int = 32
    validate_every: float = 2.0  # epochs
    threads: int = 1
    all_pairs: bool = False  # score them all at the end, not those of a shortlist

    @property
    def key(self) -> str:
        """Name of its folder and its file."""
        return f"{self.name}-{self.seed}"


class Unfinished(Exception):
    """The piece was over before the run was: the same call goes on from here."""


def advance(run: Run, work: Path, until: float, results: Path) -> dict[str, Any]:
    """Bring ``run`` to its end, or as far as ``until`` (of ``time.monotonic``) allows.

    Args:
        work: folder of checkpoints and states.
        results: folder of finished rows, small files to be kept.

    Returns:
        The row, which is also in ``results/KEY.json``.

    Raises:
        Unfinished: there is more to do.
        SystemExit: a command failed.
    """
    file = results / f"{run.key}.json"
    if file.exists():
        row: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return row
    folder = work / run.key
    folder.mkdir(parents=True, exist_ok=True)
    words = ["pretrain", "--data", str(run.data), *run.options]
    first = _train(run, folder / "pre", words, "pretrain", run.minutes, run.pretrain, until)
    last, second = folder / "pre", None
    if run.tune:
        last = folder / "fine"
        words = ["finetune", str(folder / "pre"), "--data", str(run.data)]
        second = _train(run, last, words, "finetune", run.tune, run.finetune, until)
    if time.monotonic() > until:
        raise Unfinished
    row = {
        "name": run.name,
        "seed": run.seed,
        "pretrain": first,
        "finetune": second,
        "evaluate": _measured(run, second or first, last, folder),
    }
    results.mkdir(parents=True, exist_ok=True)
    row = portable(row, run, folder)
    write_whole(file, row)
    return row


def _measured(run: Run, trained: dict[str, Any], checkpoint: Path, folder: Path) -> dict[str, Any]:
    """The tables of `vicvlm evaluate`; a training whose validation they are of ends with them.

    Not where pairs alone are scored: then it ends with its last validation, of another shortlist.
    """
    best: dict[str, Any] = trained.get("best") or {}
    alone = (best.get("pair_score") or {}).get("alone")  # two encoders score no pairs
    if run.split == "val" and best.get("top_k") == 0 and not alone:
        from vicvlm_cli.device import best_device, supports_bf16

        half = supports_bf16(best_device())
        return best | {"precision": "bfloat16" if half else "float32"}
    words = ["evaluate", str(checkpoint), "--data", str(run.data), "--split", run.split]
    words += ["--all-pairs"] if run.all_pairs else ["--top-k", str(run.top_k)]
    code, text, peak = vicvlm([*words, "--json"], folder, None, run.threads)
    if code:
        raise SystemExit(f"{run.key} failed; {folder / 'log.txt'} says why")
    tables: dict[str, Any] = json.loads(text)
    return tables | {"peak_mb": peak}


def portable(row: dict[str, Any], run: Run, folder: Path) -> dict[str, Any]:
    """``row`` without the places of this machine: what is kept is read on others."""
    places = {}
    for place, name in ((run.data, "DATA"), (folder, "RUN")):
        places |= {str(place.resolve()): name, str(place): name}
    for option, value in itertools.pairwise(run.options):
        if option == "--image-weights":
            places[value] = "FILE"
    for setting in run.pretrain:
        key, _, value = setting.partition("=")
        if key.endswith("_weights") and "/" in value:
            places[value.strip('"')] = "FILE"
    text = json.dumps(row)
    for place, name in places.items():
        text = text.replace(json.dumps(place)[1:-1], name)
    made: dict[str, Any] = json.loads(text)
    return made


def _train(
    run: Run,
    folder: Path,
    words: list[str],
    kind: str,
    minutes: float,
    settings: Sequence[str],
    until: float,
) -> dict[str, Any]:
    note = folder.with_suffix(".json")  # what a training's own result does not know
    known = {"peak_mb": 0, "command": "", "threads": run.threads}
    if note.exists():
        known = known | json.loads(note.read_text("utf-8"))
    if known["threads"] != run.threads:  # its minutes are those of as many
        raise SystemExit(f"{run.key} was begun with {known['threads']} threads: go on with as many")
    result = folder / "result.json"
    if not result.exists():
        wanted = [
            f"{kind}.seed={run.seed}",
            f"{kind}.epochs={MANY_EPOCHS}",
            f"{kind}.max_minutes={minutes / run.threads}",
            f"{kind}.validate_every={run.validate_every}",
            f"{kind}.validation_images={EVERY_IMAGE}",
            f"{kind}.clock=cpu",
            f"{kind}.state_minutes=3",  # a piece that is killed loses no more
            *settings,
        ]
        command = [*words, "--output", str(folder)]
        command += [word for setting in wanted for word in ("--set", setting)]
        known["command"] = shlex.join(["vicvlm", *command])
        if (folder / "state").exists() or (folder / "state.old").exists():
            command = [kind, "--data", str(run.data), "--resume", str(folder)]
        elif folder.exists():  # ended before there was anything to go on from
            for leftover in folder.iterdir():
                leftover.unlink()
        code, _, peak = vicvlm(command, folder.parent, until, run.threads)
        known["peak_mb"] = max(known["peak_mb"], peak)
        write_whole(note, known)
        if not result.exists():
            if code and time.monotonic() < until:
                raise SystemExit(f"{run.key} failed; {folder.parent / 'log.txt'} says why")
            raise Unfinished
    trained: dict[str, Any] = json.loads(result.read_text("utf-8"))
    trained["seconds"] *= run.threads  # of one core, as of every other row
    trained["pairs_per_second"] /= run.threads
    return trained | known | {"frozen_pairs": _frozen_pairs(folder)}


def _frozen_pairs(folder: Path) -> int:
    """Pairs seen while blocks were frozen, within ten steps."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    seen = (r["pairs"] for r in rows if r["kind"] == "train" and r.get("frozen_blocks"))
    return max(seen, default=0)


def vicvlm(
    words: list[str], folder: Path, until: float | None, threads: int = 1
) -> tuple[int, str, int]:
    """Exit code, what was printed, and the peak memory in MB; interrupted at ``until``."""
    # A benchmark leaves alone what the user's own commands remember.
    with tempfile.TemporaryDirectory() as state, open(folder / "log.txt", "a") as log:
        environment = {
            **os.environ,
            "VICVLM_STATE": str(Path(state) / "state.json"),
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "vicvlm_cli", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        pidfd = os.pidfd_open(process.pid)
        if until is not None:
            left = min(max(0.0, until - time.monotonic()), 10**6)
            if not _ended(pidfd, left):
                process.send_signal(signal.SIGINT)
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        os.close(pidfd)
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, text, round(usage.ru_maxrss / 1024)


def _ended(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


def write_whole(path: Path, row: dict[str, Any]) -> None:
    """A JSON file that appears whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(row, indent=1) + "\n", "utf-8")
    os.replace(beside, path)
