"""A gallery in the making, which keeps what is embedded and takes over what was before.

.GALLERY.partial/0f3a…/     a block of pictures that are embedded: a small gallery itself
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from uuid import uuid4

import torch
from torch import Tensor

from vicvlm_cli.errors import UserError
from vicvlm_cli.gallery.items import GalleryItem
from vicvlm_cli.gallery.store import Gallery
from vicvlm_cli.report.progress import Progress

# A block is written when it has so many pictures, or was begun so long ago.
BLOCK = 8192
SECONDS = 60.0


class Unfinished:
    """The gallery `whole`, whose features are filled in here until it is saved to `output`.

    A context: where it is left by an error, what is embedded is kept in blocks beside `output`;
    otherwise, once the gallery is saved, the blocks made in the same way of its splits are removed.

    Attributes:
        done: [n], the pictures whose features are there.
        had: [n], those that the gallery at `output` has already, whichever model made it.
        earlier: how many that gallery has of the same source.
        views: of each of them, None where that is unknown.
        dropped: the paths of those of them that are not in `whole`.
    """

    def __init__(self, whole: Gallery, output: Path, progress: Progress) -> None:
        """Takes over the features of pictures that are as they were when they were embedded."""
        self.whole = whole
        output = output.resolve()
        self.blocks = output.with_name(f".{output.name}.partial")
        self.done = torch.zeros(len(whole), dtype=torch.bool)
        self.had = torch.zeros(len(whole), dtype=torch.bool)
        self.earlier = 0
        self.views: int | None = None
        self.dropped: list[str] = []
        self._waiting: list[int] = []
        self._spent: list[Path] = []  # blocks that are of no use once `whole` is saved
        self._began = time.monotonic()
        rows = {
            (item.split, item.path, item.id): row  # an id alone is a.jpg's and a.png's
            for row, item in enumerate(whole.items)
        }
        splits = {item.split for item in whole.items}
        # No gallery is held on to: Windows replaces none whose files are open.
        if (earlier := _opened(output)) is not None and self._is_of_source(earlier):
            found, gone = self._take_over(earlier, rows, progress)
            self.had[found] = True
            self.dropped = [item.path for item in gone]
            self.earlier, self.views = len(earlier), earlier.views
        for path in sorted(self.blocks.glob("*")):
            earlier = _opened(path)
            if earlier is None:
                self._spent.append(path)
            elif self._is_of_source(earlier) and _made_by(earlier) == _made_by(whole):
                _, gone = self._take_over(earlier, rows, progress)
                # What is of another split, a call for that one goes on from.
                if {item.split for item in gone} <= splits:
                    self._spent.append(path)

    def left(self) -> list[int]:
        """The rows that are still to be embedded."""
        return (~self.done).nonzero()[:, 0].tolist()

    def add(self, rows: list[int], features: Tensor) -> None:
        """Fills in features [b, P]. Raises UserError where a block cannot be written."""
        self.whole.features[rows] = features
        self.done[rows] = True
        self._waiting += rows
        if len(self._waiting) >= BLOCK or time.monotonic() - self._began >= SECONDS:
            self._keep()

    def gallery(self) -> Gallery:
        """The pictures that are done."""
        return self.whole if self.done.all() else self._part(self.done.nonzero()[:, 0].tolist())

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            for path in self._spent:
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # others are there
                self.blocks.rmdir()
        else:
            self._keep()

    def _keep(self) -> None:
        if self._waiting:
            block = replace(self._part(self._waiting), off=None)
            path = self.blocks / uuid4().hex
            self._spent.append(path)
            try:
                block.save(path)
            except UserError:  # another call that is through may have removed the folder meanwhile
                block.save(path)
        self._waiting, self._began = [], time.monotonic()

    def _part(self, rows: list[int]) -> Gallery:
        whole = self.whole
        items = [whole.items[row] for row in rows]
        off = None if whole.off is None else whole.off[rows]
        return replace(whole, features=whole.features[rows], items=items, off=off)

    def _is_of_source(self, other: Gallery) -> bool:
        return (other.source, other.prepared) == (self.whole.source, self.whole.prepared)

    def _take_over(
        self, earlier: Gallery, rows: dict[tuple[str, str, str], int], progress: Progress
    ) -> tuple[list[int], list[GalleryItem]]:
        """The rows of pictures that `earlier` has, and those that have no row.

        Those that are the same still are done then.
        """
        whole = self.whole
        same = _made_by(earlier) == _made_by(whole)
        found: list[int] = []
        gone: list[GalleryItem] = []
        here, there = [], []
        items = progress.track(earlier.items, "comparing with what is embedded", unit="images")
        with suppress(UserError):  # a damaged line: what follows it is embedded again
            for number, item in enumerate(items):
                row = rows.get((item.split, item.path, item.id))
                if row is None:
                    gone.append(item)
                    continue
                found.append(row)
                now = whole.items[row]
                if same and item.stamp and (item.stamp, item.index) == (now.stamp, now.index):
                    here.append(row)
                    there.append(number)
        if here:  # a gallery of another model may be of another width
            whole.features[here] = earlier.features[there]
            if whole.off is not None and earlier.off is not None:
                whole.off[here] = earlier.off[there]
            self.done[here] = True
        return found, gone


def _made_by(gallery: Gallery) -> tuple[str, int | None, str | None]:
    return gallery.model_sha256, gallery.views, gallery.precision


def _opened(path: Path) -> Gallery | None:
    """The gallery there; one that is damaged is none, for it is made again."""
    try:
        return Gallery.open(path)
    except UserError:
        return None
