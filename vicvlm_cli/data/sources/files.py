"""Looking for raw files: in folders, and inside archives without unpacking them to disk."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vicvlm_cli.errors import UserError

PICTURES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
    )
)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_READ_THROUGH = 64 << 20  # a compressed tar above this is not read only to see what it holds
DAMAGE = (
    *(OSError, EOFError, zlib.error, lzma.LZMAError),
    *(zipfile.BadZipFile, tarfile.TarError),
)


def tidy(name: str) -> str:
    """File names compare in Unicode's composed form, with forward slashes."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def base(name: str) -> str:
    return tidy(name).rsplit("/", 1)[-1]


def escapes(name: str) -> bool:
    """May this member of an archive land outside its folder?"""
    return is_absolute(name) or ".." in tidy(name).split("/")


def is_absolute(name: str) -> bool:
    """/a.jpg, \\a.jpg, or C:a.jpg with a drive letter; 9:41.jpg is a file's name."""
    return re.match(r"/|[A-Za-z]:", tidy(name)) is not None


def is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PICTURES


def is_zip(path: Path) -> bool:
    return path.name.lower().endswith(".zip")


def is_compressed_tar(path: Path) -> bool:
    return path.name.lower().endswith(COMPRESSED_TARS)


def is_archive(path: Path) -> bool:
    return is_zip(path) or is_compressed_tar(path) or path.name.lower().endswith(".tar")


def walk(folder: Path, depth: int, unread: dict[Path, str]) -> list[Path]:
    """The files below `folder`, in order of name, hidden ones left out.

    A folder counts once, whatever links lead to it, and by its own name where that is below
    `folder` too: a link to a folder above would go round, one beside would double every picture.
    Of links to one folder the least deep counts, then the first by name. Folders that cannot be
    read, each with a warning that says so, are put into `unread`.
    """
    found: list[Path] = []
    seen: set[tuple[int, int] | str] = set()
    folders, links = deque([(folder, depth)]), deque[tuple[Path, int]]()
    while folders or links:
        place, depth = (folders or links).popleft()
        try:
            status = place.stat()
            key: tuple[int, int] | str = (status.st_dev, status.st_ino)
            if not status.st_ino:  # some file systems number nothing
                key = os.path.realpath(place)
            if key in seen:
                continue
            seen.add(key)
            entries = [
                (Path(entry.path), entry.is_symlink(), _is_folder(entry))
                for entry in sorted(os.scandir(place), key=lambda entry: entry.name)
                if not entry.name.startswith(".")
            ]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            unread[place] = _unreadable(place, error)
            continue
        for path, linked, is_folder in entries:
            if not is_folder:
                found.append(path)
            elif depth > 0:
                (links if linked else folders).append((path, depth - 1))
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # isdir takes a link to itself, too; of what is no link, the entry knows without a look.
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def _unreadable(folder: Path, error: OSError) -> str:
    reason = error.strerror or error
    return f"cannot read the folder {folder} ({reason}): make it readable, or it is left out"


def look(
    directory: Path,
    source: str,
    folders: Iterable[str],
    hints: Iterable[str],
    warnings: list[str],
) -> list[Path]:
    """Files of a source: DIR/SOURCE and the known `folders` in DIR as trees, and DIR itself.

    Other data sets may lie in DIR, so of the archives there only those count whose name holds one
    of `hints`. Folders that cannot be read are told in `warnings`.
    """
    unread: dict[Path, str] = {}
    found = walk(directory / source, 3, unread)
    trees = {name.lower() for name in folders} - {source.lower()}
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        unread[directory] = _unreadable(directory, error)
        entries = []
    for entry in entries:
        name = entry.name.lower()
        if os.path.isdir(entry):
            if name in trees:
                found.extend(walk(entry, 2, unread))
        elif not is_archive(entry) or any(hint in name for hint in hints):
            found.append(entry)
    warnings.extend(unread.values())
    return found


def stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: name, size in bytes, time in nanoseconds."""
    try:
        status = path.stat()
    except OSError:  # a link to nowhere
        return (path.name, -1, -1)
    return (path.name, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class RawFile:
    """A file on disk or inside an archive."""

    path: Path
    member: str | None = None

    @property
    def name(self) -> str:
        return base(self.member if self.member is not None else self.path.name)

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}!{self.member}"

    def read(self) -> bytes:
        """Its bytes, unzipped where the name ends in .gz. Raises UserError if it is damaged."""
        try:
            content = self._read()
            return gzip.decompress(content) if self.name.lower().endswith(".gz") else content
        except (*DAMAGE, KeyError, RuntimeError) as error:  # RuntimeError: an encrypted zip
            raise UserError(f"cannot read {self} ({error}); fetch it again") from None

    def _read(self) -> bytes:
        if self.member is None:
            return self.path.read_bytes()
        if is_zip(self.path):
            with zipfile.ZipFile(self.path) as archive:
                return archive.read(self.member)
        with tarfile.open(self.path) as tar:
            member = tar.extractfile(self.member)
            if member is None:
                raise KeyError(self.member)
            return member.read()


def list_raw(files: Iterable[Path]) -> list[RawFile]:
    """What may hold captions: files on disk first, then members of archives."""
    files = list(files)
    found = [RawFile(path) for path in files if not is_picture(path.name)]
    for path in filter(is_archive, files):
        found += [RawFile(path, member) for member in _small_members(path)]
    return found


def select(files: Iterable[RawFile], pattern: str) -> list[RawFile]:
    """Files whose whole name matches, in any case, one file for each name."""
    found: dict[str, RawFile] = {}
    for file in files:
        if re.fullmatch(pattern, file.name, re.IGNORECASE):
            found.setdefault(file.name, file)
    return sorted(found.values(), key=lambda file: (len(file.name), file.name))


def is_long(archive: Path) -> bool:
    """Whether the names in it cost reading gigabytes. Raises OSError."""
    return is_compressed_tar(archive) and archive.stat().st_size > MAX_READ_THROUGH


def _small_members(archive: Path) -> list[str]:
    """Names in an archive, pictures left out; none where that would mean reading gigabytes."""
    try:
        if is_zip(archive):
            with zipfile.ZipFile(archive) as content:
                names = [info.filename for info in content.infolist() if not info.is_dir()]
        elif is_long(archive):
            return []
        else:
            with tarfile.open(archive) as tar:
                names = [member.name for member in tar if member.isfile()]
    except DAMAGE:
        return []  # the pictures' reader says so when it comes to it
    return [name for name in names if not is_picture(name) and not escapes(name)]
