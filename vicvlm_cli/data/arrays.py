"""Arrays too large for memory: files that appear whole or not at all, and are mapped to be read."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vicvlm_cli.errors import UserError


def read_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The array of a file, read from disk as it is used; None if there is no such whole file."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # missing; truncated; empty
        return None
    return array if array.shape == shape and array.dtype == np.dtype(dtype) else None


def write_array(
    path: Path,
    dtype: str,
    shape: tuple[int, ...],
    parts: Iterable[bytes],
    *,
    what: str,
    otherwise: str,
) -> None:
    """Write an array as ``.npy`` from the bytes of its consecutive ``parts``.

    Args:
        what: the array is, for messages.
        otherwise: what to do about a disk that is full.

    Raises:
        UserError: there is no room for the file, or it cannot be written.
    """
    _drop_left_over(path)
    needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(
            f"{what} takes {needed / 1e9:.1f} GB and {path.parent} has {free / 1e9:.1f} GB left: "
            f"{otherwise}"
        )
    # The machine's name too: processes of several may write beside each other on a shared disk.
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    try:
        with beside.open("wb") as file:  # not through a map: a full disk kills the process there
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(part)
        os.replace(beside, path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {what} to {path}: {reason}; {otherwise}") from None
    finally:
        beside.unlink(missing_ok=True)


def _drop_left_over(path: Path) -> None:
    """Give back the room of what killed processes of this machine had written of `path`."""
    name = rf"{re.escape(path.name)}\.(?:{re.escape(socket.gethostname())}\.)?(\d+)\.tmp"
    for file in path.parent.glob(f"{path.name}.*.tmp"):
        if (ours := re.fullmatch(name, file.name)) and not _other_runs(int(ours[1])):
            file.unlink(missing_ok=True)


def _other_runs(process: int) -> bool:
    """Whether there is such a process beside this one; yes where that cannot be told."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # where os.kill has no signal that only asks
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        pass
    return True
