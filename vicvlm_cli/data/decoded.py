"""The decoded pictures of a split in one memory-mapped file, so that no epoch decodes them again.

The file stands beside the shards and is named by what decides its content: the data set's
fingerprint, the split's hash and the side in pixels. `vicvlm prepare` drops it with the shards.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.transforms import image_to_array
from vicvlm_cli.errors import UserError
from vicvlm_cli.report.progress import Progress

BLOCK = 256  # pictures in flight


def decode(split: Split, i: int, size: int) -> np.ndarray:
    """Picture ``i`` squashed to uint8 [3, size, size].

    Raises:
        UserError: the shards are damaged.
    """
    try:
        return image_to_array(split.image(i, at_least=size), size)
    except BadImage as error:
        raise UserError(
            f"image {split.image_ids[i]} of {split.title} is {error.reason}: "
            "the shards are damaged, run `vicvlm prepare` again"
        ) from None


class DecodedFile:
    """Pictures uint8 [n, 3, size, size] of a split; may be pickled and used after a fork."""

    def __init__(self, split: Split, size: int) -> None:
        self.shape = (len(split), 3, size, size)
        self.path = split.decoded_stem.with_name(f"{split.decoded_stem.name}-{size}.npy")

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "path": self.path}

    @cached_property
    def pixels(self) -> np.ndarray:
        """The whole file, read from disk as it is used."""
        return np.load(self.path, mmap_mode="r")

    def is_whole(self) -> bool:
        """Whether the file is there, of the right shape."""
        try:
            return self.pixels.shape == self.shape and self.pixels.dtype == np.uint8
        except (OSError, ValueError, EOFError):  # missing; truncated; empty
            return False


def make_decoded(split: Split, size: int, progress: Progress) -> DecodedFile:
    """The decoded pictures of ``split``, squashed to ``size``; written unless they are there.

    Raises:
        UserError: there is no room for the file, or it cannot be written.
    """
    file = DecodedFile(split, size)
    if file.is_whole():
        return file
    needed, free = int(np.prod(file.shape)), shutil.disk_usage(file.path.parent).free
    room = "make room there, or leave out --cache"
    if needed > free:
        raise UserError(
            f"the cache of {split.title} takes {needed / 1e9:.1f} GB and {file.path.parent} has "
            f"{free / 1e9:.1f} GB left: {room}"
        )
    progress.say(
        f"cache: decoding {len(split):,} pictures into {file.path} ({needed / 1e9:.1f} GB)"
    )
    beside = file.path.with_name(f"{file.path.name}.{os.getpid()}.tmp")
    try:
        _write(beside, split, file.shape, progress)
        os.replace(beside, file.path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write the cache {file.path}: {reason}; {room}") from None
    finally:
        beside.unlink(missing_ok=True)
    return DecodedFile(split, size)


def _write(path: Path, split: Split, shape: tuple[int, ...], progress: Progress) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        path.open("wb") as file,  # not through the map: a full disk would kill the process there
        ThreadPoolExecutor() as pool,
        progress.bar("decoding", len(split), "images") as bar,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(split), BLOCK):
            block = range(start, min(start + BLOCK, len(split)))
            for pixels in pool.map(lambda i: decode(split, i, shape[-1]), block):
                file.write(pixels.tobytes())
                bar.advance()
