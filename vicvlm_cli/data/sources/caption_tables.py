"""Readers for tables of captions: .csv, .tsv, Kaggle's results.csv and captions.txt."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator

from vicvlm_cli.data.sources.captions import (
    CAPTION_KEYS,
    IMAGE_KEYS,
    Captioned,
    as_list,
    given_split,
    read_text,
    tell_unread,
)
from vicvlm_cli.data.sources.files import RawFile
from vicvlm_cli.data.sources.listing import some
from vicvlm_cli.errors import UserError


def read_table(file: RawFile, warnings: list[str] | None = None) -> list[Captioned]:
    """.csv, .tsv, Kaggle's results.csv (with '|') and captions.txt: columns found by the header.

    Columns of further captions, which are not read, and rows that may hold several are told in
    `warnings`. Raises UserError: no such columns, a quotation mark that swallows other rows, or a
    row that has more cells than the header and whose caption is not the last.
    """
    text = read_text(file)
    header, _, body = text.partition("\n")
    delimiter = max("\t|;,", key=header.count) if not file.name.endswith(".tsv") else "\t"
    columns = [column.strip().strip('"').lower() for column in header.split(delimiter)]
    image = next((columns.index(key) for key in IMAGE_KEYS if key in columns), None)
    caption = next((columns.index(key) for key in CAPTION_KEYS if key in columns), None)
    if image is None or caption is None:
        raise UserError(
            f"{file} needs a header with file_name and caption (it has: {some(columns)})"
        )
    tell_unread(file, columns, {columns[caption]}, warnings)
    split = columns.index("split") if "split" in columns else None
    result = []
    wide = []  # rows whose caption may be several, or have commas of its own: the line, the cells
    for line, row in _rows(file, body, delimiter):
        if not any(cell.strip() for cell in row):
            continue
        if delimiter == "|":
            row = _mended(row, len(columns))
        cells, beyond = len(row), row[len(columns) :]
        if beyond:
            if caption < len(columns) - 1:
                raise UserError(
                    f"{file}, line {line}: {cells} cells below a header of {len(columns)}, so that "
                    f"it is open where the caption ends: {_advice(delimiter)}"
                )
            # What a caption in the last column holds of the delimiter is its own, but for Kaggle's
            # stray '|' and for the empty cells that some programs end a row with.
            glue = " " if delimiter == "|" else delimiter
            row = [*row[:caption], glue.join(row[caption:]).rstrip(f"{delimiter} ")]
        cell = row[caption].strip() if caption < len(row) else ""
        name = row[image].strip() if image < len(row) else ""
        said = _json_list(cell) if columns[caption] == "captions" else [cell]
        if said == [cell] and any(map(str.strip, beyond)):
            wide.append((line, cells))
        where = given_split(row[split]) if split is not None and split < len(row) else None
        result.append(Captioned(name, where, said))
    if wide and warnings is not None:
        line, cells = wide[0]
        more = f" and {len(wide) - 1:,} more" if len(wide) > 1 else ""
        warnings.append(
            f"{file}, line {line}{more}: {cells} cells below a header of {len(columns)} are read "
            f"as one caption: give each caption a row of its own, or {_advice(delimiter)}"
        )
    return result


def _json_list(cell: str) -> list[str]:
    """A table's cell that holds one caption, or a JSON list of captions."""
    try:
        value = json.loads(cell) if cell.startswith("[") else cell
    except (ValueError, RecursionError):
        value = cell
    return as_list(value)


def _rows(file: RawFile, body: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table below its header, each with the number of its first line."""
    lines = list(io.StringIO(body, newline=""))
    if delimiter == "|":  # Kaggle's results.csv quotes nothing, but some captions begin with "
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter)
    while True:
        first = reader.line_num
        try:
            row = next(reader, None)
            if reader.line_num > first + 1:
                # An unclosed quotation mark goes on to the next one, or to the end: what follows it
                # there is a delimiter only where the caption was meant to have several lines.
                next(csv.reader(lines[first : reader.line_num], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{file}, line {first + 2}: no row of a table ({error}); close the quotation mark "
                'that opens there, or write "" for one that belongs to the caption'
            ) from None
        if row is None:
            return
        yield first + 2, row


def _mended(row: list[str], columns: int) -> list[str]:
    """Kaggle's results.csv has one row without its second '|'."""
    if len(row) == columns - 1 and (found := re.match(r"\s*(\d+)\s+(.+)", row[-1])):
        return [*row[:-1], found[1], found[2]]
    return row


def _advice(delimiter: str) -> str:
    """What to do with a delimiter that belongs to a caption."""
    sign = "tab" if delimiter == "\t" else f"'{delimiter}'"
    mend = "take it out" if delimiter == "|" else "put such a caption in quotation marks"
    return f"if a {sign} is part of it, {mend}"
