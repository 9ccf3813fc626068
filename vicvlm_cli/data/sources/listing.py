"""What every raw source hands to `prepare`: captioned items, and a way to stream the pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from PIL import Image

from vicvlm_cli.data.images import ImageSource
from vicvlm_cli.errors import UsageError, UserError

RANDOM = "random"
# Reasons that leave out captions alone: of a picture that has none left, "no caption" is told too.
OF_CAPTIONS = ("empty caption", "caption is not UTF-8", "in two splits")
SPLITS = ("train", "val", "test")
SPLIT_ALIASES = {
    **dict.fromkeys(("dev", "eval", "valid", "validation"), "val"),
    **{"restval": "train", "training": "train", "testing": "test"},
}


class NothingFound(UserError):
    """There are no raw files."""


@dataclass(frozen=True)
class Item:
    """One captioned picture of a split."""

    image_id: str
    split: str
    captions: tuple[str, ...]
    path: str = ""  # where the picture came from


@dataclass(frozen=True)
class Rejected:
    """Something left out, and why."""

    image_id: str
    split: str
    reason: str

    @property
    def of_caption(self) -> bool:
        """Whether this alone leaves the picture in."""
        return self.reason in OF_CAPTIONS


# A picture, or how to draw or fetch it in a worker thread (either may raise BadImage).
Picture = ImageSource | Callable[[], ImageSource]


@dataclass
class Listing:
    """A raw data set that has been found and whose captions have been read.

    `stream(done)` yields every picture whose image_id is not in `done`, always in the same order;
    items that never come are "missing". `digest` changes when the raw material does.
    """

    source: str
    split_name: str
    digest: str
    total: int
    items: Callable[[], list[Item]]
    stream: Callable[[set[str]], Iterator[tuple[Item, Picture]]]
    expected: dict[str, int] | None = None  # images in each split of the published data set
    rejected: list[Rejected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def total_of(items: Iterable[Item], rejected: Iterable[Rejected]) -> int:
    """The number of images, good or bad."""
    return len({item.image_id for item in items} | {bad.image_id for bad in rejected})


def digest_of(*facts: object) -> str:
    """A hash of anything JSON can hold."""
    text = json.dumps(facts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def escaped(text: str) -> str:
    """`text` as UTF-8 can hold it: a lone surrogate (of a file name, of JSON) is escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def some(names: Iterable[str]) -> str:
    """The first ten names, long ones cut, for a message."""
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name in names]
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return escaped(", ".join(names[:10])) + more


def draw(picture: Picture) -> ImageSource:
    """The picture itself."""
    if callable(picture) and not isinstance(picture, Image.Image):
        return picture()
    return picture


def partial_text(images: dict[str, int], expected: dict[str, int] | None) -> str:
    """ "" where the counts are those of the published split, or what is missing."""
    if expected is None:
        return ""
    facts = []
    for split, number in expected.items():
        have = images.get(split, 0)
        if have == 0:
            facts.append(f"{split} is missing")
        elif have != number:
            facts.append(f"{split} has {have:,} of {number:,} images")
    return "; ".join(facts)


def collect(
    entries: Iterable[tuple[str, str, str | None, Iterable[str]]],
) -> tuple[dict[str, Item], list[Rejected]]:
    """Items from (key, image_id, split, captions), those of one key joined; and what was bad.

    Entries without a split get "". White space in captions is tidied.
    """
    first: dict[str, tuple[str, str]] = {}
    captions: dict[str, list[str]] = {}
    rejected = []
    for key, image_id, split, texts in entries:
        split = split or ""
        if image_id != escaped(image_id):
            rejected.append(Rejected(image_id, split, "name is not UTF-8"))
            continue
        if first.setdefault(key, (image_id, split))[1] != split:
            rejected += [Rejected(image_id, split, "in two splits") for _ in texts]
            continue
        said = captions.setdefault(key, [])
        for text in texts:
            text = " ".join(text.split())
            if not text:
                rejected.append(Rejected(image_id, split, "empty caption"))
            elif text != escaped(text):
                rejected.append(Rejected(image_id, split, "caption is not UTF-8"))
            else:
                said.append(text)
    items = {}
    for key, (image_id, split) in first.items():
        if captions[key]:
            items[key] = Item(image_id, split, tuple(captions[key]))
        else:
            rejected.append(Rejected(image_id, split, "no caption"))
    return items, rejected


def settle_split(
    items: dict[str, Item],
    schemes: dict[str, dict[str, str | None] | None],
    wanted: str | None,
    seed: int,
    where: str,
) -> tuple[dict[str, Item], str, list[Rejected]]:
    """Items with their split, the split's name, and items that have none.

    `schemes` are the splits there may be, the best first: None stands for what the items say
    themselves, a dictionary for a split by key. One counts if it has two splits or is `wanted`;
    the last resort is a split by chance. Raises UsageError if `wanted` is not to be had.
    """
    own = {key: item.split or None for key, item in items.items()}
    found: dict[str, dict[str, str | None]] = {}
    for name, scheme in schemes.items():
        split_of = own if scheme is None else scheme
        least = 1 if scheme is None or name == wanted else 2
        if len({split for split in split_of.values() if split}) >= least:
            found[name] = split_of
    check_scheme(wanted, found, where)
    name = wanted or next(iter(found), RANDOM)
    chosen = random_split(list(items), seed) if name == RANDOM else found[name]
    kept, rejected = {}, []
    for key, item in items.items():
        if split := chosen.get(key):
            kept[key] = replace(item, split=split)
        else:
            rejected.append(Rejected(item.image_id, "", "no split"))
    # "random-seed0" was another split by chance, which earlier versions made.
    return kept, f"random-hash-seed{seed}" if name == RANDOM else name, rejected


def check_scheme(wanted: str | None, found: Iterable[str], where: str) -> None:
    """Raises UsageError if the split `wanted` is neither among those `found` nor one by chance."""
    allowed = [*found, RANDOM]
    if wanted is not None and wanted not in allowed:
        raise UsageError(f"{where} allow no split '{wanted}'; they allow {', '.join(allowed)}")


def tell_unknown(
    unknown: list[str], name: str, wanted: str | None, where: str, warnings: list[str]
) -> None:
    """Put into `warnings` which splits that were given are `unknown`, unless chance is `wanted`.

    `name` is that of the split that was settled. Raises UserError where it is one by chance that
    nobody wanted.
    """
    if not unknown or wanted == RANDOM:
        return
    told = (
        f"unknown splits in {where}: {some(unknown)} (known are "
        f"{', '.join([*SPLITS, *SPLIT_ALIASES])})"
    )
    if name.startswith(RANDOM):
        raise UserError(f"{told}; rename them, or have a split by chance: --split-scheme {RANDOM}")
    warnings.append(f"{told}; they count for nothing, rename them")


def random_split(keys: list[str], seed: int) -> dict[str, str | None]:
    """A split by chance: a tenth each for val and test, at most 1,000; the same for a seed.

    Each key has a place of its own in the order, test at one end and val at the other, so that it
    keeps its split when others come or go, but for few at the two borders.
    """
    keys = sorted(keys, key=lambda key: digest_of("split", seed, key))
    held = min(1000, max(1, len(keys) // 10)) if len(keys) >= 3 else 0
    return {
        key: "test" if i < held else "val" if i >= len(keys) - held else "train"
        for i, key in enumerate(keys)
    }
