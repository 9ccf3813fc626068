"""`scenes`: the built-in data set, drawn from a seed; nothing is downloaded.

Two or three coloured, sized shapes on a 3×3 grid over a varied background, with five differently
worded captions that leave things out and use synonyms. Together the words of a caption identify
its picture; no single word does.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache, partial

from vicvlm_cli.data.sources.listing import SPLITS, Item, Listing, Picture, digest_of
from vicvlm_cli.data.sources.scene_pixels import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing, paint
from vicvlm_cli.data.sources.scene_words import describe
from vicvlm_cli.errors import UsageError

DEFAULT_SIZES = {"train": 12_000, "val": 500, "test": 500}
RECIPE = 4  # raise it whenever the same seed draws or says something else


def list_scenes(seed: int, sizes: dict[str, int] | None = None) -> Listing:
    """The listing of `scenes`; `sizes` are the numbers of images of each split.

    Raises UsageError for a split that scenes do not have.
    """
    if unknown := set(sizes or {}) - set(SPLITS):
        raise UsageError(f"scenes have the splits {', '.join(SPLITS)}, not {', '.join(unknown)}")
    sizes = {**DEFAULT_SIZES, **(sizes or {})}
    make = cache(partial(_compose_all, seed, sizes))

    def stream(done: set[str]) -> Iterator[tuple[Item, Picture]]:
        for scene, item in make():
            if item.image_id not in done:
                yield item, partial(paint, scene, f"{seed}/{item.image_id}")

    return Listing(
        source="scenes",
        split_name=f"seed{seed}",
        digest=digest_of("scenes", RECIPE, seed, sizes),
        total=sum(sizes.values()),
        items=lambda: [item for _, item in make()],
        stream=stream,
    )


def _compose_all(seed: int, wanted: dict[str, int]) -> list[tuple[Scene, Item]]:
    seen: set[Scene] = set()
    result = []
    for split in reversed(SPLITS):  # test first: it does not change with the size of train
        for i in range(wanted[split]):
            image_id = f"{split}-{i:05d}"
            rng = random.Random(f"{seed}/{image_id}/captions")
            scene = compose(rng)
            while scene in seen:
                scene = compose(rng)
            seen.add(scene)
            item = Item(image_id, split, describe(scene, rng), f"scenes/{image_id}.jpg")
            result.append((scene, item))
    return result


def compose(rng: random.Random) -> Scene:
    """A random scene of two or three things."""
    cells = sorted(rng.sample(range(9), rng.choice((2, 3))))
    return Scene(
        tuple(
            Thing(
                cell,
                rng.choice(list(COLOURS)),
                rng.choice(SHAPES),
                "large" if rng.random() < 0.5 else "small",
            )
            for cell in cells
        ),
        rng.choice(BACKGROUNDS),
    )
