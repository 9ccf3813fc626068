"""Readers for the caption files that people have. Every one returns a list of `Captioned`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from vicvlm_cli.data.sources.files import RawFile
from vicvlm_cli.data.sources.listing import SPLIT_ALIASES, SPLITS
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
    split: str | None  # as `given_split` reads it
    captions: list[str]


def read_text(file: RawFile) -> str:
    """The text of a file, its lines ended by "\\n" however the file ends them."""
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(file: RawFile) -> Any:
    try:
        return json.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # the last: brackets without end
        raise UserError(f"{file} is not valid JSON ({error}); fetch it again") from None


def read_karpathy(file: RawFile) -> list[Captioned]:
    """dataset_*.json: {"images": [{"filename", "split", "sentences": [{"raw"}]}]}."""
    content = read_json(file)
    try:
        return [
            Captioned(
                "/".join(filter(None, (image.get("filepath"), _file_name(image["filename"])))),
                given_split(image["split"]),
                as_list([sentence["raw"] for sentence in image["sentences"]]),
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
            Captioned(_file_name(entry["image"]), split, as_list(entry["caption"]))
            for entry in read_json(file)
        ]
    except (KeyError, TypeError):
        raise _foreign(file, "a list of {image, caption}") from None


def read_coco(file: RawFile) -> list[Captioned]:
    """captions_train2014.json: {"images": [{"id", "file_name"}], "annotations": [{"image_id"}]}."""
    content = read_json(file)
    split = split_of_name(file.name)
    try:
        said: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            said[annotation["image_id"]].append(annotation["caption"])
        return [
            Captioned(_file_name(image["file_name"]), split, as_list(said[image["id"]]))
            for image in content["images"]
        ]
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
            name = next(entry[key] for key in IMAGE_KEYS if entry.get(key) is not None)
            caption = next(key for key in CAPTION_KEYS if key in entry)
        except (ValueError, RecursionError):
            raise UserError(f"{file}, line {number}: not valid JSON") from None
        except (StopIteration, TypeError, AttributeError):
            raise UserError(f"{file}, line {number}: needs file_name and caption") from None
        read.add(caption)
        keys |= dict.fromkeys(entry)
        split = given_split(entry.get("split"))
        result.append(Captioned(str(name), split, as_list(entry[caption])))
    tell_unread(file, keys, read, warnings)
    return result


def read_names(file: RawFile) -> list[str]:
    """A split list: a file name (with or without ending) a line."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]


def split_name(name: str) -> str | None:
    """train, val or test; None for an empty or unknown name."""
    name = str(name).strip().lower()
    name = SPLIT_ALIASES.get(name, name)
    return name if name in SPLITS else None


def given_split(value: Any) -> str | None:
    """train, val or test; an unknown name as it was given; None where there is none."""
    name = "" if value is None else str(value).strip()
    return split_name(name) or name or None


def known_splits(entries: Iterable[Captioned]) -> tuple[list[Captioned], list[str]]:
    """The entries without the splits that are none of train, val and test, and what those are."""
    entries = list(entries)
    unknown = dict.fromkeys(e.split for e in entries if e.split and e.split not in SPLITS)
    return [e._replace(split=None) if e.split in unknown else e for e in entries], list(unknown)


def split_of_name(name: str) -> str | None:
    """The split that a file's name speaks of: flickr30k_val.json, Flickr_8k.devImages.txt."""
    found = re.search(r"(?<![a-z])(train|validation|val|dev|test)(images|[^a-z]|$)", name.lower())
    return split_name(found[1]) if found else None


def as_list(value: Any) -> list[str]:
    """A caption or a list of captions, as a list of texts.

    Nothing (null) is no caption, what is no text an empty one.
    """
    values = value if isinstance(value, list) else [value]
    texts = [text["raw"] if isinstance(text, dict) and "raw" in text else text for text in values]
    return [text if isinstance(text, str) else "" for text in texts if text is not None]


def tell_unread(
    file: RawFile, names: Iterable[str], read: set[str], warnings: list[str] | None
) -> None:
    """Put into `warnings` which of `names` look like captions beside those that are `read`."""
    others = [name for name in names if name not in read and _FURTHER.fullmatch(name)]
    if others and warnings is not None:
        warnings.append(
            f"{file}: captions are read from {' and '.join(sorted(read))} alone, not from "
            f"{', '.join(others)}; give each of these a row of its own to have it read"
        )


def _file_name(value: Any) -> str:
    """`value`. Raises TypeError for what is no text."""
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _foreign(file: RawFile, what: str) -> UserError:
    return UserError(f"{file} is not {what}; replace it, or move it away")
