"""`folder`: any folder of pictures with captions beside them.

Captions come from captions.jsonl/.csv/.tsv or Hugging Face's metadata.jsonl/.csv (anywhere in the
folder; file names count from where that file lies), or from a .txt beside each picture, a caption
a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from vicvlm_cli.data.sources.captions import (
    Captioned,
    read_jsonl,
    read_names,
    read_table,
    split_name,
)
from vicvlm_cli.data.sources.files import RawFile, escapes, is_picture, stamp, tidy, walk
from vicvlm_cli.data.sources.listing import (
    Item,
    Listing,
    NothingFound,
    Picture,
    Rejected,
    collect,
    digest_of,
    escaped,
    settle_split,
    total_of,
)
from vicvlm_cli.errors import UserError

DEPTH = 20
HOW = (
    "write captions.jsonl there, one line a picture: "
    '{"file_name": "dog.jpg", "captions": ["a dog on a beach"]}, or dog.txt beside dog.jpg'
)


def list_folder(directory: Path, *, seed: int, split_scheme: str | None) -> Listing:
    """Read the captions of a folder of pictures.

    The split is the one the captions give, or that of folders called train, val and test, or one
    by chance. Raises NothingFound: no pictures, or no captions; UserError: a damaged file, or
    names outside the folder alone.
    """
    prepared = directory / "prepared"
    unreadable: dict[Path, str] = {}
    files = {
        tidy(path.relative_to(directory).as_posix()): path
        for path in walk(directory, DEPTH, unreadable)
        if prepared not in path.parents
    }
    warnings = list(unreadable.values())
    pictures = [name for name in files if is_picture(name)]
    unread = "".join(f"; {warning}" for warning in warnings)
    if not pictures:
        raise NothingFound(
            f"there are no pictures in {directory}; put them there, and {HOW}{unread}"
        )
    entries, rejected = _entries(directory, files, pictures, warnings)
    if rejected and not entries:  # an older prepared data set does not stand for these
        names = list(dict.fromkeys(escaped(bad.image_id) for bad in rejected))
        raise UserError(
            f"all {len(names):,} names in the captions of {directory} are absolute or lead outside "
            f"the folder (the first is {names[0]}): name each picture as seen from the file with "
            "the captions, like sea/dog.jpg"
        )
    if not entries:
        raise NothingFound(
            f"the {len(pictures):,} pictures in {directory} have no captions; {HOW}{unread}"
        )

    listed = _listed(directory, files, {entry.image for entry in entries})
    said = {name: other for other, name in listed.items()}
    entries = [entry._replace(image=listed.get(entry.image, entry.image)) for entry in entries]
    items, bad = collect([(e.image, e.image, e.split, e.captions) for e in entries])
    by_folder = {  # the folders may be links, too: train to images/2017
        name: split_name(said.get(name, name).partition("/")[0])
        or split_name(name.partition("/")[0])
        for name in items
    }
    items, scheme, no_split = settle_split(
        items,
        {"given": None, "folders": by_folder},
        split_scheme,
        seed,
        f"the captions in {directory}",
    )
    rejected += bad + no_split
    if bare := len(set(pictures) - {entry.image for entry in entries}):
        warnings.append(f"{bare:,} pictures in {directory} have no caption and were left out")

    items = {
        name: Item(
            name, item.split, item.captions, str(files.get(name, directory / name).absolute())
        )
        for name, item in items.items()
    }

    def stream(done: set[str]) -> Iterator[tuple[Item, Picture]]:
        for name, item in items.items():
            if name not in done and name in files:
                yield item, files[name]

    stamps = [(name, *stamp(files[name])) for name in items if name in files]
    return Listing(
        source="folder",
        split_name=scheme,
        digest=digest_of([vars(item) for item in items.values()], stamps),
        total=total_of(items.values(), rejected),
        items=lambda: list(items.values()),
        stream=stream,
        rejected=rejected,
        warnings=warnings,
    )


def _listed(directory: Path, files: dict[str, Path], names: set[str]) -> dict[str, str]:
    """By which name in `files` a picture is listed that captions name through another link.

    `walk` lists a folder by one name only.
    """
    missing = names - files.keys()
    folders = {
        os.path.realpath(folder): tidy(folder.relative_to(directory).as_posix())
        for folder in {path.parent for path in files.values() if missing}
    }

    @cache
    def folder_of(above: str) -> str | None:
        try:
            return folders.get(os.path.realpath(directory / above))
        except ValueError:  # what no file can be called
            return None

    found = {}
    for name in sorted(missing):
        above, _, last = name.rpartition("/")
        folder = folder_of(above)
        listed = last if folder == "." else f"{folder}/{last}"
        if folder is not None and listed in files:
            found[name] = listed
    return found


def _entries(
    directory: Path, files: dict[str, Path], pictures: list[str], warnings: list[str]
) -> tuple[list[Captioned], list[Rejected]]:
    """The captions of all files that hold some, and names outside the folder."""
    tables = [
        path
        for path in files.values()
        if path.stem.lower() in ("captions", "metadata")
        and path.suffix.lower() in (".jsonl", ".csv", ".tsv")
    ]
    entries: list[Captioned] = []
    rejected: list[Rejected] = []
    for path in tables:
        reader = read_jsonl if path.suffix.lower() == ".jsonl" else read_table
        above = tidy(path.relative_to(directory).parent.as_posix())
        for entry in reader(RawFile(path), warnings):
            if escapes(entry.image):
                rejected.append(Rejected(entry.image, entry.split or "", "outside the folder"))
                continue
            name = tidy(entry.image).removeprefix("./")
            entries.append(entry._replace(image=name if above == "." else f"{above}/{name}"))
    if not tables:
        for name in pictures:
            beside = files.get(tidy(Path(name).with_suffix(".txt").as_posix()))
            if beside is not None:
                entries.append(Captioned(name, None, read_names(RawFile(beside))))
    return entries, rejected
