"""embed: pictures, from a folder or a prepared data set, into a gallery to search."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.data.prepared import MANIFEST, PreparedDataset
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.gallery.results import EmbedResult
from vicvlm_cli.gallery.store import Gallery, GalleryItem
from vicvlm_cli.inference import IMAGE_BATCH, encode_image_batches
from vicvlm_cli.report.progress import Progress

# Whatever else Pillow may read (PDF, EPS, ...) is hardly a picture of a collection.
# fmt: off
SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pgm", ".png",
    ".ppm", ".tif", ".tiff", ".webp",
)
# fmt: on


def embed(
    source: Path,
    checkpoint: Path,
    *,
    output: Path | None = None,
    split: str | None = None,
    views: int | None = None,
    batch_size: int = IMAGE_BATCH,
    progress: Progress,
) -> EmbedResult:
    """Embeds every picture of `source` and writes a gallery.

    Args:
        source: a prepared data set, or a folder of pictures (subfolders included, hidden files
            left out).
        output: the gallery's directory; None is `gallery` beside the checkpoint. A gallery that
            is there is replaced.
        split: of a prepared data set; None is all of them.
        views: of each picture, whose mean is its feature; None is the checkpoint's.

    Pictures that cannot be read are left out and listed in the gallery's skipped.jsonl.

    Raises:
        UserError: the source or checkpoint cannot be read, no picture can, or `output` holds
            something else than a gallery.
    """
    source = Path(source)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    prepared = (source / MANIFEST).is_file()
    if prepared:
        items, load = _prepared(source, split, progress)
    else:
        items, load = _folder(source)
        if split is not None:
            progress.say(f"split: {split} is of no account, since {source} is a folder of pictures")
    model = load_model(checkpoint, eval_views=views)
    if output is None:
        output = model.info.path.parent / "gallery"
        progress.say(f"gallery: {output} (--output to change)")
    kept: list[int] = []
    features: list[torch.Tensor] = []
    skipped: list[tuple[str, str]] = []
    size = model.vlm.eval_image_size
    with progress.bar("embedding", len(items), "images") as bar:
        for batch in encode_image_batches(
            model.vlm,
            items,
            lambda item: load(item, size),
            device=model.device,
            precision=model.precision,
            batch_size=batch_size,
        ):
            kept += batch.rows
            features.append(batch.encoded.features.cpu())
            skipped += [(items[i].path, reason) for i, reason in batch.bad]
            bar.advance(len(batch.rows) + len(batch.bad))
    if not kept:
        path, reason = skipped[0]
        raise UserError(
            f"none of the {len(items):,} pictures in {source} can be read "
            f"(the first, {path}, is {reason})"
        )
    rows = torch.cat(features)
    gallery = Gallery(
        features=rows,
        items=[items[i] for i in kept],
        model_sha256=model.info.sha256,
        model_path=str(model.info.path),
        source=str(source.resolve()),
        prepared=prepared,
        skipped=skipped,
        off=None if model.bank is None else model.off_images(rows),
    )
    gallery.save(output)
    result = EmbedResult(
        path=Path(output),
        source=source,
        model_path=model.info.path,
        model_sha256=model.info.sha256,
        count=len(gallery),
        dim=model.dim,
        skipped=skipped,
    )
    if skipped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.reasons.items())
        progress.say(
            f"skipped: {len(skipped):,} of {len(items):,} pictures ({reasons}), "
            f"listed in {result.path / 'skipped.jsonl'}"
        )
    return result


Load = Callable[[GalleryItem, int], Image.Image]


def _prepared(
    source: Path, split: str | None, progress: Progress
) -> tuple[list[GalleryItem], Load]:
    dataset = PreparedDataset.open(source)
    names = [split] if split is not None else dataset.splits
    splits = {name: dataset.split(name) for name in names}
    progress.say(f"splits: {', '.join(names)}" + ("" if split else " (--split for one)"))
    items = [
        GalleryItem(path=path, id=image_id, captions=captions, split=name, index=i)
        for name, part in splits.items()
        for i, (path, image_id, captions) in enumerate(
            zip(part.paths, part.image_ids, part.captions, strict=True)
        )
    ]
    if not items:
        raise UserError(f"{source} has no pictures in {', '.join(names)}: run `vicvlm prepare`")
    return items, lambda item, size: splits[item.split].image(item.index, at_least=size)


def _folder(source: Path) -> tuple[list[GalleryItem], Load]:
    if not source.is_dir():
        raise UserError(
            f"there is no folder {source}: name one with pictures, or a prepared data set"
        )
    paths: list[str] = []
    for folder, subfolders, names in os.walk(source):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [
            os.path.relpath(os.path.join(folder, name), source)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        ]
    if not paths:
        raise UserError(
            f"{source} and its subfolders hold no pictures (files named {', '.join(SUFFIXES)})"
        )
    items = [GalleryItem(path=path, id=os.path.splitext(path)[0]) for path in paths]
    return items, lambda item, size: load_rgb(source / item.path, at_least=size)
