from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from vicvlm_cli.errors import UsageError, UserError
from vicvlm_cli.report import sheet
from vicvlm_cli.report.sheet import CELL, GAP, Cell, check_sheet, contact_sheet, save_sheet

RED, BLUE = (200, 10, 20), (20, 10, 200)


def picture(colour, size=(90, 30)):
    return Image.new("RGB", size, colour)


def cells(number: int) -> list[Cell]:
    return [Cell(picture(RED), f"{i}.  0.300", "a red ball " * i) for i in range(1, number + 1)]


def count(image: Image.Image, colour) -> int:
    return int((np.asarray(image) == colour).all(axis=2).sum())


@pytest.mark.parametrize(("number", "columns", "rows"), [(1, 3, 1), (5, 5, 1), (12, 5, 3)])
def test_every_picture_is_drawn_whole_in_a_grid(number, columns, rows):
    drawn = contact_sheet("a red ball", cells(number))
    assert drawn.width == GAP + columns * (CELL + GAP)
    one_row = contact_sheet("a red ball", cells(1)).height
    assert drawn.height > one_row * rows * 0.7
    # 90 x 30 scaled to the cell's width, colours unchanged inside.
    assert count(drawn, RED) == pytest.approx(number * CELL * CELL / 3, rel=0.05)


def test_the_query_picture_stands_above():
    drawn = contact_sheet("like this", cells(2), picture(BLUE, (50, 50)))
    blue = (np.asarray(drawn) == BLUE).all(axis=2)
    assert blue.sum() == pytest.approx(CELL * CELL, rel=0.02)
    red = (np.asarray(drawn) == RED).all(axis=2)
    assert np.nonzero(blue)[0].max() < np.nonzero(red)[0].min()


def test_the_thinnest_picture_is_a_line():
    for size in ((4480, 3), (3, 4480)):
        drawn = contact_sheet("a line", [Cell(picture(RED, size), "", "")])
        assert count(drawn, RED) == CELL


def test_words_are_drawn_and_a_missing_picture_leaves_a_frame():
    blank = contact_sheet("", [Cell(None, "", "")])
    titled = contact_sheet("a dog", [Cell(None, "", "")])
    captioned = contact_sheet("", [Cell(None, "1.  0.2", "")])
    assert np.asarray(blank).min() < 200  # "picture is gone"
    assert (np.asarray(titled)[: GAP + 30] < 100).any()
    assert not (np.asarray(blank)[: GAP + 10] < 100).any()
    dark = (np.asarray(captioned).astype(int) < 60).sum() - (np.asarray(blank) < 60).sum()
    assert dark > 20


def test_long_words_and_long_texts_stay_within_their_lines():
    font = sheet._font(15)
    lines = sheet._wrapped("photos/" + "x" * 400 + " and more words " * 30, font, 200, 3)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 200 for line in lines)
    assert sheet._wrapped("two words", font, 200, 3) == ["two words"]
    assert sheet._wrapped("", font, 200, 3) == []
    assert sheet._wrapped("stray \udce9 byte", font, 200, 3) == ["stray ? byte"]


def test_there_is_a_font_where_none_is_installed(monkeypatch):
    def gone(*_):
        raise OSError

    monkeypatch.setattr(ImageFont, "truetype", gone)
    sheet._font.cache_clear()
    try:
        # Pillow's own font is loaded through truetype too, hence the stand-in.
        monkeypatch.setattr(ImageFont, "load_default", lambda size: f"own {size}")
        assert sheet._font(15) == "own 15"
    finally:
        sheet._font.cache_clear()


def test_a_sheet_is_written_whole_into_a_new_folder(tmp_path):
    path = tmp_path / "new" / "hits.png"
    save_sheet(contact_sheet("a", cells(1)), path)
    with Image.open(path) as written:
        assert written.format == "PNG"
    assert [p.name for p in path.parent.iterdir()] == ["hits.png"]


@pytest.mark.parametrize(
    "name, height", [("hits.webp", 17_000), ("hits.gif", 70_000), ("hits.jpg", 70_000)]
)
def test_a_sheet_too_long_for_its_kind_is_a_sentence(tmp_path, name, height):
    words = rf"sheet .*{name}, of 8 x {height:,} pixels .*: lower --top-k, or name it hits\.png"
    with pytest.raises(UserError, match=words):
        save_sheet(picture(RED, (8, height)), tmp_path / name)
    assert not any(tmp_path.iterdir())


def test_names_that_are_no_picture_are_refused_before_work(tmp_path):
    for name in ("sheet", "sheet.txt", "sheet.mp4"):
        with pytest.raises(UsageError, match="such as sheet.png"):
            check_sheet(tmp_path / name)
    check_sheet(tmp_path / "sheet.JPG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the sheet"):
        save_sheet(picture(RED), tmp_path / "file" / "sheet.png")
