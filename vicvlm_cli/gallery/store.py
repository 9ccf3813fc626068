"""A gallery on disk: one directory that is written whole.

features.safetensors    features [n, P] float32, rows of unit length; off [n] float32
items.jsonl             a line a picture: path, id, captions, split, index, stamp
skipped.jsonl           a line a picture that could not be read: path, reason
gallery.json            format version, model (path, sha256), views, precision, where the pictures
                        lie, counts
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.data.prepared import PreparedDataset, Split
from vicvlm_cli.errors import UserError
from vicvlm_cli.gallery.items import GalleryItem, StoredItems, damaged, read_lines, write_lines
from vicvlm_cli.gallery.search import exact_top_k

if TYPE_CHECKING:
    from vicvlm_cli.inference import LoadedModel

FORMAT_VERSION = 2  # 2: items have stamps
HEADER = "gallery.json"
FILES = {HEADER, "features.safetensors", "items.jsonl", "skipped.jsonl"}
LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what looking into a folder leaves there


@dataclass
class Gallery:
    """Embedded pictures: features [n, P] float32 of unit length, and what each row is.

    `off` [n] is what the model's query bank takes off the cosines of each row, a hub or not, with
    words that look for it; None, as in older galleries, is nothing.
    `source` is the folder of pictures or the prepared data set (`prepared`) that they come from;
    `model_sha256` and `model_path` name the checkpoint that made the features, each the mean over
    the picture's `views`, computed in `precision`, as "float32" (None, as in older galleries, is
    unknown).
    """

    features: Tensor
    items: Sequence[GalleryItem]
    model_sha256: str
    model_path: str
    source: str
    prepared: bool = False
    skipped: list[tuple[str, str]] = field(default_factory=list)
    off: Tensor | None = None
    views: int | None = None
    precision: str | None = None
    _splits: dict[str, Split] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def search(
        self, features: Tensor, k: int = 10, *, of_words: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The k best pictures for each query: scores and row numbers, [Q, min(k, n)].

        `features` are [Q, P] (or [P] for one query) of unit length, by the model that made the
        gallery. Scores are cosines; where the query is `of_words`, less `off`. Raises UserError
        where they have another length P.
        """
        queries = features.reshape(-1, features.shape[-1]).float()
        if queries.shape[1] != self.features.shape[1]:
            raise UserError(
                f"the query has {queries.shape[1]} dimensions and the gallery "
                f"{self.features.shape[1]}: use the model that made it ({self.model_path})"
            )
        return exact_top_k(queries, self.features, k, self.off if of_words else None)

    def location(self, row: int) -> str:
        """Where a person finds the picture: its file, or where it came from when prepared."""
        path = self.items[row].path
        return path if self.prepared else str(Path(self.source) / path)

    def image(self, row: int, at_least: int | None = None) -> Image.Image:
        """The picture of a row, RGB; `at_least` as in `data.images.load_rgb`.

        Raises BadImage where its file is gone or damaged, UserError where the data set is.
        """
        item = self.items[row]
        if self.prepared:
            if item.split not in self._splits:
                self._splits[item.split] = PreparedDataset.open(self.source).split(item.split)
            split = self._splits[item.split]
            if split.image_ids[item.index : item.index + 1] != [item.id]:
                raise UserError(
                    f"{self.source} was prepared anew since this gallery was made: "
                    "run `vicvlm embed` again"
                )
            return split.image(item.index)
        return load_rgb(Path(self.source) / item.path, at_least=at_least)

    def save(self, path: str | Path) -> None:
        """Writes the gallery to the directory `path`, replacing a gallery that is there.

        Raises UserError where something else is there, in it too, or where it cannot be written.
        """
        path = Path(path)
        check_output(path)
        header = {
            "format_version": FORMAT_VERSION,
            "model": {"path": self.model_path, "sha256": self.model_sha256},
            "views": self.views,
            "precision": self.precision,
            "source": self.source,
            "prepared": self.prepared,
            "count": len(self.items),
            "dim": self.features.shape[1],
            "skipped": len(self.skipped),
        }
        path = path.resolve()
        beside, old = (path.with_name(f".{path.name}.{os.getpid()}.{x}") for x in ("new", "old"))
        try:
            shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
            beside.mkdir(parents=True)
            tensors = {"features": self.features.contiguous()}
            tensors |= {} if self.off is None else {"off": self.off.contiguous()}
            save_file(tensors, beside / "features.safetensors")
            write_lines(beside / "items.jsonl", (vars(item) for item in self.items))
            write_lines(
                beside / "skipped.jsonl", ({"path": p, "reason": r} for p, r in self.skipped)
            )
            (beside / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                os.replace(path, old)
            os.replace(beside, path)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            raise _unwritable(path, error) from error
        finally:
            if old.exists() and not path.exists():
                with suppress(OSError):
                    os.replace(old, path)
            shutil.rmtree(beside, ignore_errors=True)

    @classmethod
    def open(cls, path: str | Path, *, model: LoadedModel | None = None) -> Gallery:
        """Reads a gallery, to search with what `model` encodes, if one is given.

        Raises UserError: not a gallery, damaged, of a newer format, or made by another model.
        """
        path = Path(path)
        header = read_header(path)
        try:
            tensors = load_file(path / "features.safetensors")
            features, off = tensors["features"].float(), tensors.get("off")
            off = None if off is None else off.float()
            items = StoredItems(path, "items.jsonl")
            skipped = [(s["path"], s["reason"]) for s in read_lines(path / "skipped.jsonl")]
            gallery = cls(
                features=features,
                items=items,
                model_sha256=header["model"]["sha256"],
                model_path=header["model"]["path"],
                source=header["source"],
                prepared=header["prepared"],
                skipped=skipped,
                off=off,
                views=header.get("views"),
                precision=header.get("precision"),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            raise damaged(path) from None
        shape = (header.get("count"), header.get("dim"))
        if tuple(features.shape) != shape or len(items) != len(features):
            raise damaged(path)
        if off is not None and (off.shape != features.shape[:1] or not off.isfinite().all()):
            raise damaged(path)
        if model is not None:
            check_model(gallery, path, model)
        return gallery


def read_header(path: Path) -> dict[str, Any]:
    """A gallery's header. Raises UserError: not a gallery, damaged, or of a newer format."""
    try:
        header: dict[str, Any] = json.loads((path / HEADER).read_text(encoding="utf-8"))
        version = int(header["format_version"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is not a gallery (it has no {HEADER}); make one with `vicvlm embed`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise damaged(path) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, and this vicvlm reads up to {FORMAT_VERSION}: "
            "upgrade vicvlm, or run `vicvlm embed` again"
        )
    return header


def check_model(gallery: Gallery, path: Path, model: LoadedModel) -> None:
    """Raises UserError where another model than `model` made the gallery at `path`."""
    info = model.info
    if info.sha256 != gallery.model_sha256:
        raise UserError(
            f"the gallery {path} was made by another model ({gallery.model_sha256[:8]}, then at "
            f"{gallery.model_path}) than {info.path} ({info.sha256[:8]}): "
            "run `vicvlm embed` again with this one"
        )


def check_output(path: Path) -> None:
    """Makes the folder above `path`; raises UserError where no gallery can be written to `path`."""
    try:
        if os.path.ismount(path.resolve()):  # nothing can be renamed to it
            raise UserError(f"{path} is a mount point: choose a folder inside it")
        if path.exists() and not _is_replaceable(path):
            raise UserError(f"{path} exists and is not a gallery: choose another directory")
        if path.exists() and (others := {entry.name for entry in path.iterdir()} - FILES - LITTER):
            raise UserError(
                f"{path} holds {min(others)}, which is not the gallery's and would go with it: "
                "move it away, or choose another directory"
            )
        parent = path.resolve().parent
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def _is_replaceable(path: Path) -> bool:
    return path.is_dir() and (not any(path.iterdir()) or (path / HEADER).is_file())


def _unwritable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot write the gallery {path} ({error}): make room there, or choose another directory"
    )
