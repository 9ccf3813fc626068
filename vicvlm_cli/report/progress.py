"""Progress bars and notes on stderr, so that stdout stays free for tables and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

T = TypeVar("T")


class RateColumn(ProgressColumn):
    """Items a second, with as many digits as a slow or a fast loop needs."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        number = f"{speed:,.0f}" if speed >= 10 else f"{speed:.2g}"
        return Text(f"{number} {task.fields['unit']}/s", style="progress.data.speed")


class Bar:
    """One running bar; does nothing when bars are off."""

    def __init__(self, live: RichProgress | None, task: TaskID | None):
        self._live, self._task = live, task

    def advance(self, n: int = 1) -> None:
        """Counts `n` more items as done."""
        if self._live is not None and self._task is not None:
            self._live.advance(self._task, n)

    def describe(self, text: str) -> None:
        """Replaces the words before the bar."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=text)


class Progress:
    """Bars with rate and ETA on stderr when it is a terminal; notes there unless quiet.

    `enabled` forces bars on or off (None: is stderr a terminal?). `quiet` silences both.
    Bars may be nested: all of them share one live display.
    """

    def __init__(self, enabled: bool | None = None, quiet: bool = False):
        self.quiet = quiet
        self.enabled = not quiet and (sys.stderr.isatty() if enabled is None else enabled)
        self.console = Console(stderr=True, highlight=False)
        self._live: RichProgress | None = None
        self._open = 0

    @contextmanager
    def bar(self, description: str, total: int | None = None, unit: str = "items") -> Iterator[Bar]:
        """A bar to advance by hand; gone from the screen when the block ends."""
        if not self.enabled:
            yield Bar(None, None)
            return
        if self._live is None:
            self._live = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                RateColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._live.start()
        live = self._live
        task = live.add_task(description, total=total, unit=unit)
        self._open += 1
        try:
            yield Bar(live, task)
        finally:
            live.remove_task(task)
            self._open -= 1
            if self._open == 0:
                live.stop()
                self._live = None

    def track(
        self,
        iterable: Iterable[T],
        description: str,
        total: int | None = None,
        unit: str = "items",
    ) -> Iterator[T]:
        """Yields the items of `iterable` under a bar (total: its length, if it has one)."""
        if total is None:
            total = len(iterable) if isinstance(iterable, Sized) else None
        with self.bar(description, total, unit) as bar:
            for item in iterable:
                yield item
                bar.advance()

    def say(self, message: str) -> None:
        """One line to stderr, above any running bar."""
        if not self.quiet:
            self.console.print(message, markup=False, soft_wrap=True)
