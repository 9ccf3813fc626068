"""Any folder of pictures with captions beside them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from tiny_folder import captions, jsonl, pictures, splits

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import NothingFound
from vicvlm_cli.errors import UserError


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
