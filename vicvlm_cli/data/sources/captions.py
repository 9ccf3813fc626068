"""Readers for the caption files that people have. Every one returns a list of `Captioned`."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vicvlm_cli.data.sources.files import RawFile
from vicvlm_cli.data.sources.listing import SPLIT_ALIASES
from vicvlm_cli.errors import UserError

IMAGE_KEYS = ("file_name", "filename", "image_name", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text", "comment", "sentences")
# Further captions: caption_de, text2, alt_caption; but not caption_id or comment_number.
_FURTHER = re.compile(
    r"(\w+[_ -])?(caption|text|comment|sentence)s?"
    r"(\d+|[_ -](?!id|num|count|len|lang|score|source)\w+)?",
    re.IGNORECASE,
)


class Captioned(NamedTuple):
    """Captions of one picture, in one place of a file; the same picture may come again."""

    image: str  # file name, perhaps with folders
    split: str | None
    captions: list[str]


def read_text(file: RawFile) -> str:
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def read_json(file: RawFile) -> Any:
    try:
        return json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again") from None


def read_karpathy(file: RawFile) -> list[Captioned]:
    """dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    content = read_json(file)
    try:
        return [
            Captioned(
                "/".join(filter(None, (image.get("filepath"), image["filename"]))),
                split_name(image["split"]),
                [sentence["raw"] for sentence in image["sentences"]],
            )
            for image in content["images"]
        ]
    except (KeyError, TypeError, AttributeError):
        raise _foreign(file, "a Karpathy split file") from None


def read_image_list(file: RawFile) -> list[Captioned]:
    """ALBEF's flickr30k_train.json: [{"image", "caption": text or list}], named by its split."""
    split = split_of_name(file.name)
    try:
        return [
            Captioned(entry["image"], split, as_list(entry["caption"])) for entry in read_json(file)
        ]
    except (KeyError, TypeError):
        raise _foreign(file, "a list of {image, caption}") from None


def read_coco(file: RawFile) -> list[Captioned]:
    """captions_train2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id"}]}."""
    content = read_json(file)
    split = split_of_name(file.name)
    try:
        said: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            said[annotation["image_id"]].append(annotation["caption"])
        return [Captioned(i["file_name"], split, said[i["id"]]) for i in content["images"]]
    except (KeyError, TypeError):
        raise _foreign(file, "a COCO captions file") from None


def read_token(file: RawFile) -> list[Captioned]:
    """results_20130124.token, Flickr8k.token.txt: 'name.jpg#0<tab>caption' a line."""
    result = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{file}, line {number}: expected 'name.jpg#0<tab>caption'")
        # A few names of Flickr8k read 'name.jpg.1#0'.
        name = re.sub(r"(\.jpe?g)\.\d+$", r"\1", name.split("#")[0].strip(), flags=re.IGNORECASE)
        result.append(Captioned(name, None, [caption]))
    return result


def read_table(file: RawFile, warnings: list[str] | None = None) -> list[Captioned]:
    """.csv, .tsv, Kaggle's results.csv (with '|') and captions.txt: columns found by the header.

    Columns of further captions, which are not read, are told in `warnings`. Raises UserError: no
    such columns, a quotation mark that swallows other rows, or a row that has more cells than the
    header and whose caption is not the last.
    """
    text = read_text(file)
    header, _, body = text.partition("\n")
    delimiter = max("\t|;,", key=header.count) if not file.name.endswith(".tsv") else "\t"
    columns = [column.strip().strip('"').lower() for column in header.split(delimiter)]
    image = next((columns.index(key) for key in IMAGE_KEYS if key in columns), None)
    caption = next((columns.index(key) for key in CAPTION_KEYS if key in columns), None)
    if image is None or caption is None:
        raise UserError(
            f"{file} needs a header with file_name and caption (it has: {', '.join(columns)})"
        )
    _tell_unread(file, columns, {columns[caption]}, warnings)
    split = columns.index("split") if "split" in columns else None
    result = []
    for line, row in _rows(file, body, delimiter):
        if not any(cell.strip() for cell in row):
            continue
        if delimiter == "|":
            row = _mended(row, len(columns))
        if len(row) > len(columns):
            if caption < len(columns) - 1:
                raise _too_many(file, line, len(row), len(columns), delimiter)
            # What a caption in the last column holds of the delimiter is its own, but for Kaggle's
            # stray '|' and for the empty cells that some programs end a row with.
            glue = " " if delimiter == "|" else delimiter
            row = [*row[:caption], glue.join(row[caption:]).rstrip(f"{delimiter} ")]
        cell = row[caption].strip() if caption < len(row) else ""
        name = row[image].strip() if image < len(row) else ""
        said = json_list(cell) if columns[caption] == "captions" else [cell]
        where = split_name(row[split]) if split is not None and split < len(row) else None
        result.append(Captioned(name, where, said))
    return result


