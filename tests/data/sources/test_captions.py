"""Every caption file that people have is read."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pytest

from vicvlm_cli.data.sources.captions import (
    read_coco,
    read_image_list,
    read_jsonl,
    read_karpathy,
    read_names,
    read_table,
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


def test_kaggle_results_with_its_broken_row(tmp_path: Path) -> None:
    text = (
        "image_name| comment_number| comment\n"
        '1.jpg| 0| "Two" men , one | hat .\n'
        "2.jpg| 4   A dog runs .\n"
    )
    entries = read_table(raw(tmp_path, "results.csv", text))
    assert [entry.image for entry in entries] == ["1.jpg", "2.jpg"]
    assert " ".join(entries[0].captions[0].split()) == '"Two" men , one hat .'
    assert entries[1].captions == ["A dog runs ."]


def test_kaggle_captions_with_quotes_and_commas(tmp_path: Path) -> None:
    text = 'image,caption\r\n1.jpg,"A dog, a ""cat"" ."\r\n2.jpg,Plain .\r\n'
    assert read_table(raw(tmp_path, "captions.txt", text)) == [
        ("1.jpg", None, ['A dog, a "cat" .']),
        ("2.jpg", None, ["Plain ."]),
    ]


HEAD = "file_name,caption,lang\n"


def test_a_delimiter_in_a_caption_without_quotes_is_its_own_or_is_told(tmp_path: Path) -> None:
    text = 'lang,file_name,caption\nen,a.jpg,a dog, wet\nen,b.jpg,a cat,,\nen,c.jpg,"x, y"\n'
    entries = read_table(raw(tmp_path, "captions.csv", text))
    assert [entry.captions for entry in entries] == [["a dog, wet"], ["a cat"], ["x, y"]]
    text = 'file_name,captions\na.jpg,["x", "y"]\n'
    assert read_table(raw(tmp_path, "captions.csv", text))[0].captions == ["x", "y"]
    for row in ("a.jpg,a dog, wet,en", "a.jpg,a dog, wet,"):
        with pytest.raises(UserError) as error:
            read_table(raw(tmp_path, "captions.csv", f'{HEAD}b.jpg,"two\nlines",en\n{row}\n'))
        assert str(error.value) == (
            f"{tmp_path / 'captions.csv'}, line 4: 4 cells below a header of 3, so that it is open "
            "where the caption ends: if a ',' is part of it, put such a caption in quotation marks"
        )
    text = "file_name\tcaption\tlang\na.jpg\ta\tdog\ten\n"
    with pytest.raises(UserError, match="line 2: 4 cells .* a tab is part of it, put such"):
        read_table(raw(tmp_path, "captions.tsv", text))
    with pytest.raises(UserError, match=r"line 2: 4 cells .* a '\|' is part of it, take it out"):
        read_table(raw(tmp_path, "captions.csv", "image|caption|lang\na.jpg|a | dog|en\n"))


def test_a_row_without_its_last_cell_keeps_its_caption(tmp_path: Path) -> None:
    text = f"{HEAD}a.jpg,2 dogs on a beach\nb.jpg,two,en\n"
    entries = read_table(raw(tmp_path, "captions.csv", text))
    assert [entry.captions for entry in entries] == [["2 dogs on a beach"], ["two"]]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        *((name, True) for name in ("caption_de", "captions", "caption2", "alt_text", "comment")),
        *((name, False) for name in ("caption_id", "comment_number", "texture", "split", "lang")),
    ],
)
def test_further_captions_that_are_not_read_are_told(tmp_path: Path, name: str, told: bool) -> None:
    read, name = ("captions", "caption") if name == "captions" else ("caption", name)
    warnings: list[str] = []
    table = raw(tmp_path, "captions.csv", f"file_name,{name},{read}\na.jpg,ein Hund,a dog\n")
    lines = raw(tmp_path, "captions.jsonl", {"file_name": "a.jpg", read: "a dog", name: "Hund"})
    assert read_table(table, warnings)[0].captions == ["a dog"]
    assert read_jsonl(lines, warnings)[0].captions == ["a dog"]
    assert len(warnings) == 2 * told
    for warning, file in zip(warnings, (table, lines), strict=False):
        assert warning.startswith(f"{file}: captions are read from {read} alone, not from {name};")


def test_a_caption_of_several_lines_is_one_but_an_open_quote_is_told(tmp_path: Path) -> None:
    head = 'file_name,caption\na.jpg,"one\ntwo"\n'
    assert read_table(raw(tmp_path, "captions.csv", head)) == [("a.jpg", None, ["one\ntwo"])]
    for tail in (
        'b.jpg,"open\nc.jpg,three\n',  # up to the end of the file
        'b.jpg,"open\nc.jpg,"three, four"\n',  # up to the next quotation mark
        'b.jpg,"open\n' + "c.jpg,three\n" * 15_000 + 'd.jpg,"four"\n',  # beyond csv's limit
    ):
        with pytest.raises(UserError, match=r"captions\.csv, line 4: no row of a table .*close"):
            read_table(raw(tmp_path, "captions.csv", head + tail))


def test_tables_with_splits_lists_and_a_byte_order_mark(tmp_path: Path) -> None:
    text = '\ufefffile_name\tcaptions\tsplit\na.png\t["x", "y"]\tvalidation\nb.png\tz\ttest\n'
    assert read_table(raw(tmp_path, "captions.tsv", text)) == [
        ("a.png", "val", ["x", "y"]),
        ("b.png", "test", ["z"]),
    ]
    with pytest.raises(UserError, match="needs a header with file_name and caption.*a, b"):
        read_table(raw(tmp_path, "bad.csv", "a,b\n1,2\n"))


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
    with pytest.raises(UserError, match="line 1: needs file_name and caption"):
        read_jsonl(raw(tmp_path, "lame.jsonl", '{"file_name": "a"}'))


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
    (tmp_path / "e.json.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(UserError, match="cannot read .*fetch it again"):
        read_karpathy(RawFile(tmp_path / "e.json.gz"))
    (tmp_path / "latin.txt").write_bytes("Ü".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_names(RawFile(tmp_path / "latin.txt"))
