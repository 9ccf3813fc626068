"""The split of a folder: given, of its folders, or by chance."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_folder import jsonl, pictures, splits

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import NothingFound
from vicvlm_cli.errors import UsageError, UserError


def test_metadata_in_folders_called_train_and_test(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pictures(tmp_path, f"{split}/a.png")
        jsonl(tmp_path / split / "metadata.jsonl", {"file_name": "a.png", "text": split})
    listing = find_source("folder", tmp_path)
    assert listing.split_name == "folders"
    assert splits(listing) == {"train/a.png": "train", "test/a.png": "test"}


def test_folders_one_level_down_are_splits_where_every_picture_is_in_one(tmp_path: Path) -> None:
    names = ["images/train/a.png", "images/val/train/b.png"]
    pictures(tmp_path, *names, "images/c.png")
    jsonl(tmp_path / "captions.jsonl", *({"file_name": n, "caption": "x"} for n in names))
    listing = find_source("folder", tmp_path)
    assert listing.split_name == "folders"
    assert splits(listing) == {names[0]: "train", names[1]: "val"}

    # A folder of trains and one of tests, say, in a tree that has no splits.
    jsonl(
        tmp_path / "captions.jsonl",
        *({"file_name": n, "caption": "x"} for n in [*names, "images/c.png"]),
    )
    listing = find_source("folder", tmp_path)
    assert listing.split_name == "random-hash-seed0"
    assert listing.warnings == [
        f"2 of 3 pictures in {tmp_path} lie in folders named by a split (train, val) and the "
        "others do not, so the split is by chance: --split-scheme folders goes by the folders, "
        "without the others"
    ]
    assert find_source("folder", tmp_path, split_scheme="random").warnings == []
    assert splits(find_source("folder", tmp_path, split_scheme="folders")) == {
        names[0]: "train",
        names[1]: "val",
    }


def test_unknown_splits_are_told_before_there_is_one_by_chance(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    table = tmp_path / "captions.csv"
    table.write_text("file_name,caption,split\na.png,x,fold1\nb.png,y,fold2\n")
    with pytest.raises(UserError) as error:
        find_source("folder", tmp_path)
    assert not isinstance(error.value, NothingFound)  # which an older prepared data set outlives
    assert str(error.value) == (
        f"unknown splits in the captions in {tmp_path}: fold1, fold2 (known are train, val, test, "
        "dev, eval, valid, validation, restval, training, testing); rename them, or have a split "
        "by chance: --split-scheme random"
    )
    assert find_source("folder", tmp_path, split_scheme="random").warnings == []
    table.write_text("file_name,caption,split\na.png,x,Training\nb.png,y,fold2\n")
    listing = find_source("folder", tmp_path)
    assert splits(listing) == {"a.png": "train"}
    assert [(bad.image_id, bad.reason) for bad in listing.rejected] == [("b.png", "no split")]
    (warning,) = listing.warnings
    assert "fold2 (known are" in warning and warning.endswith("count for nothing, rename them")


def test_a_picture_more_moves_none_out_of_train(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(30)]
    pictures(tmp_path, *names, "new.png")
    jsonl(tmp_path / "captions.jsonl", *({"file_name": n, "caption": "x"} for n in names))
    before = splits(find_source("folder", tmp_path))
    rows = [{"file_name": n, "caption": "x"} for n in ["new.png", *names]]
    jsonl(tmp_path / "captions.jsonl", *rows)
    after = splits(find_source("folder", tmp_path))
    moved = [(before[name], after[name]) for name in names if before[name] != after[name]]
    assert len(moved) <= 1 and all(now == "train" for _, now in moved)  # for the new one's sake


def test_another_split_can_be_asked_for(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    jsonl(tmp_path / "captions.jsonl", {"file_name": "a.png", "caption": "x", "split": "test"})
    assert splits(find_source("folder", tmp_path)) == {"a.png": "test"}
    by_chance = find_source("folder", tmp_path, split_scheme="random")
    assert (by_chance.split_name, splits(by_chance)) == ("random-hash-seed0", {"a.png": "train"})
    with pytest.raises(UsageError, match="allow no split 'karpathy'; they allow given, random"):
        find_source("folder", tmp_path, split_scheme="karpathy")


def test_links_to_folders_called_train_and_val_are_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures(tmp_path, f"images/of-{split}/a.png")
        (tmp_path / split).symlink_to(tmp_path / "images" / f"of-{split}")
    rows = [{"file_name": f"{split}/a.png", "caption": "x"} for split in ("train", "val")]
    jsonl(tmp_path / "captions.jsonl", *rows)
    listing = find_source("folder", tmp_path)
    assert listing.split_name == "folders"
    assert splits(listing) == {"images/of-train/a.png": "train", "images/of-val/a.png": "val"}
