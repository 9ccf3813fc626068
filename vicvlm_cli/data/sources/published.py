"""What Flickr30k, Flickr8k and COCO have in common: known files, known splits, known counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vicvlm_cli.data.sources.captions import Captioned, known_splits, read_names, split_of_name
from vicvlm_cli.data.sources.files import RawFile, base, is_archive, list_raw, look, select, stamp
from vicvlm_cli.data.sources.listing import (
    Item,
    Listing,
    NothingFound,
    Picture,
    check_scheme,
    collect,
    digest_of,
    settle_split,
    tell_unknown,
    total_of,
)
from vicvlm_cli.data.sources.pictures import has_pictures, stream_pictures


@dataclass(frozen=True)
class CaptionFiles:
    """A kind of caption file; `scheme` names the split it brings along, if it brings one."""

    pattern: str  # of the whole file name
    reader: Callable[[RawFile], list[Captioned]]
    scheme: str | None = None
    parts: bool = False  # every matching file counts, not only the first


@dataclass(frozen=True)
class SplitLists:
    """Lists of file names, one for each split, whose names tell the split."""

    pattern: str
    scheme: str


@dataclass(frozen=True)
class PublishedData:
    """A published data set: how to know its files, which splits there are, where to get it."""

    name: str
    folders: tuple[str, ...]  # where people keep it below DIR
    hints: tuple[str, ...]  # parts of the names of its archives
    captions: tuple[CaptionFiles, ...]  # the best first
    counts: dict[str, dict[str, int]]  # images by scheme and split
    get: str  # which files, from whom
    split_lists: SplitLists | None = None
    key: Callable[[str], str] = base  # what identifies a picture in a file name


def find_published(
    data: PublishedData, directory: Path, *, seed: int, split_scheme: str | None
) -> Listing:
    """Look for the files of `data` in DIR and DIR/SOURCE and read the captions.

    Raises NothingFound (which files to get), UserError (damaged file), UsageError (no such split).
    """
    warnings: list[str] = []
    files = look(directory, data.name, data.folders, data.hints, warnings)
    raw = list_raw(files)
    captions: dict[str, Callable[[], list[Captioned]]] = {}
    for kind in data.captions:
        if found := select(raw, kind.pattern):
            chosen = found if kind.parts else found[:1]
            captions.setdefault(kind.scheme or "", _reading(kind, chosen))
    _check_found(data, directory, bool(captions), has_pictures(files), warnings)

    lists = select(raw, data.split_lists.pattern) if data.split_lists else []
    listed = [data.split_lists.scheme] if data.split_lists and lists else []
    own = [scheme for scheme in captions if scheme]
    where = f"the files of {data.name} in {directory}"
    check_scheme(split_scheme, [*own, *listed], where)
    # The captions that bring the wanted split along, or else the best there are.
    scheme = split_scheme if split_scheme in own else next(iter(captions))
    entries, unknown = known_splits(captions[scheme or ""]())
    items, rejected = collect(
        (data.key(entry.image), base(entry.image), entry.split, entry.captions) for entry in entries
    )
    schemes: dict[str, dict[str, str | None] | None] = {scheme: None} if scheme else {}
    schemes.update({name: _listed(items, lists) for name in listed})
    items, name, no_split = settle_split(items, schemes, split_scheme, seed, where)
    tell_unknown(unknown if scheme else [], name, split_scheme, where, warnings)
    if name not in listed:  # a list may leave pictures out
        rejected += no_split

    if split_scheme is None and name != "karpathy":
        warnings.append(_not_karpathy(data.name, name))
    pictures = [path for path in files if is_archive(path) or data.key(path.name) in items]

    def stream(done: set[str]) -> Iterator[tuple[Item, Picture]]:
        wanted = {name: item for name, item in items.items() if item.image_id not in done}
        return stream_pictures(pictures, wanted, warnings, data.key)

    return Listing(
        source=data.name,
        split_name=name,
        digest=digest_of([vars(item) for item in items.values()], sorted(map(stamp, pictures))),
        total=total_of(items.values(), rejected),
        items=lambda: list(items.values()),
        stream=stream,
        expected=data.counts.get(name),
        rejected=rejected,
        warnings=warnings,
    )


def _reading(kind: CaptionFiles, files: list[RawFile]) -> Callable[[], list[Captioned]]:
    return lambda: [entry for file in files for entry in kind.reader(file)]


def _check_found(
    data: PublishedData, directory: Path, captions: bool, pictures: bool, warnings: list[str]
) -> None:
    if captions and pictures:
        return
    what = "captions" if pictures else "pictures" if captions else "files"
    raise NothingFound(
        f"no {what} of {data.name} in {directory} or {directory / data.name}; {data.get} "
        f"Put them as they are into {directory / data.name} (there is no need to unpack them) "
        f"and run this again" + "".join(f"; {warning}" for warning in warnings)
    )


def _listed(items: dict[str, Item], lists: list[RawFile]) -> dict[str, str | None]:
    """The split of every item that a list names, with or without the ending of its file."""
    split_of = {
        _stem(name): split_of_name(file.name) for file in lists for name in read_names(file)
    }
    return {key: split_of.get(_stem(item.image_id)) for key, item in items.items()}


def _stem(name: str) -> str:
    return os.path.splitext(base(name))[0]


def _not_karpathy(data: str, split: str) -> str:
    return (
        f"there is no Karpathy split file of {data} (dataset_{data}.json, as in "
        f"caption_datasets.zip), so the split is '{split}': its figures do not compare with "
        f"those on Karpathy's"
    )
