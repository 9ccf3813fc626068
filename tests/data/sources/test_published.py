"""Flickr30k, Flickr8k and COCO as people have them."""

from __future__ import annotations

import gzip
import json
import os
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vicvlm_cli.data.sources import find_source
from vicvlm_cli.data.sources.listing import Listing, NothingFound, partial_text
from vicvlm_cli.errors import UsageError, UserError

SPLIT = {"1.jpg": "train", "2.jpg": "train", "3.jpg": "val", "4.jpg": "test"}
NAMES = list(SPLIT)


def pictures(folder: Path, names: list[str] = NAMES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name, "JPEG")


def archive(path: Path, names: list[str] = NAMES, inside: str = "images/") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures(path.parent / "new", names)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as content:
            for name in names:
                content.write(path.parent / "new" / name, inside + name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as content:
            for name in names:
                content.add(path.parent / "new" / name, inside + name)
    for name in names:
        (path.parent / "new" / name).unlink()
    (path.parent / "new").rmdir()


def karpathy(names: dict[str, str] = SPLIT, **extra: object) -> bytes:
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} {k}"} for k in range(5)]}
        | extra
        for name, split in names.items()
    ]
    return json.dumps({"images": images}).encode()


def token(path: Path) -> None:
    path.write_text("".join(f"{name}#{k}\t{name} {k}\n" for name in NAMES for k in range(5)))


def splits(listing: Listing) -> dict[str, str]:
    assert all(len(item.captions) == 5 for item in listing.items())
    found = {item.image_id for item, _ in listing.stream(set())}
    assert found == {item.image_id for item in listing.items()}  # every picture is there
    return {item.image_id: item.split for item in listing.items()}


def test_flickr30k_from_a_tar_gz_and_the_captions_zip(tmp_path: Path) -> None:
    archive(tmp_path / "flickr30k-images.tar.gz", inside="flickr30k-images/")
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as content:
        content.writestr("dataset_flickr8k.json", karpathy({"9.jpg": "train"}))
        content.writestr("dataset_flickr30k.json", karpathy())
    listing = find_source("flickr30k", tmp_path)
    assert splits(listing) == SPLIT
    assert listing.split_name == "karpathy"
    assert listing.expected == {"train": 29_000, "val": 1_014, "test": 1_000}
    assert listing.warnings == []


@pytest.mark.parametrize("where", [".", "flickr30k", "flickr30k/flickr30k-images", "images"])
def test_flickr30k_from_a_folder_wherever_it_is(tmp_path: Path, where: str) -> None:
    pictures(tmp_path / where)
    (tmp_path / "flickr30k").mkdir(exist_ok=True)
    (tmp_path / "flickr30k" / "dataset_flickr30k.json.gz").write_bytes(gzip.compress(karpathy()))
    assert splits(find_source("flickr30k", tmp_path)) == SPLIT


def test_flickr30k_from_albef_lists(tmp_path: Path) -> None:
    archive(tmp_path / "flickr30k" / "images.zip")
    for split in ("train", "val", "test"):
        rows = [
            {"image": f"flickr30k-images/{name}", "caption": [f"{name} {k}" for k in range(5)]}
            for name in NAMES
            if SPLIT[name] == split
        ]
        if split == "train":
            rows = [row | {"caption": text} for row in rows for text in row["caption"]]  # type: ignore[operator, union-attr]
        (tmp_path / "flickr30k" / f"flickr30k_{split}.json").write_text(json.dumps(rows))
    listing = find_source("flickr30k", tmp_path)
    assert splits(listing) == SPLIT
    assert listing.split_name == "karpathy"


def test_token_file_alone_gets_a_named_split_by_chance(tmp_path: Path) -> None:
    pictures(tmp_path / "flickr30k-images")
    token(tmp_path / "results_20130124.token")
    listing = find_source("flickr30k", tmp_path, seed=3)
    assert listing.split_name == "random-hash-seed3"
    assert Counter(splits(listing).values()) == {"train": 2, "val": 1, "test": 1}
    assert splits(find_source("flickr30k", tmp_path, seed=3)) == splits(listing)
    assert "no Karpathy split file" in listing.warnings[0]
    assert listing.expected is None


