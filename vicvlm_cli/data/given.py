"""What Python code gives a model: pictures and texts in lists, so many at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from threading import Lock
from typing import TypeVar

from PIL import Image

from vicvlm_cli.data.images import ImageSource, load_rgb
from vicvlm_cli.errors import UsageError, UserError

T = TypeVar("T")


def listed(given: Iterable[T], name: str, kind: str) -> list[T]:
    """All that is given, as a list.

    Raises UserError for one `name` ("image") alone, where a list of `kind` ("pictures") is meant.
    """
    if isinstance(given, str | bytes | os.PathLike | Image.Image):
        raise UserError(f"{name}s must be a list of {kind}: write [{name}] for a single one")
    return list(given)


def check_batch_size(batch_size: int) -> None:
    """Raises UsageError where it is below 1."""
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, not {batch_size}")


def loader(sources: list[ImageSource], at_least: int) -> Callable[[ImageSource], Image.Image]:
    """`load_rgb` of the `sources`, for several threads."""
    # A PIL image decodes itself when first used, from the one file that it has, and may be given
    # several times.
    locks = {id(source): Lock() for source in sources if isinstance(source, Image.Image)}

    def load(source: ImageSource) -> Image.Image:
        with locks.get(id(source)) or nullcontext():
            return load_rgb(source, at_least=at_least)

    return load
