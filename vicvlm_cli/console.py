"""How a command speaks and fails.

Tables and JSON go to stdout; notes, bars and errors to stderr. In a distributed launch only rank 0
speaks, and any other of what it alone has met. A user's mistake is one sentence and an exit code,
never a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperGroup

from vicvlm_cli import remembered
from vicvlm_cli.errors import OwnError, UsageError, UserError

if TYPE_CHECKING:
    from vicvlm_cli.report.progress import Progress

RANK = int(os.environ.get("RANK") or 0)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or RANK)
# Seconds in which the process that tells of an error gets to: as soon as one ends, the launcher
# ends the others.
PATIENCE = 3.0
GONE = ("by peer", "remote process exited")  # what gloo and NCCL say when another process has ended


class Commands(TyperGroup):
    """The one place where a user's mistake becomes a sentence on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            tells = _tells(error)
            if not tells:
                time.sleep(PATIENCE)
            _fail(f"error: {error}", error.exit_code, tells)
        except KeyboardInterrupt:
            _fail("stopped; what was finished before is kept", 130, RANK == 0)
        except Exception as error:
            torch = sys.modules.get("torch")  # --help does without
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            command = self.commands[str(ctx.invoked_subcommand)]
            smaller = any(parameter.name == "batch_size" for parameter in command.params)
            lower = "lower --batch-size, or " * smaller
            _fail(f"error: out of memory: {lower}end what else fills the device", 1)


def _tells(error: UserError) -> bool:
    """Whether this process says what it met: of what all meet alike, the first does.

    The first of each machine, unless it is about the command line: a machine may lack a file.
    """
    if RANK == 0 or isinstance(error, OwnError):
        return True
    return LOCAL_RANK == 0 and not isinstance(error, UsageError)


def tell(message: str) -> None:
    """One line to stderr, which says what process of a launch it is from unless that is rank 0."""
    typer.echo(f"process {RANK}: {message}" if RANK > 0 else message, err=True)


def tell_unexpected(error: Exception) -> None:
    """What an error that no one foresaw is: a bug, if it is this program's.

    That another process of the launch has ended is no bug of this one, nor is a file that cannot be
    read or written.
    """
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if several and any(words in str(error) for words in GONE):
        tell("error: another process of the launch has ended, see what it says")
    elif isinstance(error, OSError) and error.filename is not None:
        tell(f"error: cannot read or write {error.filename}: {error.strerror or error}")
    else:
        tell(f"unexpected {type(error).__name__}: {error}")
        tell("this is a bug; VICVLM_DEBUG=1 shows where it happened")


def _fail(message: str, code: int, tells: bool = True) -> NoReturn:
    if tells:
        tell(message)
    raise typer.Exit(code)


def make_progress() -> Progress:
    """Bars and notes on stderr, from rank 0 only."""
    from vicvlm_cli.report.progress import Progress

    return Progress(quiet=RANK > 0)


def default(kind: str, given: Path | None, option: str, progress: Progress) -> Path:
    """`given`, or else what is remembered of this kind, with a note that says so.

    Raises:
        UserError: nothing is remembered, or it is gone; the message names `option`.
    """
    if given is not None:
        return given
    path = remembered.recall(kind, option)
    how = {"data": "prepared", "checkpoint": "trained or evaluated", "gallery": "embedded"}[kind]
    progress.say(f"{kind}: {path} (last {how}; {option} to change)")
    return path


def remember(kind: str, path: Path, progress: Progress) -> None:
    """Make `path` the default of its kind for the commands that follow."""
    if RANK == 0 and not remembered.remember(kind, path):
        file = remembered.state_file()
        why = f"{file} cannot be written" if file else "neither HOME nor VICVLM_STATE is set"
        progress.say(f"note: {why}, so {kind} has no default")


def call(workflow: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Run a workflow with stdout kept clean: what a library prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        return workflow(*args, **options)


def show(result: Any, as_json: bool, tables: Callable[[Any], Iterable[Any]]) -> None:
    """Print a workflow's result, as one JSON document or as Rich tables."""
    if RANK > 0:
        return
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables(result):
        console.print(table)
