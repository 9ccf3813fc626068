"""Arrays appear whole or not at all, and what killed processes left of them goes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vicvlm_cli.data.arrays import read_array, write_array


def test_what_a_killed_process_left_goes_before_the_room_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    path, here = tmp_path / "x.npy", socket.gethostname()
    left = [f"x.npy.{here}.{ended.pid}.tmp", f"x.npy.{ended.pid}.tmp", f"x.npy.{os.getpid()}.tmp"]
    kept = [
        f"x.npy.{here}.{os.getppid()}.tmp",  # it lives
        f"x.npy.another-{here}.{ended.pid}.tmp",  # it may live
        f"y.npy.{here}.{ended.pid}.tmp",
        "x.npy.mine.tmp",
    ]
    for name in left + kept:
        (tmp_path / name).write_bytes(bytes(100))
    usage = shutil.disk_usage(tmp_path)

    def free(place: Path) -> object:
        return usage._replace(free=500 - sum(file.stat().st_size for file in place.iterdir()))

    monkeypatch.setattr("shutil.disk_usage", free)
    write_array(path, "|u1", (50,), [bytes(range(50))], what="x", otherwise="make room")
    array = read_array(path, "|u1", (50,))
    assert array is not None and np.array_equal(array, np.arange(50))
    assert {file.name for file in tmp_path.iterdir()} == {"x.npy", *kept}