def test_entities_lists_are_another_named_split(tmp_path: Path) -> None:
    pictures(tmp_path / "flickr30k" / "images")
    token(tmp_path / "results_20130124.token")
    lists = {"train": "2\n4\n", "val": "1\n", "test": "3\n"}
    for split, names in lists.items():
        (tmp_path / "flickr30k" / f"{split}.txt").write_text(names)
    entities = {"1.jpg": "val", "2.jpg": "train", "3.jpg": "test", "4.jpg": "train"}
    listing = find_source("flickr30k", tmp_path)
    assert (listing.split_name, splits(listing)) == ("entities", entities)
    assert listing.expected == {"train": 29_783, "val": 1_000, "test": 1_000}
    assert "'entities'" in listing.warnings[0]

    (tmp_path / "dataset_flickr30k.json").write_bytes(karpathy())
    assert splits(find_source("flickr30k", tmp_path)) == SPLIT  # Karpathy's is the default
    chosen = find_source("flickr30k", tmp_path, split_scheme="entities")
    assert (chosen.split_name, splits(chosen), chosen.warnings) == ("entities", entities, [])
    by_chance = find_source("flickr30k", tmp_path, split_scheme="random")
    assert by_chance.split_name == "random-hash-seed0"
    with pytest.raises(UsageError, match="allow no split 'official'.*karpathy, entities, random"):
        find_source("flickr30k", tmp_path, split_scheme="official")


def test_kaggle_download_with_captions_inside(tmp_path: Path) -> None:
    rows = [f"{name}| {k}| {name} {k}" for name in NAMES for k in range(5)]
    archive(tmp_path / "archive.zip", inside="flickr30k_images/flickr30k_images/")
    with zipfile.ZipFile(tmp_path / "archive.zip", "a") as content:
        text = "\n".join(["image_name| comment_number| comment", *rows])
        content.writestr("flickr30k_images/results.csv", text)
    assert set(splits(find_source("flickr30k", tmp_path))) == set(NAMES)


def test_flickr8k_with_its_own_lists(tmp_path: Path) -> None:
    pictures(tmp_path / "Flicker8k_Dataset", [*NAMES, "5.jpg"])
    text = tmp_path / "Flickr8k_text"
    text.mkdir()
    token(text / "Flickr8k.token.txt")
    for part, split in [("train", "train"), ("dev", "val"), ("test", "test")]:
        names = [name for name in NAMES if SPLIT[name] == split]
        (text / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names))
    listing = find_source("flickr8k", tmp_path)
    assert (listing.split_name, splits(listing)) == ("official", SPLIT)


def test_flickr8k_kaggle_captions(tmp_path: Path) -> None:
    pictures(tmp_path / "flickr8k" / "Images")
    rows = [f'{name},"{name}, {k}"' for name in NAMES for k in range(5)]
    (tmp_path / "flickr8k" / "captions.txt").write_text("\n".join(["image,caption", *rows]))
    listing = find_source("flickr8k", tmp_path)
    assert set(splits(listing)) == set(NAMES)
    assert listing.split_name == "random-hash-seed0"


COCO_SPLIT = {
    "COCO_train2014_000000000001.jpg": "train",
    "COCO_val2014_000000000002.jpg": "restval",
    "COCO_val2014_000000000003.jpg": "val",
    "COCO_val2014_000000000004.jpg": "test",
}


def test_coco_karpathy_over_two_zips_and_restval_is_train(tmp_path: Path) -> None:
    names = list(COCO_SPLIT)
    archive(tmp_path / "train2014.zip", names[:1], "train2014/")
    archive(tmp_path / "val2014.zip", names[1:], "val2014/")
    (tmp_path / "dataset_coco.json").write_bytes(karpathy(COCO_SPLIT, filepath="val2014"))
    listing = find_source("coco", tmp_path)
    assert list(splits(listing).values()) == ["train", "train", "val", "test"]
    assert listing.expected == {"train": 113_287, "val": 5_000, "test": 5_000}


def test_coco_pictures_of_2017_serve_the_karpathy_split(tmp_path: Path) -> None:
    pictures(tmp_path / "train2017", [f"00000000000{i}.jpg" for i in (1, 2, 3, 4)])
    (tmp_path / "dataset_coco.json").write_bytes(karpathy(COCO_SPLIT))
    assert set(splits(find_source("coco", tmp_path))) == set(COCO_SPLIT)


def test_coco_annotations_bring_their_own_split(tmp_path: Path) -> None:
    pictures(tmp_path / "coco" / "train2014", ["COCO_train2014_000000000001.jpg"])
    pictures(tmp_path / "coco" / "val2014", ["COCO_val2014_000000000002.jpg"])
    annotations = zipfile.ZipFile(tmp_path / "annotations_trainval2014.zip", "w")
    for number, split in enumerate(("train", "val"), start=1):
        content = {
            "images": [{"id": number, "file_name": f"COCO_{split}2014_00000000000{number}.jpg"}],
            "annotations": [{"image_id": number, "caption": f"a {k}"} for k in range(5)],
        }
        annotations.writestr(f"annotations/captions_{split}2014.json", json.dumps(content))
        annotations.writestr(f"annotations/instances_{split}2014.json", "{}")
    annotations.close()
    listing = find_source("coco", tmp_path)
    assert listing.split_name == "2014"
    assert sorted(splits(listing).values()) == ["train", "val"]
    assert listing.expected == {"train": 82_783, "val": 40_504}


