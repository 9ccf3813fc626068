"""The prepared data set: Arrow shards and a manifest. This is the only reader.

    DIR/manifest.json                      what it is; written last: where it is, all is there
    DIR/rejected.jsonl                     what was left out and why
    DIR/train/train-1a2b3c4d-00000.arrow   columns image_id, split, image, captions, path

The eight characters in a shard's name are the start of the manifest's fingerprint, so a data set
can be rebuilt beside the old shards; readers change over when the manifest is replaced.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.errors import UserError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.jsonl"


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set says about itself (dictionaries are keyed by split or reason)."""

    source: str
    split_name: str  # "karpathy", "entities", "random-hash-seed0", …
    partial: str  # "" or why: "test has 900 of 1,000 images; train is missing"
    image_side: int
    images: dict[str, int]
    captions: dict[str, int]
    size_bytes: dict[str, int]
    split_hash: dict[str, str]
    shards: dict[str, list[str]]  # paths relative to the data set
    rejected: dict[str, int] = field(default_factory=dict)  # pictures
    rejected_captions: dict[str, int] = field(default_factory=dict)  # of pictures that are kept
    vicvlm_version: str = ""
    fingerprint: str = ""
    format_version: int = FORMAT_VERSION

    def size_on_disk(self, path: Path, split: str) -> int:
        """Bytes of a split's shards below `path`. Raises OSError if one is gone."""
        return sum((path / file).stat().st_size for file in self.shards[split])

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read `path`/manifest.json.

        Raises UserError: not prepared, unreadable, damaged or not ours, or a newer format.
        """
        file = path / MANIFEST
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            version = int(content["format_version"])
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} is not a prepared data set (it has no {MANIFEST}); "
                f"make one with `vicvlm prepare SOURCE DIR`"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{file} is damaged or not a manifest of vicvlm: name another data set, or remove "
                "the file and run `vicvlm prepare` again"
            ) from None
        if version > FORMAT_VERSION:
            raise UserError(
                f"{path} has format {version}, made by vicvlm "
                f"{content.get('vicvlm_version', '?')}; this one reads up to format "
                f"{FORMAT_VERSION}: upgrade vicvlm"
            )
        known = {item.name for item in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in content.items() if key in known})
        except TypeError:
            raise UserError(f"{file} lacks entries; run `vicvlm prepare` again") from None


def is_prepared(path: str | Path) -> bool:
    """Whether `path` holds a prepared data set, and not just another program's manifest.json."""
    try:
        content = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    ours = isinstance(content, dict) and "format_version" in content
    return ours and isinstance(content.get("shards"), dict)


def split_hash(rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    """16 hex digits over the sorted (image_id, captions) of a split, whatever its order on disk."""
    content = sorted((image_id, sorted(captions)) for image_id, captions in rows)
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]


class PreparedDataset:
    """A prepared data set on disk."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> PreparedDataset:
        """Raises UserError if `path` is not a prepared data set or is in a newer format."""
        path = Path(path)
        return cls(path, Manifest.read(path))

    @property
    def splits(self) -> list[str]:
        return list(self.manifest.images)

    def split(self, name: str) -> Split:
        """Raises UserError: no such split, or its shards are gone or not as they were written."""
        if name not in self.manifest.images:
            raise UserError(
                f"{self.path} has no split '{name}'; it has {', '.join(self.splits)} "
                f"(choose one with --split)"
            )
        files = [self.path / shard for shard in self.manifest.shards[name]]
        for file in files:
            if not os.path.isfile(file):  # Path.is_file raises where one may not look
                raise UserError(f"{file} is gone; run `vicvlm prepare` again")
        size, written = self.manifest.size_on_disk(self.path, name), self.manifest.size_bytes[name]
        if size != written:
            raise UserError(
                f"the shards of {name} in {self.path} are damaged: they have {size:,} bytes, not "
                f"{written:,}; run `vicvlm prepare` again"
            )
        return Split(name, self.manifest, files)


class Split:
    """One split, memory-mapped. Safe to pickle and to use after a fork: files reopen lazily."""

    def __init__(self, name: str, manifest: Manifest, files: list[Path]) -> None:
        self.name = name
        self.hash = manifest.split_hash[name]
        self._manifest = manifest
        self._files = files

    def __getstate__(self) -> dict[str, Any]:
        opened = {"_shards", "_data", "_pictures", "captions", "image_ids", "paths"}
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def __len__(self) -> int:
        return self._manifest.images[self.name]

    @property
    def title(self) -> str:
        """'flickr30k test (karpathy, 1,000 images, 5,000 captions, hash 1a2b3c4d)'."""
        manifest = self._manifest
        facts = [
            manifest.split_name,
            f"{manifest.images[self.name]:,} images",
            f"{manifest.captions[self.name]:,} captions",
            f"hash {self.hash[:8]}",
        ]
        if manifest.partial:
            facts.append(f"partial: {manifest.partial}")
        return f"{manifest.source} {self.name} ({', '.join(facts)})"

    @cached_property
    def _shards(self) -> list[Any]:
        return [_open_shard(file) for file in self._files]

    @cached_property
    def _data(self) -> Any:
        import datasets

        whole = datasets.concatenate_datasets(self._shards)
        return whole.cast_column("image", datasets.Image(decode=False))

    @cached_property
    def _pictures(self) -> Any:
        return self._data.data.column("image")  # a tenth of the time that a row takes

    @cached_property
    def captions(self) -> list[list[str]]:
        """The captions of every image."""
        return self._data.data.column("captions").to_pylist()

    @cached_property
    def image_ids(self) -> list[str]:
        return self._data.data.column("image_id").to_pylist()

    @cached_property
    def paths(self) -> list[str]:
        """Where each image came from: a file, or 'archive.tar!member'."""
        return self._data.data.column("path").to_pylist()

    @property
    def decoded_stem(self) -> Path:
        """Where files derived from the pictures stand, named by all that decides their content."""
        folder = self._files[0].parent
        return folder / f"{self.name}-{self._manifest.fingerprint[:8]}-{self.hash[:8]}"

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        """Image `i`, decoded: RGB, with a short side of at most the manifest's `image_side`.

        `at_least` as in `images.load_rgb`.
        """
        return load_rgb(self._pictures[i]["bytes"].as_py(), at_least)

    def damage(self, i: int, reason: str) -> UserError:
        """What to tell the user of image `i` that cannot be decoded.

        Its shard has the right size, so `vicvlm prepare` makes it again only once it is gone.
        """
        ends = accumulate(map(len, self._shards))
        file = next(file for file, end in zip(self._files, ends, strict=True) if i < end)
        return UserError(
            f"image {self.image_ids[i]} of {self.title} is {reason}: the shards are damaged, "
            f"remove {file} and run `vicvlm prepare` again"
        )


def _open_shard(file: Path) -> Any:
    import datasets
    import pyarrow

    try:
        return datasets.Dataset.from_file(str(file))
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException) as error:
        raise UserError(
            f"cannot read {file} ({error}): if it is damaged, remove it and run "
            "`vicvlm prepare` again"
        ) from None
