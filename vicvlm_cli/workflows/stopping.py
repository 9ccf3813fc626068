"""Ctrl-C during a training, or a scheduler that wants the machine back."""

from __future__ import annotations

import signal
import threading
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds in which a signal that comes again is the same one: a scheduler tells all processes, and
# the launcher tells its own once more.
SAME = 2.0


class StopAtStep:
    """Makes either signal a wish to stop at the end of a step, where the state can be saved."""

    def __init__(self) -> None:
        self.asked = False
        self._since = 0.0

    def __enter__(self) -> None:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {which: signal.signal(which, self._ask) for which in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _ask(self, *_: object) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
        elif now - self._since > SAME:  # the second time is meant
            raise KeyboardInterrupt
