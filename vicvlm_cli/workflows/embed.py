"""embed: pictures, from a folder or a prepared data set, into a gallery to search."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from vicvlm_cli.checkpoint import load_model
from vicvlm_cli.data.images import load_rgb
from vicvlm_cli.data.prepared import MANIFEST, PreparedDataset, is_prepared
from vicvlm_cli.data.sources.files import stamp, walk
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.gallery.items import GalleryItem
from vicvlm_cli.gallery.results import EmbedResult
from vicvlm_cli.gallery.store import Gallery, check_output, read_header
from vicvlm_cli.gallery.unfinished import Unfinished
from vicvlm_cli.inference import IMAGE_BATCH, LoadedModel, autocast_dtype, encode_image_batches
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
        source: a prepared data set, or a folder of pictures (subfolders and links to folders
            included, hidden files left out).
        output: the gallery's directory; None is `gallery` beside the checkpoint. A gallery that
            is there is replaced, and what it holds of pictures that are unchanged is taken over;
            one of another source only where `output` names it.
        split: of a prepared data set; None is all of them.
        views: of each picture, whose mean is its feature; None is the checkpoint's.

    Pictures that cannot be read are left out and listed in the gallery's skipped.jsonl. A call
    that was stopped is gone on with by the same call.

    Raises:
        UserError: the source or checkpoint cannot be read, no picture can, or not half of those in
            the gallery that is there; or `output` holds something else or cannot be written; or
            it is None, and the gallery there is of another source.
    """
    source = Path(source)
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
    prepared = is_prepared(source)
    if not prepared and not os.path.isdir(source):
        raise UserError(
            f"there is no folder {source}: name one with pictures, or a prepared data set"
        )
    model = load_model(checkpoint, eval_views=views)
    by_default = output is None
    if output is None:
        output = model.info.path.parent / "gallery"
        progress.say(f"gallery: {output} (--output to change)")
    output = Path(output)
    check_output(output)
    unread: dict[Path, str] = {}
    if prepared:
        items, load = _prepared(source, split, progress)
    else:
        items, load = _folder(source, unread, progress)
        if split is not None:
            progress.say(f"split: {split} is of no account, since {source} is a folder of pictures")
    if by_default:  # not before: that a source has no pictures is the mistake that is nearer
        _check_source(output, source)
    dtype = autocast_dtype(model.device, model.precision)
    whole = Gallery(
        features=torch.empty(len(items), model.dim),
        items=items,
        model_sha256=model.info.sha256,
        model_path=str(model.info.path),
        source=str(source.resolve()),
        prepared=prepared,
        off=None if model.bank is None else torch.full((len(items),), torch.nan),
        views=model.vlm.config.eval_views,
        precision=str(dtype or torch.float32).removeprefix("torch."),
    )
    work = Unfinished(whole, output, progress)
    # Where a folder cannot be read, nobody knows whether what is not found there is gone for good.
    hidden = sum(not unread.keys().isdisjoint((source / path).parents) for path in work.dropped)
    _check_lost(work, output, hidden, [])
    if before := int(work.done.sum()):
        progress.say(f"{before:,} of {len(items):,} pictures are as they were embedded before")
    if work.dropped:
        dropped = len(work.dropped)
        progress.say(f"dropped: {dropped:,} of the {work.earlier:,} pictures in {output}")
    if work.views is not None and work.views != whole.views:
        progress.say(
            f"replaced: {output} is of --views {work.views} and will be of --views {whole.views} "
            "(another --output keeps it)"
        )
    with work:
        skipped = _fill(work, model, load, batch_size, progress)
        if not work.done.any():
            path, reason = skipped[0]
            raise UserError(
                f"none of the {len(items):,} pictures in {source} can be read "
                f"(the first, {path}, is {reason})"
            )
        _check_lost(work, output, hidden, skipped)
        gallery = work.gallery()
        gallery.skipped = skipped
        if gallery.off is not None:
            new = gallery.off.isnan()  # what was taken over is by the same bank
            gallery.off[new] = model.off_images(gallery.features[new])
        gallery.save(output)
    result = EmbedResult(
        path=output,
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


def _fill(
    work: Unfinished, model: LoadedModel, load: Load, batch_size: int, progress: Progress
) -> list[tuple[str, str]]:
    """Embeds what is left to be; paths and reasons of what cannot be read.

    Raises UserError once the source as a whole is gone.
    """
    whole, left, size = work.whole, work.left(), model.vlm.eval_image_size
    skipped: list[tuple[str, str]] = []
    with progress.bar("embedding", len(left), "images") as bar:
        for batch in encode_image_batches(
            model.vlm,
            (whole.items[row] for row in left),
            lambda item: load(item, size),
            device=model.device,
            precision=model.precision,
            batch_size=batch_size,
        ):
            work.add([left[i] for i in batch.rows], batch.encoded.features.cpu())
            skipped += [(whole.items[left[i]].path, reason) for i, reason in batch.bad]
            if batch.bad and _is_gone(Path(whole.source), whole.prepared):
                raise UserError(
                    f"{whole.source} went away while its pictures were embedded: bring it back and "
                    "run `vicvlm embed` again, which goes on from here"
                )
            bar.advance(len(batch.rows) + len(batch.bad))
    return skipped


def _prepared(
    source: Path, split: str | None, progress: Progress
) -> tuple[list[GalleryItem], Load]:
    dataset = PreparedDataset.open(source)
    names = [split] if split is not None else dataset.splits
    splits = {name: dataset.split(name) for name in names}
    progress.say(f"splits: {', '.join(names)}" + ("" if split else " (--split for one)"))
    fingerprint = dataset.manifest.fingerprint[:16]
    items = [
        GalleryItem(path, image_id, captions, name, i, f"{fingerprint} {part.hash}")
        for name, part in splits.items()
        for i, (path, image_id, captions) in enumerate(
            zip(part.paths, part.image_ids, part.captions, strict=True)
        )
    ]
    if not items:
        raise UserError(f"{source} has no pictures in {', '.join(names)}: run `vicvlm prepare`")
    return items, lambda item, size: splits[item.split].image(item.index, at_least=size)


def _folder(
    source: Path, unread: dict[Path, str], progress: Progress
) -> tuple[list[GalleryItem], Load]:
    """The pictures of a folder; `unread` is told which subfolders cannot be read."""
    files = [path for path in walk(source, sys.maxsize, unread) if path.suffix.lower() in SUFFIXES]
    if not files:
        if os.path.exists(source / MANIFEST):
            PreparedDataset.open(source)  # says that it is damaged
        raise UserError(
            f"{source} and its subfolders hold no pictures (files named {', '.join(SUFFIXES)})"
            + "".join(f"; {warning}" for warning in unread.values())
        )
    for warning in unread.values():
        progress.say(f"warning: {warning}")
    items = []
    for file in progress.track(files, "looking for changes", unit="images"):
        _, length, mtime = stamp(file)
        path = str(file.relative_to(source))
        name = os.path.splitext(path)[0]
        items.append(GalleryItem(path=path, id=name, stamp=f"{length} {mtime}"))
    return items, lambda item, size: load_rgb(source / item.path, at_least=size)


def _check_source(output: Path, source: Path) -> None:
    """Raises UserError where the gallery at `output` is of another source, perhaps of many hours.

    Its splits are one source, and so is a folder that has become a prepared data set.
    """
    try:
        there = read_header(output).get("source")
    except UserError:  # there is none, or none that can be read
        return
    if there != str(source.resolve()):
        raise UserError(
            f"the gallery {output} is of {there} and not of {source}: renew it with `vicvlm embed "
            f"{there}`, choose another place with --output FOLDER, or replace it with "
            f"--output {output}"
        )


def _is_gone(source: Path, prepared: bool) -> bool:
    """Is the source no longer there? What a disk was mounted on stays behind as an empty folder."""
    if prepared:
        return not os.path.isfile(source / MANIFEST)
    try:
        with os.scandir(source) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def _check_lost(
    work: Unfinished, output: Path, hidden: int, skipped: list[tuple[str, str]]
) -> None:
    """Raises UserError where most pictures of the gallery at `output` can no longer be read.

    `hidden`: how many of them were in folders that cannot be read.
    """
    lost = hidden
    if skipped:
        lost += int((work.had & ~work.done).sum())
    if 2 * lost > work.earlier:
        why = "their folders cannot be read"
        if skipped:
            why = f"the first, {skipped[0][0]}, is {skipped[0][1]}"
        raise UserError(
            f"{lost:,} of the {work.earlier:,} pictures in the gallery {output} can no longer be "
            f"read ({why}), so it stays as it is: bring them back and run `vicvlm embed` again, or "
            "choose another --output"
        )
