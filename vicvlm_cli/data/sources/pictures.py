"""Streaming pictures out of folders and archives, each archive read once from front to back.

Nothing is unpacked to disk. A `.tar.gz` allows no cheap random access, so its order is the order.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from vicvlm_cli.data.images import BadImage, ImageSource
from vicvlm_cli.data.sources.files import (
    DAMAGE,
    base,
    escapes,
    is_archive,
    is_compressed_tar,
    is_long,
    is_picture,
    is_zip,
    tidy,
)
from vicvlm_cli.data.sources.listing import Item, Picture

MAX_BYTES = 256 << 20  # of one picture inside an archive
ESCAPES = "archive member outside the folder"


@dataclass(frozen=True)
class _Member:
    name: str
    size: int
    is_file: bool
    read: Callable[[], bytes]


def has_pictures(files: Iterable[Path]) -> bool:
    """Is there a picture, loose or in an archive?

    A compressed tar that would have to be read for gigabytes is believed to hold some, and so is a
    damaged archive, of which the user learns when it is read.
    """
    files = list(files)
    loose = any(is_picture(path.name) for path in files)
    return loose or any(_holds_pictures(path) for path in files if is_archive(path))


def _holds_pictures(archive: Path) -> bool:
    try:
        if is_long(archive):
            return True
        names = (base(member.name) for member in _members(archive))
        return any(is_picture(name) and not name.startswith(".") for name in names)
    except DAMAGE:
        return True


def stream_pictures(
    files: Iterable[Path],
    wanted: dict[str, Item],
    warnings: list[str],
    key: Callable[[str], str] = base,
) -> Iterator[tuple[Item, Picture]]:
    """The picture of every item in `wanted` (by `key` of its file name), as far as it is found.

    Loose files come first, in the order of `wanted`, then archives in the order of `files`, those
    with an index before compressed tars; reading ends with the last wanted picture. An archive
    member that is a link or would escape the folder is a bad picture. An archive that ends too
    soon is told in `warnings`.
    """
    wanted = dict(wanted)
    files = list(files)
    loose: dict[str, Path] = {}
    for path in files:
        if is_picture(path.name):
            loose.setdefault(key(path.name), path)
    for name in [name for name in wanted if name in loose]:
        path = loose[name].absolute()
        yield replace(wanted.pop(name), path=str(path)), path
    for archive in sorted(filter(is_archive, files), key=is_compressed_tar):
        if not wanted:
            return
        yield from _stream_archive(archive, wanted, warnings, key)


def _stream_archive(
    archive: Path, wanted: dict[str, Item], warnings: list[str], key: Callable[[str], str]
) -> Iterator[tuple[Item, Picture]]:
    count = 0
    try:
        for member in _members(archive):
            if escapes(member.name) and key(member.name) not in wanted:
                yield Item(member.name, "", (), f"{archive.name}!{member.name}"), _bad(ESCAPES)
            item = wanted.pop(key(member.name), None)
            if item is not None:
                count += 1
                yield replace(item, path=f"{archive.name}!{member.name}"), _content(member)
            if not wanted:
                return
    except DAMAGE as error:
        warnings.append(
            f"{archive} is damaged or cut short ({error or type(error).__name__}) after "
            f"{count:,} pictures; fetch it again"
        )


def _bad(reason: str) -> Callable[[], ImageSource]:
    def refuse() -> ImageSource:
        raise BadImage(reason)

    return refuse


def _content(member: _Member) -> Picture:
    if escapes(member.name):
        return _bad(ESCAPES)
    if not member.is_file:
        return _bad("link in an archive")
    if member.size > MAX_BYTES:
        return _bad("decompression bomb")
    try:
        return member.read()
    except (zipfile.BadZipFile, RuntimeError):  # the last: exotic compression, or a password
        return _bad("unreadable")


def _members(archive: Path) -> Iterator[_Member]:
    return _zip_members(archive) if is_zip(archive) else _tar_members(archive)


def _zip_members(archive: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            if not info.is_dir():
                link = (info.external_attr >> 16) & 0o170000 == 0o120000
                read = partial(content.read, info)
                yield _Member(tidy(_zip_name(info)), info.file_size, not link, read)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The member's name; many programs write UTF-8 without marking it as such."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _tar_members(archive: Path) -> Iterator[_Member]:
    # tarfile's own decompression takes a file that was cut short for a finished one.
    with (
        _decompressed(archive) as file,
        tarfile.open(fileobj=file, mode="r|", bufsize=1 << 16) as tar,
    ):
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or it keeps every header it has seen
            if not info.isdir():
                yield _Member(tidy(info.name), info.size, info.isreg(), partial(_read, tar, info))


def _decompressed(archive: Path) -> io.BufferedIOBase:
    with archive.open("rb") as file:
        magic = file.read(6)
    if magic.startswith(b"\x1f\x8b"):
        return gzip.open(archive, "rb")
    if magic.startswith(b"BZh"):
        return bz2.open(archive, "rb")
    if magic.startswith(b"\xfd7zXZ\0"):
        return lzma.open(archive, "rb")
    return archive.open("rb")


def _read(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(info)
    data = file.read() if file is not None else b""
    if len(data) < info.size:
        raise EOFError("unexpected end of the archive")
    return data
