"""What a model was trained on, and whether it may have seen the pictures that it is measured on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vicvlm_cli.data.prepared import Manifest, PreparedDataset, Split
from vicvlm_cli.data.sources import PUBLISHED


def origin_of(dataset: PreparedDataset) -> dict[str, Any]:
    """What a checkpoint says of the data set that it is trained on."""
    manifest = dataset.manifest
    return {
        "source": manifest.source,
        "split_name": manifest.split_name,
        "split": "train",
        "split_hash": dataset.split("train").hash,
        "partial": manifest.partial,
    }


def seen_notes(manifest: Manifest, split: Split, origins: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each of ``origins`` that may share pictures with ``split``.

    ``origins`` are as :func:`origin_of` makes them, perhaps with less in them; ``manifest`` is of
    the data set of ``split``.
    """
    notes = []
    for trained in origins:
        same = trained.get("source") == manifest.source
        own, other = manifest.split_name, trained.get("split_name")
        train = manifest.split_hash.get(trained.get("split", "train"))
        if trained.get("split_hash") == split.hash:
            notes.append(f"the model was trained on this very split ({split.name})")
        elif same and other != own:
            notes.append(
                f"the model was trained on the {other} split of {manifest.source}, "
                f"and this is the {own} split: it may have seen these images"
            )
        elif same and trained.get("split_hash") != train and not _is_fixed(manifest):
            notes.append(
                f"the model was trained on another data set of source {manifest.source} ({own}), "
                "or on this one before it changed: then it may have seen some of these images"
            )
    return list(dict.fromkeys(notes))


def _is_fixed(manifest: Manifest) -> bool:
    """Whether a split of this name has each picture in the same part wherever it is prepared."""
    source = manifest.source
    known = source in PUBLISHED and manifest.split_name in PUBLISHED[source].counts
    return known or source == "scenes"
