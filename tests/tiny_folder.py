"""Folders of pictures with captions, and what is listed of them."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from vicvlm_cli.data.sources.listing import Listing


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def jsonl(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def captions(listing: Listing) -> dict[str, tuple[str, ...]]:
    return {item.image_id: item.captions for item in listing.items()}


def splits(listing: Listing) -> dict[str, str]:
    return {item.image_id: item.split for item in listing.items()}
