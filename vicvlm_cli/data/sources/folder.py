"""`folder`: any folder of pictures with captions beside them.

Captions come from captions.jsonl/.csv/.tsv or Hugging Face's metadata.jsonl/.csv (anywhere in the
folder; file names count from where that file lies), or from a .txt beside each picture, a caption
a line.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from vicvlm_cli.data.sources.caption_tables import read_table
from vicvlm_cli.data.sources.captions import (
    Captioned,
    known_splits,
    read_jsonl,
    read_names,
    split_name,
)
from vicvlm_cli.data.sources.files import RawFile, is_absolute, is_picture, stamp, tidy, walk
from vicvlm_cli.data.sources.listing import (
    RANDOM,
    Item,
    Listing,
    NothingFound,
    Picture,
    Rejected,
    collect,
    digest_of,
    escaped,
    settle_split,
    tell_unknown,
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
    by chance. Raises NothingFound: no pictures, or no captions; UserError: a damaged file, names
    outside the folder alone, or unknown splits alone.
    """
    unreadable: dict[Path, str] = {}
    files = {  # of a prepared data set too, none of whose files is a picture or holds captions
        tidy(path.relative_to(directory).as_posix()): path
        for path in walk(directory, DEPTH, unreadable)
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
    entries, again = _once(entries)
    if again:
        warnings.append(
            f"{again:,} captions in {directory} are there again, in the same words for the same "
            "picture, and count once"
        )
    entries, unknown = known_splits(entries)
    items, bad = collect([(e.image, e.image, e.split, e.captions) for e in entries])
    by_folder, clear = _by_folder(items, said)
    folders = by_folder if clear or split_scheme == "folders" else {}
    where = f"the captions in {directory}"
    items, scheme, no_split = settle_split(
        items, {"given": None, "folders": folders}, split_scheme, seed, where
    )
    tell_unknown(unknown, scheme, split_scheme, where, warnings)
    named = sorted({split for split in by_folder.values() if split})
    if len(named) > 1 and split_scheme is None and scheme.startswith(RANDOM):
        inside = sum(map(bool, by_folder.values()))
        warnings.append(
            f"{inside:,} of {len(by_folder):,} pictures in {directory} lie in folders named by a "
            f"split ({', '.join(named)}) and the others do not, so the split is by chance: "
            "--split-scheme folders goes by the folders, without the others"
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


def _once(entries: list[Captioned]) -> tuple[list[Captioned], int]:
    """Entries without captions that their picture has already, and how many these were.

    The same data may lie there twice, as a table and as JSON. A picture whose split one place tells
    has it in all others that tell none.
    """
    split_of = {entry.image: entry.split for entry in reversed(entries) if entry.split}
    seen: set[tuple[str, str | None, str]] = set()
    kept, again = [], 0
    for entry in entries:
        split = entry.split or split_of.get(entry.image)
        captions = []
        for text in entry.captions:
            key = (entry.image, split, " ".join(text.split()))
            if key[2] and key in seen:
                again += 1
            else:
                seen.add(key)
                captions.append(text)
        kept.append(Captioned(entry.image, split, captions))
    return kept, again


def _by_folder(names: Iterable[str], said: dict[str, str]) -> tuple[dict[str, str | None], bool]:
    """The split that a folder of each picture names, and whether that is surely meant.

    It is where two folders of DIR itself are called by splits, or every picture lies in one that
    is: in a tree without splits, a folder `train` may show trains.
    """
    split_of: dict[str, str | None] = {}
    top = set()
    for name in names:
        paths = (said.get(name, name), name)  # the folders may be links, too: train to images/2017
        splits = [[split_name(part) for part in path.split("/")[:-1]] for path in paths]
        split_of[name] = next((split for path in splits for split in path if split), None)
        top |= {split for path in splits for split in path[:1] if split}
    return split_of, len(top) > 1 or all(split_of.values())


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
            name = posixpath.normpath(f"{above}/{tidy(entry.image)}")
            if is_absolute(entry.image) or name.split("/")[0] == "..":
                rejected.append(Rejected(entry.image, entry.split or "", "outside the folder"))
            else:
                entries.append(entry._replace(image=name))
    if not tables:
        for name in pictures:
            beside = files.get(tidy(Path(name).with_suffix(".txt").as_posix()))
            if beside is not None:
                entries.append(Captioned(name, None, read_names(RawFile(beside))))
    return entries, rejected
