"""The decoded pictures of a split in one memory-mapped file, so that no epoch decodes them again.

The file stands beside the shards and is named by what decides its content: the data set's
fingerprint, the split's hash and the side in pixels. `vicvlm prepare` drops it with the shards.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from vicvlm_cli.data.arrays import read_array, write_array
from vicvlm_cli.data.images import BadImage
from vicvlm_cli.data.prepared import Split
from vicvlm_cli.data.transforms import image_to_array
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
        raise split.damage(i, error.reason) from None


class DecodedFile:
    """Pictures uint8 [n, 3, size, size] of a split; may be pickled and used after a fork."""

    def __init__(self, split: Split, size: int) -> None:
        self.shape = (len(split), 3, size, size)
        self.path = split.decoded_stem.with_name(f"{split.decoded_stem.name}-{size}.npy")

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "path": self.path}

    @cached_property
    def pixels(self) -> np.ndarray:
        """The whole file, read from disk as it is used; only where it is whole."""
        pixels = self._read()
        assert pixels is not None
        return pixels

    def is_whole(self) -> bool:
        """Whether the file is there, of the right shape."""
        return self._read() is not None

    def _read(self) -> np.ndarray | None:
        return read_array(self.path, "|u1", self.shape)


def make_decoded(split: Split, size: int, progress: Progress) -> DecodedFile:
    """The decoded pictures of ``split``, squashed to ``size``; written unless they are there.

    Raises:
        UserError: there is no room for the file, or it cannot be written.
    """
    file = DecodedFile(split, size)
    if file.is_whole():
        return file
    progress.say(
        f"cache: decoding {len(split):,} pictures into {file.path} "
        f"({np.prod(file.shape) / 1e9:.1f} GB)"
    )
    write_array(
        file.path,
        "|u1",
        file.shape,
        _decoded(split, size, progress),
        what=f"the cache of {split.title}",
        otherwise="make room there, or leave out --cache",
    )
    return file


def _decoded(split: Split, size: int, progress: Progress) -> Iterator[bytes]:
    with ThreadPoolExecutor() as pool, progress.bar("decoding", len(split), "images") as bar:
        for start in range(0, len(split), BLOCK):
            block = range(start, min(start + BLOCK, len(split)))
            for pixels in pool.map(lambda i: decode(split, i, size), block):
                yield pixels.tobytes()
                bar.advance()
