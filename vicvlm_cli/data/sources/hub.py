"""`--from-hub REPO`: a captioned image data set of the Hugging Face hub, or a local copy of one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vicvlm_cli.data.images import BadImage, ImageSource
from vicvlm_cli.data.sources.captions import (
    CAPTION_KEYS,
    Captioned,
    as_list,
    given_split,
    known_splits,
    split_name,
)
from vicvlm_cli.data.sources.listing import (
    Item,
    Listing,
    Picture,
    collect,
    digest_of,
    settle_split,
    some,
    tell_unknown,
    total_of,
)
from vicvlm_cli.errors import UserError

ID_KEYS = ("file_name", "filename", "image_id", "img_id", "cocoid")


def list_hub(
    source: str,
    repo: str,
    *,
    seed: int,
    split_scheme: str | None,
    expected: dict[str, int] | None,
    show_progress: bool,
) -> Listing:
    """Load `repo` through HF datasets (into its cache) and list what is in it.

    Takes the first image column, and caption, captions, text, sentences or caption_0, caption_1, …
    A `split` column counts before the repository's own splits; rows that share a file name or
    image id are one picture. Raises UserError: not to be had, no such columns, or unknown splits.
    """
    import datasets

    parts = _load(repo, show_progress)
    pictures: dict[str, tuple[Any, int]] = {}
    given = []
    for part, data in parts.items():
        image, said = _columns(data, repo)
        undecoded = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        table = data.remove_columns([image])
        identity = next((key for key in ID_KEYS if key in table.column_names), None)
        for number, row in enumerate(table):
            name = str(row[identity]) if identity else f"{part}-{number:06d}"
            captions = [text for column in said for text in as_list(row[column])]
            # An unknown split of a row is told; how the repository calls its parts need not be one.
            split = given_split(row["split"]) if "split" in row else split_name(part)
            given.append(Captioned(name, split, captions))
            pictures.setdefault(name, (undecoded, number))
    entries, unknown = known_splits(given)
    items, rejected = collect((e.image, e.image, e.split, e.captions) for e in entries)
    # A lone "train" is data that nobody has split; a lone "test" is meant as one.
    undivided = {item.split for item in items.values()} == {"train"}
    items, scheme, no_split = settle_split(
        items, {} if undivided else {"hub": None}, split_scheme, seed, repo
    )
    warnings: list[str] = []
    tell_unknown(unknown, scheme, split_scheme, repo, warnings)
    rejected += no_split
    items = {name: replace(item, path=f"{repo}!{name}") for name, item in items.items()}

    def stream(done: set[str]) -> Iterator[tuple[Item, Picture]]:
        for name, item in items.items():
            if name not in done:
                yield item, partial(_fetch, *pictures[name])

    counts = {split: 0 for split in expected or {}}
    for item in items.values():
        counts[item.split] = counts.get(item.split, 0) + 1
    caches = [file["filename"] for data in parts.values() for file in data.cache_files]
    return Listing(
        source=source,
        split_name="karpathy" if scheme == "hub" and counts == expected else scheme,
        digest=digest_of(repo, [vars(item) for item in items.values()], caches),
        total=total_of(items.values(), rejected),
        items=lambda: list(items.values()),
        stream=stream,
        expected=expected if scheme == "hub" else None,
        rejected=rejected,
        warnings=warnings,
    )


def _load(repo: str, show_progress: bool) -> dict[str, Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    if not show_progress:
        datasets.disable_progress_bars()
    try:
        return dict(datasets.load_dataset(repo))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"cannot load '{repo}' with HF datasets ({reason[0]}); check the name, the network, "
            f"and `hf auth login` if the data set is gated"
        ) from None


def _columns(data: Any, repo: str) -> tuple[str, list[str]]:
    """The image column and the caption columns (undecoded from here on)."""
    import datasets

    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    names = data.column_names
    captions = [key for key in CAPTION_KEYS if key in names][:1]
    captions = captions or sorted(name for name in names if re.fullmatch(r"captions?_?\d+", name))
    if not images or not captions:
        raise UserError(
            f"'{repo}' has no {'captions' if images else 'images'} that vicvlm knows "
            f"(its columns: {some(names)})"
        )
    return images[0], captions


def _fetch(data: Any, number: int) -> ImageSource:
    (image,) = data[number].values()
    if image is None or (image["bytes"] is None and image["path"] is None):
        raise BadImage("missing")
    return image["bytes"] if image["bytes"] is not None else Path(image["path"])
