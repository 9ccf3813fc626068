"""Tables of captions are read, and what may be misread is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vicvlm_cli.data.sources.caption_tables import read_table
from vicvlm_cli.data.sources.captions import read_jsonl
from vicvlm_cli.data.sources.files import RawFile
from vicvlm_cli.errors import UserError


def raw(folder: Path, name: str, text: str) -> RawFile:
    (folder / name).write_text(text, encoding="utf-8", newline="")
    return RawFile(folder / name)


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
    row = {"file_name": "a.jpg", read: "a dog", name: "Hund"}
    lines = raw(tmp_path, "captions.jsonl", json.dumps(row))
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


def test_rows_that_may_hold_several_captions_are_told(tmp_path: Path) -> None:
    text = 'file_name,caption\na.jpg,"a dog","a brown dog","it runs"\nb.jpg,a cat,,\nc.jpg,"x, y"\n'
    warnings: list[str] = []
    entries = read_table(raw(tmp_path, "captions.csv", text), warnings)
    assert [entry.captions for entry in entries] == [
        ["a dog,a brown dog,it runs"],
        ["a cat"],
        ["x, y"],
    ]
    assert warnings == [
        f"{tmp_path / 'captions.csv'}, line 2: 4 cells below a header of 2 are read as one "
        "caption: give each caption a row of its own, or if a ',' is part of it, put such a "
        "caption in quotation marks"
    ]
    text = f"{text}d.jpg,one,two\ne.jpg,one,two\n"
    read_table(raw(tmp_path, "captions.csv", text), warnings)
    assert "line 2 and 2 more: 4 cells" in warnings[1]
    read_table(raw(tmp_path, "captions.csv", 'file_name,captions\na.jpg,["x", "y"]\n'), warnings)
    assert len(warnings) == 2


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_lines_end_in_any_way(tmp_path: Path, end: str) -> None:
    text = end.join(["file_name,caption", "a.jpg,a dog", 'b.jpg,"two', 'lines"', ""])
    assert read_table(raw(tmp_path, "captions.csv", text)) == [
        ("a.jpg", None, ["a dog"]),
        ("b.jpg", None, ["two\nlines"]),
    ]


def test_a_long_header_is_cut_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_table(raw(tmp_path, "captions.csv", ",".join(["x" * 9999, *"abcdefghijk"])))
    told = f"(it has: {'x' * 39}…, a, b, c, d, e, f, g, h, i and 2 more)"
    assert str(error.value).endswith(told)


def test_brackets_without_end_are_a_caption(tmp_path: Path) -> None:
    caption = "[" * 100_000
    (entry,) = read_table(raw(tmp_path, "captions.csv", f"file_name,captions\na.jpg,{caption}"))
    assert entry.captions == [caption]
