"""Splits by chance, and what is left out of a listing."""

from __future__ import annotations

from collections import Counter

import pytest

from vicvlm_cli.data.sources.listing import Rejected, collect, random_split

NAMES = [f"holidays/{i}.jpg" for i in range(400)]


def test_a_split_by_chance_holds_a_tenth_each_for_val_and_test() -> None:
    split = random_split(NAMES, 0)
    assert Counter(split.values()) == {"train": 320, "val": 40, "test": 40}
    assert random_split(NAMES[::-1], 0) == split != random_split(NAMES, 1)
    assert Counter(random_split(NAMES[:2], 0).values()) == {"train": 2}
    assert Counter(random_split(NAMES[:3], 0).values()) == {"train": 1, "val": 1, "test": 1}


def test_a_split_by_chance_is_the_same_everywhere() -> None:
    # As in all versions that call it "random-hash-seed0": another order needs another name.
    split = random_split([f"{i}.jpg" for i in range(10)], 0)
    assert [name for name in split if split[name] == "test"] == ["7.jpg"]
    assert [name for name in split if split[name] == "val"] == ["2.jpg"]


@pytest.mark.parametrize("number", [399, 401, 360, 440])
def test_a_picture_keeps_its_split_when_others_come_or_go(number: int) -> None:
    before = random_split(NAMES, 7)
    after = random_split([f"holidays/{i}.jpg" for i in range(number)], 7)
    moved = sum(before[name] != after[name] for name in before.keys() & after.keys())
    # By shuffling, a third of them would move.
    assert moved <= max(2, abs(number - 400) // 5)


def test_captions_and_pictures_that_are_left_out_are_told_apart() -> None:
    items, rejected = collect(
        [
            ("a", "a", "train", ["one", " ", "two", ""]),
            ("b", "b", "train", ["", "\ud83d"]),
            ("c", "c", "train", ["one"]),
            ("c", "c", "val", ["two", "three"]),
        ]
    )
    assert {key: item.captions for key, item in items.items()} == {
        "a": ("one", "two"),
        "c": ("one",),
    }
    captions = [bad for bad in rejected if bad.of_caption]
    assert Counter((bad.image_id, bad.reason) for bad in captions) == {
        ("a", "empty caption"): 2,
        ("b", "empty caption"): 1,
        ("b", "caption is not UTF-8"): 1,
        ("c", "in two splits"): 2,
    }
    pictures = [bad for bad in rejected if not bad.of_caption]
    assert pictures == [Rejected("b", "train", "no caption")]
