"""Whether a model may have seen the pictures that it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vicvlm_cli.data.origins import origin_of, seen_notes
from vicvlm_cli.data.prepared import Manifest, PreparedDataset, Split

NAME = "random-hash-seed0"


def split_of(source: str, split_name: str, train: str = "new") -> tuple[Manifest, Split]:
    manifest = Manifest(
        source, split_name, "", 8, {}, {}, {}, {"train": train, "test": "t"}, {"test": []}
    )
    return manifest, Split("test", manifest, [])


def origin(source: str, split_name: str, split_hash: str = "old") -> dict[str, Any]:
    return {"source": source, "split_name": split_name, "split": "train", "split_hash": split_hash}


def test_an_origin_is_the_train_split(tiny_data: Path) -> None:
    data = PreparedDataset.open(tiny_data)
    assert origin_of(data) == {
        **origin("scenes", "seed0", data.split("train").hash),
        "partial": "",
    }
    assert seen_notes(data.manifest, data.split("test"), [origin_of(data)]) == []


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (origin("folder", NAME, "new"), None),
        (
            origin("folder", NAME),
            f"another data set of source folder ({NAME}), or on this one before it changed",
        ),
        # What a checkpoint of an earlier version was trained on.
        (origin("folder", "random-seed0"), "on the random-seed0 split of folder, and this is the"),
        (origin("flickr8k", "karpathy", "t"), "on this very split (test)"),
        (origin("flickr8k", "karpathy"), None),
        ({}, None),
    ],
)
def test_pictures_that_may_have_been_trained_on_are_told(
    trained: dict[str, Any], words: str | None
) -> None:
    notes = seen_notes(*split_of("folder", NAME), [trained])
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]


@pytest.mark.parametrize(
    ("source", "split_name", "told"),
    [
        ("flickr8k", "karpathy", False),
        ("coco", "2014", False),
        ("scenes", "seed0", False),
        ("flickr8k", NAME, True),
        ("flickr30k", "hub", True),
    ],
)
def test_a_part_of_a_published_split_holds_no_picture_of_another(
    source: str, split_name: str, told: bool
) -> None:
    notes = seen_notes(*split_of(source, split_name), [origin(source, split_name)])
    assert bool(notes) == told


def test_every_training_before_the_last_counts_once() -> None:
    before = [origin("scenes", "seed0"), origin("folder", NAME), origin("folder", NAME, "older")]
    notes = seen_notes(*split_of("folder", NAME), before)
    assert len(notes) == 1
