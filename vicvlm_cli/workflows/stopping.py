"""Ctrl-C during a training."""

from __future__ import annotations

import signal
import threading


class StopAtStep:
    """Turns Ctrl-C into a wish to stop at the end of the step, so that the state can be saved.

    Only for a single process: several would each stop at a step of their own.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.asked = False

    def __enter__(self) -> None:
        if self.enabled:
            self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        if self.enabled:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:  # the second time is meant
            raise KeyboardInterrupt
        self.asked = True
