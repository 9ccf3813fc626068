"""The built-in data set: the same for a seed, distinct scenes, captions that leave things out."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import Listing, draw
from vicvlm_cli.data.sources.scene_pixels import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, paint
from vicvlm_cli.data.sources.scene_words import describe
from vicvlm_cli.errors import UsageError

SIZES = {"train": 300, "val": 20, "test": 200}


@pytest.fixture(scope="module")
def listing() -> Listing:
    return find_source("scenes", Path("unused"), sizes=SIZES)


def test_counts_and_five_different_captions(listing: Listing) -> None:
    items = listing.items()
    assert Counter(item.split for item in items) == SIZES
    assert len({item.image_id for item in items}) == listing.total == 520
    assert all(len(set(item.captions)) >= 4 for item in items)
    assert all(len(item.captions) == 5 for item in items)


def test_default_sizes() -> None:
    assert find_source("scenes", Path("unused")).total == 13_000


def test_the_same_seed_gives_the_same_pictures_and_words(listing: Listing) -> None:
    again = find_source("scenes", Path("elsewhere"), sizes=SIZES)
    other = find_source("scenes", Path("unused"), sizes=SIZES, seed=1)
    assert again.items() == listing.items()
    assert again.digest == listing.digest != other.digest
    assert other.split_name == "seed1"
    assert not set(other.items()) & set(listing.items())
    pairs = zip(listing.stream(set()), again.stream(set()), strict=True)
    for (_, a), (_, b) in list(pairs)[:20]:
        assert draw(a) == draw(b)


def test_test_scenes_do_not_depend_on_the_size_of_train(listing: Listing) -> None:
    small = find_source("scenes", Path("unused"), sizes={**SIZES, "train": 10})
    test = [item for item in listing.items() if item.split == "test"]
    assert [item for item in small.items() if item.split == "test"] == test


def test_captions_identify_pictures_but_no_single_word_does(listing: Listing) -> None:
    test = [item for item in listing.items() if item.split == "test"]
    used: Counter[str] = Counter()
    for item in test:
        used.update(set(re.findall("[a-z]+", " ".join(item.captions))))
    assert min(used.values()) >= 5
    said = Counter(caption for item in test for caption in set(item.captions))
    assert sum(count == 1 for count in said.values()) / len(said) > 0.99


def test_sides_are_named_in_many_captions_but_not_in_all(listing: Listing) -> None:
    captions = [caption for item in listing.items() for caption in item.captions]
    sided = sum(bool(re.search(r"\b(left|right)\b", caption)) for caption in captions)
    assert 0.4 < sided / len(captions) < 0.8


def test_pictures_show_colours_and_shapes_where_they_are_said() -> None:
    for colour in COLOURS:
        for shape in SHAPES:
            scene = Scene((Thing(2, colour, shape, "large"),), "grey")
            image = np.asarray(paint(scene, "seed")).astype(int)
            assert image.shape == (64, 64, 3)
            near = np.abs(image - COLOURS[colour]).max(axis=2) <= 16
            assert near[:21, 43:].sum() > 60  # top right
            assert near[22:, :42].sum() == 0


def test_every_shape_and_background_looks_different() -> None:
    def flat(shape: str, background: str) -> bytes:
        return paint(Scene((Thing(4, "red", shape, "large"),), background), "x").tobytes()

    assert len({flat(shape, "grey") for shape in SHAPES}) == len(SHAPES)
    assert len({flat("star", background) for background in BACKGROUNDS}) == len(BACKGROUNDS)


def test_relations_are_true() -> None:
    upper_left = Thing(0, "red", "star", "large")
    lower_right = Thing(8, "blue", "ring", "small")
    scene = Scene((upper_left, lower_right), "sand")
    for seed in range(50):
        for caption in describe(scene, random.Random(seed)):
            relation = re.search(r"(red|crimson) star (.*?) a .*(ring|hoop)", caption)
            if relation and relation[2]:
                assert not re.search("right|below|under|lower|bottom", relation[2]), caption


def test_unknown_split_or_source_with_sizes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scenes have the splits train, val, test, not dev"):
        find_source("scenes", tmp_path, sizes={"dev": 3})
    with pytest.raises(UsageError, match="only scenes"):
        find_source("coco", tmp_path, sizes={"train": 3})
    with pytest.raises(UsageError, match="scenes are drawn"):
        find_source("scenes", tmp_path, split_scheme="karpathy")
