"""Raw data sets, by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from vicvlm_cli.data.sources.coco import COCO
from vicvlm_cli.data.sources.flickr8k import FLICKR8K
from vicvlm_cli.data.sources.flickr30k import FLICKR30K
from vicvlm_cli.data.sources.folder import list_folder
from vicvlm_cli.data.sources.hub import list_hub
from vicvlm_cli.data.sources.listing import Listing, NothingFound
from vicvlm_cli.data.sources.published import find_published
from vicvlm_cli.data.sources.scenes import list_scenes
from vicvlm_cli.errors import UsageError

PUBLISHED = {data.name: data for data in (FLICKR30K, FLICKR8K, COCO)}
SOURCES = ("scenes", *PUBLISHED, "folder")


def output_name(source: str) -> str:
    """The folder below DIR for the prepared data set."""
    return "prepared" if source == "folder" else source


def find_source(
    source: str,
    directory: Path,
    *,
    seed: int = 0,
    split_scheme: str | None = None,
    from_hub: str | None = None,
    sizes: dict[str, int] | None = None,
    show_progress: bool = False,
) -> Listing:
    """Find the raw files of `source` and read its captions.

    Raises NothingFound where there is nothing, UserError for damaged files, UsageError for a
    source or split that does not exist.
    """
    if source not in SOURCES:
        close = difflib.get_close_matches(source, SOURCES, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(SOURCES)}"
        raise UsageError(f"there is no source '{source}'; {hint}")
    if sizes is not None and source != "scenes":
        raise UsageError(f"only scenes can be drawn in other numbers, not {source}")
    if source == "scenes":
        if from_hub or split_scheme:
            raise UsageError("scenes are drawn: they take neither --from-hub nor another split")
        return list_scenes(seed, sizes)
    if from_hub:
        expected = PUBLISHED[source].counts["karpathy"] if source in PUBLISHED else None
        return list_hub(
            source,
            from_hub,
            seed=seed,
            split_scheme=split_scheme,
            expected=expected,
            show_progress=show_progress,
        )
    if not os.path.isdir(directory):  # Path.is_dir raises where one may not look
        raise NothingFound(f"there is no folder {directory}; {_advice(source)}")
    if source == "folder":
        return list_folder(directory, seed=seed, split_scheme=split_scheme)
    return find_published(PUBLISHED[source], directory, seed=seed, split_scheme=split_scheme)


def _advice(source: str) -> str:
    if source in PUBLISHED:
        return f"make it, and {PUBLISHED[source].get}"
    return "name the folder that holds your pictures"
