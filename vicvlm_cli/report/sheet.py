"""Contact sheets: the query above, the pictures found below it with score and caption."""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from vicvlm_cli.errors import UsageError, UserError

CELL = 224
GAP = 16
COLUMNS = 5
CAPTION_LINES = 3
INK, FAINT, PAPER = "#1a1a1a", "#666666", "#ffffff"
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


class Cell(NamedTuple):
    """One picture (None: it could not be read), the heading and the words below it."""

    picture: Image.Image | None
    heading: str
    caption: str


def contact_sheet(title: str, cells: list[Cell], query: Image.Image | None = None) -> Image.Image:
    """Draws the sheet: `title` and the query picture (if any) above, then rows of cells."""
    columns = max(1, min(COLUMNS, len(cells)))
    rows = -(-len(cells) // columns)
    width = GAP + max(columns, 3) * (CELL + GAP)  # room for a query of a few words
    heading, small = _font(18), _font(15)
    left = GAP + (CELL + GAP if query is not None else 0)
    lines = _wrapped(title, _font(26), width - left - GAP, 4)
    top = GAP + max(len(lines) * 34, CELL if query is not None else 0) + GAP
    cell_height = CELL + 30 + CAPTION_LINES * 20 + GAP
    sheet = Image.new("RGB", (width, top + rows * cell_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if query is not None:
        _paste(sheet, query, GAP, GAP)
    for i, line in enumerate(lines):
        draw.text((left, GAP + i * 34), line, fill=INK, font=_font(26))
    draw.line((GAP, top - GAP // 2, width - GAP, top - GAP // 2), fill="#cccccc")
    for i, cell in enumerate(cells):
        x = GAP + i % columns * (CELL + GAP)
        y = top + i // columns * cell_height + GAP // 2
        if cell.picture is not None:
            _paste(sheet, cell.picture, x, y)
        else:
            draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=FAINT)
            draw.text((x + GAP, y + CELL // 2), "picture is gone", fill=FAINT, font=small)
        draw.text((x, y + CELL + 4), cell.heading, fill=INK, font=heading)
        for line_number, line in enumerate(_wrapped(cell.caption, small, CELL, CAPTION_LINES)):
            draw.text((x, y + CELL + 28 + line_number * 20), line, fill=FAINT, font=small)
    return sheet


def check_sheet(path: Path) -> None:
    """Raises UsageError where Pillow cannot write a picture of this name, before any work."""
    known = Image.registered_extensions()
    if known.get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"the sheet {path} needs the name of a picture, such as {path.stem}.png")


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Writes the picture, whole or not at all. Raises UserError where that is not possible."""
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(beside)
        os.replace(beside, path)
    except (OSError, ValueError, OverflowError, struct.error) as error:
        if why := getattr(error, "strerror", None):
            raise UserError(f"cannot write the sheet {path}: {why}") from error
        # Pillow's: JPEG, WebP and GIF hold no picture as long as that of many hits.
        raise UserError(
            f"cannot write the sheet {path}, of {sheet.width:,} x {sheet.height:,} pixels "
            f"({error}): lower --top-k, or name it {path.stem}.png"
        ) from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def _paste(sheet: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """The whole picture, in the middle of a square of side CELL."""
    longest = max(picture.size)
    width, height = (max(1, round(CELL * side / longest)) for side in picture.size)
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    ImageDraw.Draw(sheet).rectangle((x, y, x + CELL - 1, y + CELL - 1), fill="#f2f2f2")
    sheet.paste(scaled, (x + (CELL - width) // 2, y + (CELL - height) // 2))


@cache
def _font(size: int) -> Font:
    # DejaVu knows far more scripts than the font inside Pillow, where it is installed.
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def _wrapped(text: str, font: Font, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of `width` pixels; an ellipsis stands for the rest."""
    lines: list[str] = []
    line = ""
    for word in printable(text).split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        # A word longer than a line, such as a path, is cut into pieces.
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last + "…"]


def printable(text: str) -> str:
    """The text without bytes that are not UTF-8, which file names may hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
