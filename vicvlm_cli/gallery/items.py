"""What the rows of a gallery are: a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from vicvlm_cli.errors import UserError


@dataclass(frozen=True)
class GalleryItem:
    """One picture: its path below the source, an id, its captions, and its place in a split.

    `stamp` changes when the picture does: its file's size and time, or what its data set was
    prepared from. Empty, as in older galleries, is unknown.
    """

    path: str
    id: str
    captions: list[str] = field(default_factory=list)
    split: str = ""
    index: int = 0
    stamp: str = ""


class StoredItems(Sequence[GalleryItem]):
    """The items of a gallery on disk, each parsed when it is asked for: a search needs few of many.

    Raises UserError where a line is damaged, once that one is asked for.
    """

    def __init__(self, gallery: Path, name: str) -> None:
        self._gallery = gallery
        self._lines = (gallery / name).read_bytes().splitlines()

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, index: int) -> GalleryItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[GalleryItem]: ...
    def __getitem__(self, index: int | slice) -> GalleryItem | list[GalleryItem]:
        if isinstance(index, slice):
            return [self._parsed(line) for line in self._lines[index]]
        return self._parsed(self._lines[index])

    def __iter__(self) -> Iterator[GalleryItem]:
        return map(self._parsed, self._lines)

    def _parsed(self, line: bytes) -> GalleryItem:
        try:
            return GalleryItem(**json.loads(line.decode("utf-8", "surrogateescape")))
        except (ValueError, TypeError):
            raise damaged(self._gallery) from None


def damaged(gallery: Path) -> UserError:
    """What to raise where a gallery does not hold what its header promises."""
    return UserError(f"the gallery {gallery} is damaged: run `vicvlm embed` again")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A line of JSON a row."""
    # File names need not be UTF-8: their stray bytes go through unchanged.
    with path.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What `write_lines` wrote."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return [json.loads(line) for line in file]
