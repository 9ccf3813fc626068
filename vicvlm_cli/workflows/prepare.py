"""prepare: raw pictures and captions become a prepared data set."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from vicvlm_cli import __version__
from vicvlm_cli.data.images import BadImage, encode_image
from vicvlm_cli.data.prepared import MANIFEST, REJECTED, Manifest, is_prepared
from vicvlm_cli.data.shards import ShardWriter
from vicvlm_cli.data.sources import find_source, output_name
from vicvlm_cli.data.sources.listing import (
    Item,
    Listing,
    NothingFound,
    Picture,
    Rejected,
    digest_of,
    draw,
    escaped,
    partial_text,
)
from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.report.progress import Progress

RECIPE = 1  # raise it whenever pictures are encoded differently


@dataclass(frozen=True)
class PrepareResult:
    path: Path
    manifest: Manifest
    skipped_work: bool  # it was all there already
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the manifest, and what this run did."""
        return {
            "path": str(self.path),
            "skipped_work": self.skipped_work,
            "warnings": self.warnings,
            **asdict(self.manifest),
        }


def prepare(
    source: str,
    directory: Path,
    *,
    output: Path | None = None,
    image_side: int = 256,
    max_bad: float = 0.01,
    workers: int | None = None,
    seed: int = 0,
    split_scheme: str | None = None,
    from_hub: str | None = None,
    sizes: dict[str, int] | None = None,
    progress: Progress,
) -> PrepareResult:
    """Prepare `source` from the raw files in `directory` into `output` (default DIR/SOURCE).

    `image_side` is the short side in pixels of the stored images, `max_bad` the tolerated fraction
    of bad pictures, `sizes` the images of each split of `scenes`. Continues an interrupted run;
    does nothing if the data set is there. Raises UserError: no raw files, too many bad pictures,
    or another program's manifest.json in `output`.
    """
    if image_side < 1:
        raise UsageError(f"the image side must be at least 1 pixel, not {image_side}")
    if not 0 <= max_bad <= 1:
        raise UsageError(f"--max-bad is a fraction between 0 and 1, not {max_bad}")
    directory = Path(directory)
    output = Path(output) if output is not None else directory / output_name(source)
    if (shown := escaped(str(output))) != str(output):
        raise UsageError(f"{shown} is no name in UTF-8, which shards need: choose another --output")
    if os.path.exists(output / MANIFEST) and not is_prepared(output):
        raise UserError(
            f"{output / MANIFEST} is damaged or not a manifest of vicvlm, which would take its "
            "place: choose another --output, or remove it if nothing needs it"
        )
    try:
        listing = find_source(
            source,
            directory,
            seed=seed,
            split_scheme=split_scheme,
            from_hub=from_hub,
            sizes=sizes,
            show_progress=progress.enabled,
        )
    except NothingFound:
        manifest = _whole(output)
        if manifest is None or (manifest.source, manifest.image_side) != (source, image_side):
            raise
        note = f"the raw files of {source} are no longer in {directory}; {output} stays as it is"
        return PrepareResult(output, manifest, True, [note])
    fingerprint = digest_of(RECIPE, listing.source, listing.split_name, listing.digest, image_side)
    finished = _whole(output)
    if finished is not None and finished.fingerprint == fingerprint:
        return PrepareResult(output, finished, True, _warnings(listing, finished))
    try:
        manifest = _build(listing, output, fingerprint, image_side, max_bad, workers, progress)
    except OSError as error:  # what is unreadable among the raw files never comes this far
        raise UserError(f"cannot write to {output}: {error.strerror or error}") from None
    warnings = _warnings(listing, manifest)
    if finished is not None and finished.source == source != "scenes":
        warnings += _moved(finished.split_name, manifest.split_name)
    return PrepareResult(output, manifest, False, warnings)


def _build(
    listing: Listing,
    output: Path,
    fingerprint: str,
    image_side: int,
    max_bad: float,
    workers: int | None,
    progress: Progress,
) -> Manifest:
    output.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(output, fingerprint)
    if writer.done:
        progress.say(f"continuing in {output}: {len(writer.done):,} images were done")
    _fill(writer, listing, image_side, max_bad, workers or os.cpu_count() or 1, progress)
    if not writer.counts():
        raise UserError(f"no image of {listing.source} is usable; see {writer.write_rejected()}")
    captions = Counter(
        item.reason
        for item in listing.rejected
        if item.of_caption and item.image_id not in writer.lost
    )
    return writer.finish(
        rejected_captions=dict(captions),
        source=listing.source,
        split_name=listing.split_name,
        partial=partial_text(writer.counts(), listing.expected),
        image_side=image_side,
        vicvlm_version=__version__,
    )


