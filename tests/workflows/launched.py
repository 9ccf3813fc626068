"""`vicvlm` in two processes, as a user starts them with `torchrun`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

HERE = Path(__file__).parent
PATIENCE = 300  # seconds


def environment(**more: str) -> dict[str, str]:
    """Of processes that find the package and the tests' modules, and train on the CPU."""
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **more,
    }


class Launch:
    """A launch under way. What it says goes to files: a pipe is open as long as anyone has it."""

    def __init__(self, *words: str, state: Path) -> None:
        self._out, self._said = state.with_suffix(".out"), state.with_suffix(".err")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        with self._out.open("w") as out, self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, *command, "-m", "vicvlm_cli", *words],
                env=environment(VICVLM_STATE=str(state)),
                stdout=out,
                stderr=said,
            )

    def ended(self) -> int:
        """The exit code, once it has one.

        A launcher whose processes have all ended may still hang as it ends itself, which is not
        this package's doing: it is killed then.
        """
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            if running := self._started():
                pytest.fail(f"{running} have not ended after {PATIENCE} s: {self.said}")
            self.kill()
            return self._process.returncode

    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, which: int) -> None:
        self._process.send_signal(which)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def said(self) -> str:
        return self._said.read_text()

    def kill(self) -> None:
        """End it, its processes and theirs; nothing where it has ended."""
        if not self.is_running():
            return
        started = self._started()
        self._process.kill()
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _started(self) -> list[psutil.Process]:
        """What runs of the launcher's processes and theirs, but for those whose parent is gone."""
        running = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    running.append(process)
        return running


@contextmanager
def launched(*words: str, state: Path) -> Iterator[Launch]:
    """`vicvlm WORDS` in two processes; what is left of them is killed as the block ends."""
    launch = Launch(*words, state=state)
    try:
        yield launch
    finally:
        launch.kill()