def read_jsonl(file: RawFile, warnings: list[str] | None = None) -> list[Captioned]:
    """captions.jsonl, metadata.jsonl: an object a line with file_name, caption(s), maybe split.

    Keys of further captions, which are not read, are told in `warnings`.
    """
    result = []
    keys: dict[str, None] = {}  # a set that keeps the order
    read = set()
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name = next(entry[key] for key in IMAGE_KEYS if key in entry)
            caption = next(key for key in CAPTION_KEYS if key in entry)
        except ValueError:
            raise UserError(f"{file}, line {number}: not valid JSON") from None
        except (StopIteration, TypeError):
            raise UserError(f"{file}, line {number}: needs file_name and caption") from None
        read.add(caption)
        keys |= dict.fromkeys(entry)
        split = split_name(entry["split"]) if entry.get("split") else None
        result.append(Captioned(str(name), split, as_list(entry[caption])))
    _tell_unread(file, keys, read, warnings)
    return result


def read_names(file: RawFile) -> list[str]:
    """A split list: a file name (with or without ending) a line."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def read_all(files: Iterable[RawFile], reader: Any) -> list[Captioned]:
    return [entry for file in files for entry in reader(file)]


def split_name(name: str) -> str | None:
    """train, val or test; None for an empty or unknown name."""
    name = str(name).strip().lower()
    name = SPLIT_ALIASES.get(name, name)
    return name if name in ("train", "val", "test") else None


def split_of_name(name: str) -> str | None:
    """The split that a file's name speaks of: flickr30k_val.json, Flickr_8k.devImages.txt."""
    found = re.search(r"(?<![a-z])(train|validation|val|dev|test)(images|[^a-z]|$)", name.lower())
    return split_name(found[1]) if found else None


def as_list(value: Any) -> list[str]:
    """A caption or a list of captions, as a list of texts (nothing: no caption)."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [
        str(text["raw"] if isinstance(text, dict) and "raw" in text else text) for text in values
    ]


def json_list(cell: str) -> list[str]:
    """A table's cell that holds one caption, or a JSON list of captions."""
    try:
        value = json.loads(cell) if cell.startswith("[") else cell
    except ValueError:
        value = cell
    return as_list(value)


def _tell_unread(
    file: RawFile, names: Iterable[str], read: set[str], warnings: list[str] | None
) -> None:
    """Put into `warnings` which of `names` look like captions beside those that are `read`."""
    others = [name for name in names if name not in read and _FURTHER.fullmatch(name)]
    if others and warnings is not None:
        warnings.append(
            f"{file}: captions are read from {' and '.join(sorted(read))} alone, not from "
            f"{', '.join(others)}; give each of these a row of its own to have it read"
        )


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


def _too_many(file: RawFile, line: int, cells: int, columns: int, delimiter: str) -> UserError:
    sign = "tab" if delimiter == "\t" else f"'{delimiter}'"
    mend = "take it out" if delimiter == "|" else "put such a caption in quotation marks"
    return UserError(
        f"{file}, line {line}: {cells} cells below a header of {columns}, so that it is open where "
        f"the caption ends: if a {sign} is part of it, {mend}"
    )


def _foreign(file: RawFile, what: str) -> UserError:
    return UserError(f"{file} is not {what}; replace it, or move it away")
