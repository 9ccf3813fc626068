"""Where a run stands, and what is written so that it can go on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import OwnError


@dataclass
class Position:
    """Where a run stands: what, with the weights, makes it go on as if it had never stopped."""

    step: int = 0
    seconds: float = 0.0
    preparing: float = 0.0  # of the seconds, those before the first step
    pairs: int = 0
    validation: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, Any] = field(default_factory=dict)
    best: float = -1.0
    thawed: float | None = None  # share of the run at which the frozen blocks began to train


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Around what writes to ``run``.

    Raises:
        OwnError: not all could be written; names the state that is kept, if there is one.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        step = kept_step(run)
        next_ = (
            "mend that, or choose another --output, and start again"
            if step is None
            else f"the state of step {step} is kept: mend that, then go on with --resume {run}"
        )
        raise OwnError(f"cannot write {run}: {reason}; {next_}") from error


def _reason(error: Exception) -> str | None:
    """Why a file was not written; None if ``error`` is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, SafetensorError):  # which has the system's number in its words alone
        code = re.search(r"(?:os error|code:) (\d+)", str(error))
        return os.strerror(int(code[1])) if code else str(error)
    # All that torch.save tells of a full disk is that its file is shorter than it should be.
    return "the disk is full, or took only a part" if "inline_container" in str(error) else None


def save_run_state(
    accelerator: Accelerator, folder: Path, tokenizer: Tokenizer, description: dict[str, Any]
) -> None:
    """Write everything that resuming needs into ``folder``, whole or not at all.

    Raises:
        OwnError: it cannot be written; the state before it is kept.
    """
    beside, old = folder.with_name("state.new"), folder.with_name("state.old")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        with writing(folder.parent):
            accelerator.save_state(str(beside))
            accelerator.wait_for_everyone()  # each process writes its own random state
            if accelerator.is_main_process:
                (beside / "tokenizer.json").write_text(tokenizer.to_json(), "utf-8")
                (beside / "run.json").write_text(json.dumps(description), "utf-8")
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    os.replace(folder, old)
                os.replace(beside, folder)
                shutil.rmtree(old, ignore_errors=True)
    finally:
        if accelerator.is_main_process:  # what a full disk took of it is room for what is kept
            shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()


def load_run_state(accelerator: Accelerator, folder: Path) -> None:
    """Put back what :func:`save_run_state` wrote, into what ``accelerator`` has prepared.

    Raises:
        OwnError: the objective of then had other parameters.
    """
    try:
        accelerator.load_state(str(folder))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise OwnError(
            f"{folder} holds other weights than this version trains, so that the run cannot go on: "
            "start a new one, or go on with the version that began it"
        ) from error


def find_run_state(run: Path) -> Path | None:
    """The folder of a run's saved state, or None; an interrupted save leaves the one before."""
    for name in ("state", "state.old"):
        if (run / name / "run.json").is_file():
            return run / name
    return None


def kept_step(run: Path) -> int | None:
    """The step of a run's saved state; None if it has none."""
    state = find_run_state(run)
    if state is None:
        return None
    step: int = json.loads((state / "run.json").read_text("utf-8"))["position"]["step"]
    return step
