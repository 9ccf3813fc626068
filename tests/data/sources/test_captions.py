"""Every caption file that people have is read."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from vicvlm_cli.data.sources.captions import (
    as_list,
    known_splits,
    read_coco,
    read_image_list,
    read_jsonl,
    read_karpathy,
    read_names,
    read_token,
    split_of_name,
)
from vicvlm_cli.data.sources.files import RawFile
from vicvlm_cli.errors import UserError


def raw(folder: Path, name: str, content: object) -> RawFile:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name).write_text(text, encoding="utf-8")
    return RawFile(folder / name)


KARPATHY = {
    "dataset": "coco",
    "images": [
        {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "A dog."}, {"raw": "Ü."}]},
        {"filename": "b.jpg", "split": "val", "filepath": "val2014", "sentences": []},
    ],
}


def test_karpathy_plain_gzipped_and_in_a_zip(tmp_path: Path) -> None:
    expected = [("a.jpg", "train", ["A dog.", "Ü."]), ("val2014/b.jpg", "val", [])]
    assert read_karpathy(raw(tmp_path, "dataset_coco.json", KARPATHY)) == expected
    packed = tmp_path / "dataset_coco.json.gz"
    packed.write_bytes(gzip.compress(json.dumps(KARPATHY).encode()))
    assert read_karpathy(RawFile(packed)) == expected
    with zipfile.ZipFile(tmp_path / "caption_datasets.zip", "w") as archive:
        archive.writestr("dataset_coco.json", json.dumps(KARPATHY))
    member = RawFile(tmp_path / "caption_datasets.zip", "dataset_coco.json")
    assert read_karpathy(member) == expected


def test_albef_lists_hold_one_caption_or_several(tmp_path: Path) -> None:
    content = [
        {"image": "flickr30k-images/1.jpg", "caption": "one", "image_id": 0},
        {"image": "flickr30k-images/2.jpg", "caption": ["two", "too"]},
    ]
    file = raw(tmp_path, "flickr30k_val.json", content)
    assert read_image_list(file) == [
        ("flickr30k-images/1.jpg", "val", ["one"]),
        ("flickr30k-images/2.jpg", "val", ["two", "too"]),
    ]


def test_coco_annotations_are_joined_with_their_images(tmp_path: Path) -> None:
    content = {
        "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 8, "file_name": "y.jpg"}],
        "annotations": [
            {"image_id": 8, "id": 1, "caption": "why"},
            {"image_id": 7, "id": 2, "caption": "ex\n"},
            {"image_id": 8, "id": 3, "caption": "y"},
        ],
    }
    assert read_coco(raw(tmp_path, "captions_train2014.json", content)) == [
        ("x.jpg", "train", ["ex\n"]),
        ("y.jpg", "train", ["why", "y"]),
    ]


def test_token_files(tmp_path: Path) -> None:
    text = "1.jpg#0\tA dog .\n1.jpg#1\tA cat, a\ttab .\n\n2258277193_586949ec62.jpg.1#0\tPeople\n"
    assert read_token(raw(tmp_path, "results.token", text)) == [
        ("1.jpg", None, ["A dog ."]),
        ("1.jpg", None, ["A cat, a\ttab ."]),
        ("2258277193_586949ec62.jpg", None, ["People"]),
    ]
    with pytest.raises(UserError, match="line 1: expected 'name.jpg#0<tab>caption'"):
        read_token(raw(tmp_path, "other.token", "1.jpg A dog"))


def test_jsonl_with_caption_or_captions(tmp_path: Path) -> None:
    lines = [
        {"file_name": "a.jpg", "caption": "x"},
        {"file_name": "b.jpg", "captions": ["y", "z\u2028z"], "split": "dev"},
        {"file_name": "c.jpg", "text": None},
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    assert read_jsonl(raw(tmp_path, "metadata.jsonl", text)) == [
        ("a.jpg", None, ["x"]),
        ("b.jpg", "val", ["y", "z\u2028z"]),
        ("c.jpg", None, []),
    ]
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_jsonl(raw(tmp_path, "bad.jsonl", '{"file_name": "a", "caption": "b"}\n{"file'))
    for row in ('{"file_name": "a"}', '{"file_name": null, "caption": "x"}', "[]", "5"):
        with pytest.raises(UserError, match="line 1: needs file_name and caption"):
            read_jsonl(raw(tmp_path, "lame.jsonl", row))


def test_what_is_no_text_is_no_caption(tmp_path: Path) -> None:
    assert as_list(["a dog", None, {"raw": "it runs"}, {"raw": None}]) == ["a dog", "it runs"]
    assert as_list([5, {"id": 1}, ["x"]]) == ["", "", ""]  # told as empty captions
    said = [None, 5, "a dog"]
    karpathy = {"filename": "a.jpg", "split": "val", "sentences": [{"raw": raw} for raw in said]}
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": raw} for raw in said],
    }
    expected = [("a.jpg", "val", ["", "a dog"])]
    assert read_karpathy(raw(tmp_path, "d.json", {"images": [karpathy]})) == expected
    assert read_coco(raw(tmp_path, "captions_val2014.json", coco)) == expected
    albef = [{"image": "a.jpg", "caption": said}]
    assert read_image_list(raw(tmp_path, "flickr30k_val.json", albef)) == expected


def test_a_split_keeps_its_unknown_name_until_it_is_told(tmp_path: Path) -> None:
    splits = ["training", "testing", "eval", " Holdout ", "", None, 0]
    text = "\n".join(
        json.dumps({"file_name": f"{i}.jpg", "caption": "x", "split": split})
        for i, split in enumerate(splits)
    )
    entries = read_jsonl(raw(tmp_path, "captions.jsonl", text))
    given = ["train", "test", "val", "Holdout", None, None, "0"]
    assert [entry.split for entry in entries] == given
    known, unknown = known_splits(entries)
    assert [entry.split for entry in known] == ["train", "test", "val", None, None, None, None]
    assert unknown == ["Holdout", "0"]


def test_jsonl_lines_end_in_any_way(tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": name, "caption": name}) for name in "ab"]
    for end in ("\r", "\r\n"):
        (tmp_path / "captions.jsonl").write_bytes(end.join(rows).encode())
        entries = read_jsonl(RawFile(tmp_path / "captions.jsonl"))
        assert [entry.captions for entry in entries] == [["a"], ["b"]]


def test_split_lists(tmp_path: Path) -> None:
    assert read_names(raw(tmp_path, "train.txt", "1\n2.jpg \n\n")) == ["1", "2.jpg"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("flickr30k_train.json", "train"),
        ("captions_val2014.json", "val"),
        ("Flickr_8k.devImages.txt", "val"),
        ("Flickr_8k.testImages.txt", "test"),
        ("dev.txt", "val"),
        ("constrained.json", None),
    ],
)
def test_a_name_tells_the_split(name: str, split: str | None) -> None:
    assert split_of_name(name) == split


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="d.json is not valid JSON"):
        read_karpathy(raw(tmp_path, "d.json", '{"images": ['))
    with pytest.raises(UserError, match="not a Karpathy split file"):
        read_karpathy(raw(tmp_path, "d.json", [1, 2]))
    with pytest.raises(UserError, match="not a COCO captions file"):
        read_coco(raw(tmp_path, "captions_val2014.json", {"info": 1}))
    with pytest.raises(UserError, match="not a list of"):
        read_image_list(raw(tmp_path, "coco_val.json", {"a": 1}))
    with pytest.raises(UserError, match="not a list of"):
        read_image_list(raw(tmp_path, "coco_val.json", [{"image": 5, "caption": "x"}]))
    nested = "[" * 100_000
    with pytest.raises(UserError, match="d.json is not valid JSON"):
        read_karpathy(raw(tmp_path, "d.json", nested))
    with pytest.raises(UserError, match="line 1: not valid JSON"):
        read_jsonl(raw(tmp_path, "d.jsonl", nested))
    (tmp_path / "e.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="cannot read .*fetch it again"):
        read_karpathy(RawFile(tmp_path / "e.json.gz"))
    (tmp_path / "latin.txt").write_bytes("Ü".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_names(RawFile(tmp_path / "latin.txt"))