def test_archives_of_other_data_sets_are_left_alone(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "dataset_flickr8k.json").write_bytes(karpathy())
    digest = find_source("flickr8k", tmp_path).digest
    archive(tmp_path / "train2014.zip", ["1.jpg"])
    assert find_source("flickr8k", tmp_path).digest == digest


def test_digest_follows_captions_and_pictures(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    (tmp_path / "dataset_flickr8k.json").write_bytes(karpathy())
    digest = find_source("flickr8k", tmp_path).digest
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "1.jpg")
    changed = find_source("flickr8k", tmp_path).digest
    (tmp_path / "dataset_flickr8k.json").write_bytes(karpathy(SPLIT | {"4.jpg": "val"}))
    assert len({digest, changed, find_source("flickr8k", tmp_path).digest}) == 3


def test_bad_captions_are_told(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    content = json.loads(karpathy())
    content["images"][0]["sentences"][2]["raw"] = "  \n"
    content["images"][1]["sentences"] = []
    content["images"].append(content["images"][2] | {"split": "test"})
    content["images"][3]["split"] = "holdout"
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(content))
    listing = find_source("flickr8k", tmp_path)
    assert {(bad.image_id, bad.reason) for bad in listing.rejected} == {
        ("1.jpg", "empty caption"),
        ("2.jpg", "no caption"),
        ("3.jpg", "in two splits"),
        ("4.jpg", "no split"),
    }
    assert {item.image_id: len(item.captions) for item in listing.items()} == {
        "1.jpg": 4,
        "3.jpg": 5,
    }
    assert listing.total == 4


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("flickr30k", ["flickr30k-images.tar.gz", "Illinois", "caption_datasets.zip", "Karpathy"]),
        ("flickr8k", ["Flickr8k_Dataset.zip", "caption_datasets.zip"]),
        ("coco", ["train2014.zip", "val2014.zip", "cocodataset.org"]),
    ],
)
def test_nothing_found_says_what_to_get_and_where_to_put_it(
    tmp_path: Path, source: str, words: list[str]
) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(NothingFound) as error:
            find_source(source, directory)
        for word in [*words, str(directory)]:
            assert word in str(error.value)


def test_half_of_it_found_says_which_half(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    with pytest.raises(NothingFound, match="no captions of flickr8k"):
        find_source("flickr8k", tmp_path)
    for name in NAMES:
        (tmp_path / "images" / name).unlink()
    (tmp_path / "dataset_flickr8k.json").write_bytes(karpathy())
    with pytest.raises(NothingFound, match="no pictures of flickr8k"):
        find_source("flickr8k", tmp_path)


def test_the_zip_of_captions_alone_is_no_picture(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as content:
        content.writestr("dataset_flickr30k.json", karpathy())
    with pytest.raises(NothingFound, match=r"no pictures of flickr30k .*flickr30k-images\.tar\.gz"):
        find_source("flickr30k", tmp_path)


def test_unknown_splits_of_a_split_file_are_told(tmp_path: Path) -> None:
    pictures(tmp_path / "images")
    file = tmp_path / "dataset_flickr8k.json"
    file.write_bytes(karpathy(SPLIT | {"4.jpg": "holdout"}))
    assert "unknown splits" in find_source("flickr8k", tmp_path).warnings[0]
    file.write_bytes(karpathy(dict.fromkeys(NAMES, "holdout")))
    with pytest.raises(UserError, match=r"splits in the files of flickr8k in .*: holdout \(known"):
        find_source("flickr8k", tmp_path)
    chosen = find_source("flickr8k", tmp_path, split_scheme="random")
    assert (chosen.split_name, chosen.warnings) == ("random-hash-seed0", [])


def test_a_folder_that_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures(tmp_path / "flickr8k" / "shut")
    (tmp_path / "dataset_flickr8k.json").write_bytes(karpathy())
    scan = os.scandir

    def scandir(place: Path) -> object:
        if Path(place).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(NothingFound, match=r"no pictures of .*cannot read the folder .*shut"):
        find_source("flickr8k", tmp_path)
    pictures(tmp_path / "images")
    assert "cannot read the folder" in find_source("flickr8k", tmp_path).warnings[0]


def test_unknown_source_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no source 'flickr30'; did you mean flickr30k"):
        find_source("flickr30", tmp_path)
    with pytest.raises(UsageError, match="choose from scenes, flickr30k, flickr8k, coco, folder"):
        find_source("?", tmp_path)


def test_partial_text() -> None:
    expected = {"train": 29_000, "val": 1_014, "test": 1_000}
    assert partial_text(expected, expected) == ""
    assert partial_text({"train": 29_000, "test": 900}, expected) == (
        "val is missing; test has 900 of 1,000 images"
    )
    assert partial_text({"train": 5}, None) == ""
