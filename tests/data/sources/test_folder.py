"""Any folder of pictures with captions beside them."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import Listing, NothingFound
from vicvlm_cli.errors import UsageError, UserError


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


def test_jsonl_with_given_splits_and_repeated_rows(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "sub/b.png", "bare.png")
    jsonl(
        tmp_path / "captions.jsonl",
        {"file_name": "a.png", "caption": "one", "split": "train"},
        {"file_name": "./sub/b.png", "captions": ["two", "too"], "split": "validation"},
        {"file_name": "a.png", "caption": "uno", "split": "train"},
    )
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {"a.png": ("one", "uno"), "sub/b.png": ("two", "too")}
    assert splits(listing) == {"a.png": "train", "sub/b.png": "val"}
    assert listing.split_name == "given"
    assert listing.warnings == [f"1 pictures in {tmp_path} have no caption and were left out"]
    streamed = {item.image_id: picture for item, picture in listing.stream({"a.png"})}
    assert streamed == {"sub/b.png": tmp_path / "sub" / "b.png"}
    assert listing.items()[0].path == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("captions.csv", 'file_name,caption\na.png,"x, y"\nb.png,z\n'),
        ("captions.tsv", "file_name\tcaption\na.png\tx, y\nb.png\tz\n"),
        ("metadata.csv", 'file_name,text\na.png,"x, y"\nb.png,z\n'),
        ("metadata.jsonl", '{"file_name":"a.png","text":"x, y"}\n{"file_name":"b.png","text":"z"}'),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str) -> None:
    pictures(tmp_path, "a.png", "b.png")
    (tmp_path / name).write_text(text)
    assert captions(find_source("folder", tmp_path)) == {"a.png": ("x, y",), "b.png": ("z",)}


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


def test_the_same_captions_in_two_files_count_once(tmp_path: Path) -> None:
    pictures(tmp_path, "sub/a.png")
    (tmp_path / "captions.csv").write_text("file_name,caption\nsub/a.png,a  dog\nsub/a.png,wet\n")
    row = {"file_name": "a.png", "captions": ["a dog", "brown", " ", ""], "split": "train"}
    jsonl(tmp_path / "sub" / "metadata.jsonl", row)
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {"sub/a.png": ("a dog", "wet", "brown")}
    assert splits(listing) == {"sub/a.png": "train"}  # which only one of them tells
    assert [bad.reason for bad in listing.rejected] == ["empty caption"] * 2
    assert listing.warnings == [
        f"1 captions in {tmp_path} are there again, in the same words for the same picture, and "
        "count once"
    ]


def test_names_may_go_up_as_long_as_they_stay_inside(tmp_path: Path) -> None:
    pictures(tmp_path, "data/images/a.png", "data/9:41.png", "b.png")
    (tmp_path / "data" / "annotations").mkdir()
    names = ["../images/a.png", "../9:41.png", "x/../../images/./a.png", "../../b.png", "C:b.png"]
    rows = [{"file_name": name, "caption": name} for name in names]
    jsonl(tmp_path / "data" / "annotations" / "captions.jsonl", *rows)
    listing = find_source("folder", tmp_path / "data")
    assert captions(listing) == {"images/a.png": (names[0], names[2]), "9:41.png": (names[1],)}
    assert [(bad.image_id, bad.reason) for bad in listing.rejected] == [
        (name, "outside the folder") for name in names[3:]
    ]


def test_a_text_file_beside_each_picture_and_a_split_by_chance(tmp_path: Path) -> None:
    pictures(tmp_path, *(f"{i}.png" for i in range(40)))
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n\nnumber {i}\n" if i else "\n")
    listing = find_source("folder", tmp_path, seed=1)
    assert captions(listing)["3.png"] == ("picture 3", "number 3")
    assert [(bad.image_id, bad.reason) for bad in listing.rejected] == [("0.png", "no caption")]
    assert listing.split_name == "random-hash-seed1"
    assert Counter(splits(listing).values()) == {"train": 33, "val": 3, "test": 3}
    assert splits(find_source("folder", tmp_path, seed=1)) == splits(listing)
    assert splits(find_source("folder", tmp_path, seed=2)) != splits(listing)


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


def test_bad_rows_are_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    jsonl(
        tmp_path / "captions.jsonl",
        {"file_name": "a.png", "captions": ["x", " "], "split": "train"},
        {"file_name": "../b.png", "caption": "y", "split": "train"},
        {"file_name": "/etc/passwd", "caption": "y"},
        {"file_name": "b.png", "caption": "y"},
    )
    listing = find_source("folder", tmp_path)
    assert {(bad.image_id, bad.reason) for bad in listing.rejected} == {
        ("a.png", "empty caption"),
        ("../b.png", "outside the folder"),
        ("/etc/passwd", "outside the folder"),
        ("b.png", "no split"),
    }
    assert splits(listing) == {"a.png": "train"}


@pytest.mark.parametrize("name", ["captions.csv", "captions.jsonl"])
def test_names_outside_the_folder_alone_are_told(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "a.png", "b.png")
    if name == "captions.csv":
        rows = [f"{tmp_path / picture},x\n" for picture in ("a.png", "b.png", "a.png")]
        (tmp_path / name).write_text("".join(["file_name,caption\n", *rows]))
    else:
        rows = [{"file_name": f"../{i}.png", "caption": "x"} for i in "ab"]
        jsonl(tmp_path / name, *rows)
    with pytest.raises(UserError) as error:
        find_source("folder", tmp_path)
    assert not isinstance(error.value, NothingFound)  # which an older prepared data set outlives
    assert f"all 2 names in the captions of {tmp_path} are absolute or" in str(error.value)


def test_captions_that_are_not_read_are_told(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "captions.csv").write_text("file_name,caption,caption_de\na.png,a dog,ein Hund\n")
    (warning,) = find_source("folder", tmp_path).warnings
    assert "not from caption_de" in warning


def test_unicode_names_match_however_they_are_composed(tmp_path: Path) -> None:
    name = "Hündchen 狗.png"
    pictures(tmp_path, unicodedata.normalize("NFD", name))
    jsonl(tmp_path / "captions.jsonl", {"file_name": name, "caption": "x"})
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {name: ("x",)}
    assert len(list(listing.stream(set()))) == 1


def test_text_that_is_not_utf8_is_left_out(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "caf\udce9.png")
    jsonl(
        tmp_path / "captions.jsonl",
        {"file_name": "a.png", "captions": ["half \ud83d", "whole"], "split": "train"},
        {"file_name": "b.png", "captions": ["\ud83d"], "split": "train"},
        {"file_name": "caf\udce9.png", "caption": "x", "split": "train"},
    )
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {"a.png": ("whole",)}
    assert {(bad.image_id, bad.reason) for bad in listing.rejected} == {
        ("a.png", "caption is not UTF-8"),
        ("b.png", "caption is not UTF-8"),
        ("b.png", "no caption"),
        ("caf\udce9.png", "name is not UTF-8"),
    }


def test_links_to_folders_list_no_picture_twice(tmp_path: Path) -> None:
    pictures(tmp_path, "z/a.png")
    (tmp_path / "z" / "a.txt").write_text("x")
    (tmp_path / "latest").symlink_to(".")
    (tmp_path / "beside").symlink_to("z")
    (tmp_path / "itself").symlink_to("itself")
    listing = find_source("folder", tmp_path)
    assert captions(listing) == {"z/a.png": ("x",)}
    assert listing.warnings == []


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    pictures(tmp_path, "away/a.png", "raw/b.png", "raw/m/c.png")
    (tmp_path / "raw" / "l").symlink_to(tmp_path / "away")
    names = ["b.png", "l/a.png", "m/c.png"]
    for name in names:
        (tmp_path / "raw" / name).with_suffix(".txt").write_text(name)
    assert list(captions(find_source("folder", tmp_path / "raw"))) == names


def test_captions_may_name_a_picture_through_a_link(tmp_path: Path) -> None:
    pictures(tmp_path, "z/a.png")
    (tmp_path / "latest").symlink_to("z")
    jsonl(tmp_path / "captions.jsonl", {"file_name": "latest/a.png", "caption": "x"})
    listing = find_source("folder", tmp_path)
    ((item, picture),) = listing.stream(set())
    assert (item.image_id, picture) == ("z/a.png", tmp_path / "z" / "a.png")
    assert listing.warnings == []
    jsonl(
        tmp_path / "captions.jsonl",
        {"file_name": "latest/a.png", "caption": "x"},
        {"file_name": "z/a.png", "caption": "y"},
        {"file_name": "lat\0est/a.png", "caption": "no name of a file"},
    )
    assert captions(find_source("folder", tmp_path))["z/a.png"] == ("x", "y")


def test_links_to_folders_called_train_and_val_are_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        pictures(tmp_path, f"images/of-{split}/a.png")
        (tmp_path / split).symlink_to(tmp_path / "images" / f"of-{split}")
    rows = [{"file_name": f"{split}/a.png", "caption": "x"} for split in ("train", "val")]
    jsonl(tmp_path / "captions.jsonl", *rows)
    listing = find_source("folder", tmp_path)
    assert listing.split_name == "folders"
    assert splits(listing) == {"images/of-train/a.png": "train", "images/of-val/a.png": "val"}


def test_captions_admit_nothing_that_is_left_out(tmp_path: Path) -> None:
    names = [".h/a.png", "z/.a.png", "latest/.a.png"]
    pictures(tmp_path, "z/a.png", *names[:2])
    (tmp_path / "latest").symlink_to("z")
    rows = [{"file_name": name, "caption": "x"} for name in ["z/a.png", *names]]
    jsonl(tmp_path / "captions.jsonl", *rows)
    ((item, _),) = find_source("folder", tmp_path).stream(set())
    assert item.image_id == "z/a.png"


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path, "a.png", "shut/b.png")
    (tmp_path / "a.txt").write_text("x")
    scan = os.scandir

    def scandir(place: Path) -> object:
        if Path(place) == tmp_path / "shut":
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    told = rf"cannot read the folder {tmp_path / 'shut'} (Permission denied): make it readable"
    assert told in find_source("folder", tmp_path).warnings[0]
    (tmp_path / "a.png").unlink()
    with pytest.raises(NothingFound) as error:
        find_source("folder", tmp_path)
    assert told in str(error.value)


def test_a_folder_called_prepared_is_read_like_any_other(tmp_path: Path) -> None:
    pictures(tmp_path, "prepared/a.png")
    jsonl(tmp_path / "captions.jsonl", {"file_name": "prepared/a.png", "caption": "x"})
    listing = find_source("folder", tmp_path)
    assert len(list(listing.stream(set()))) == 1
    assert listing.warnings == []


def test_nothing_there_says_what_to_do(tmp_path: Path) -> None:
    for name in ("nowhere", "x" * 300):
        with pytest.raises(NothingFound, match="there is no folder"):
            find_source("folder", tmp_path / name)
    with pytest.raises(NothingFound, match=r"no pictures in .*captions\.jsonl"):
        find_source("folder", tmp_path)
    pictures(tmp_path, "a.png")
    with pytest.raises(NothingFound, match=r"the 1 pictures in .* have no captions; write"):
        find_source("folder", tmp_path)
    (tmp_path / "captions.csv").write_text("wrong,header\n")
    with pytest.raises(UserError, match="needs a header"):
        find_source("folder", tmp_path)
