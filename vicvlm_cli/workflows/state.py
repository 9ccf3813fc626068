"""Where a run stands, and what is written so that it can go on from there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vicvlm_cli.data.tokenizer import Tokenizer
from vicvlm_cli.errors import UserError


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


def save_run_state(
    accelerator: Accelerator, folder: Path, tokenizer: Tokenizer, description: dict[str, Any]
) -> None:
    """Write everything that resuming needs into ``folder``, whole or not at all."""
    beside, old = folder.with_name("state.new"), folder.with_name("state.old")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
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
    accelerator.wait_for_everyone()


def load_run_state(accelerator: Accelerator, folder: Path) -> None:
    """Put back what :func:`save_run_state` wrote, into what ``accelerator`` has prepared.

    Raises:
        UserError: the objective of then had other parameters.
    """
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder} holds other weights than this version trains, so that the run cannot go on: "
            "start a new one, or go on with the version that began it"
        ) from error


def find_run_state(run: Path) -> Path | None:
    """The folder of a run's saved state, or None; an interrupted save leaves the one before."""
    for name in ("state", "state.old"):
        if (run / name / "run.json").is_file():
            return run / name
    return None
