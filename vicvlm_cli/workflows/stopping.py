"""Ctrl-C during a training, or a scheduler that wants the machine back."""

from __future__ import annotations

import signal
import threading

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtStep:
    """Turns either signal into a wish to stop at the end of a step, so that the state can be saved.

    Of several processes each is told by the launcher; the first one's ``asked`` decides.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {which: signal.signal(which, self._ask) for which in SIGNALS}

    def __exit__(self, *_: object) -> None:
        for which, handler in self._before.items():
            signal.signal(which, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:  # the second time is meant
            raise KeyboardInterrupt
        self.asked = True