def _whole(output: Path) -> Manifest | None:
    """The manifest of the data set in `output`, if all of it is there, to the last byte."""
    try:
        manifest = Manifest.read(output)
        sizes = {split: manifest.size_on_disk(output, split) for split in manifest.shards}
    except (UserError, OSError):
        return None
    return manifest if sizes == manifest.size_bytes else None


def _fill(
    writer: ShardWriter,
    listing: Listing,
    image_side: int,
    max_bad: float,
    workers: int,
    progress: Progress,
) -> None:
    """Encode every picture that is not done yet; pictures that never come are "missing"."""
    waiting = {item.image_id: item for item in listing.items() if item.image_id not in writer.done}
    gate = _Gate(writer, listing, max_bad)
    for rejected in listing.rejected:  # found again by every run
        gate.reject(rejected, settled=False)
    with progress.bar("prepare", listing.total, "images") as bar:
        bar.advance(listing.total - len(waiting))
        for item, data in _encoded(listing.stream(writer.done), image_side, workers):
            waiting.pop(item.image_id, None)
            if isinstance(data, BadImage):
                gate.reject(Rejected(item.image_id, item.split, data.reason))
            else:
                writer.add(item, data)
            bar.advance()
    for item in waiting.values():
        gate.reject(Rejected(item.image_id, item.split, "missing"))


def _encoded(
    pictures: Iterator[tuple[Item, Picture]], image_side: int, workers: int
) -> Iterator[tuple[Item, bytes | BadImage]]:
    """Pictures encoded by threads (Pillow lets go of the GIL), in their order, few at a time."""

    def encode(picture: Picture) -> bytes | BadImage:
        try:
            return encode_image(draw(picture), image_side)
        except BadImage as bad:
            return bad

    queue: deque[tuple[Item, Future[bytes | BadImage]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item, picture in pictures:
                queue.append((item, pool.submit(encode, picture)))
                if len(queue) > 4 * workers:
                    done, future = queue.popleft()
                    yield done, future.result()
            while queue:
                done, future = queue.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _Gate:
    """Passes rejected items on to the writer until too many pictures are left out."""

    def __init__(self, writer: ShardWriter, listing: Listing, max_bad: float) -> None:
        self.writer = writer
        self.listing = listing
        self.max_bad = max_bad

    def reject(self, rejected: Rejected, settled: bool = True) -> None:
        self.writer.reject(rejected, settled)
        bad, total = len(self.writer.lost), self.listing.total
        if bad <= self.max_bad * total:
            return
        listed = self.writer.write_rejected()
        first = ", ".join(
            f"{escaped(name)} ({reason})" for name, reason in islice(self.writer.lost.items(), 5)
        )
        raise UserError(
            f"at least {bad:,} of {total:,} images are bad, more than --max-bad "
            f"{self.max_bad:g} allows: {first}; see {listed}, mend or remove them, or raise "
            "--max-bad (what is finished is kept)"
            + "".join(f"; {warning}" for warning in self.listing.warnings)
        )


def _warnings(listing: Listing, manifest: Manifest) -> list[str]:
    warnings = list(listing.warnings)
    if manifest.partial:
        warnings.append(
            f"this is a part of {manifest.source}: {manifest.partial}; "
            f"it will be called partial wherever it is used"
        )
    for what, rejected in (
        ("left out", manifest.rejected),
        ("captions left out of pictures that are kept", manifest.rejected_captions),
    ):
        if rejected:
            reasons = ", ".join(f"{number:,} {reason}" for reason, number in rejected.items())
            warnings.append(f"{what}: {reasons} (listed in {REJECTED})")
    return warnings


def _moved(before: str, now: str) -> list[str]:
    """What to say where a data set takes the place of one with another split."""
    if before == now:
        return []
    return [
        f"the data set that was there had the split {before}, and this one has {now}: a model "
        "trained on that one may have seen pictures that are now in val or test"
    ]
