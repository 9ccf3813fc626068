"""What is said of a scene: synonyms, places, relations, and something always left out."""

from __future__ import annotations

import random

from vicvlm_cli.data.sources.scene_pixels import Scene, Thing

COLOURS = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green",),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink", "rose"),
    "white": ("white",),
}
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
}
SIZES = {"large": ("large", "big"), "small": ("small", "little", "tiny")}
BACKGROUNDS = {
    "grey": ("on a grey background", "against plain grey"),
    "dark": ("in the dark", "on a dark background"),
    "striped": ("on stripes", "on a striped background"),
    "checked": ("on a checkered floor", "over checks"),
    "sand": ("on sand", "on sandy ground"),
    "grass": ("on grass", "on a meadow"),
}
ROWS = (("top", "upper"), ("middle",), ("bottom", "lower"))
COLUMNS = ("left", "centre", "right")


def describe(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """Five captions, worded differently, in random order; each leaves something out."""
    captions = [
        _say_places(scene, rng),
        _say_relation(scene, rng),
        _say_relation(scene, rng, ground=1.0),
        _say_ground(scene, rng),
        _say_vaguely(scene, rng),
    ]
    rng.shuffle(captions)
    return tuple(captions)


def _name(thing: Thing, rng: random.Random, size: float = 0.3, colour: bool = True) -> str:
    """'a tiny red hoop'; the size is said with probability `size`."""
    words = [rng.choice(SHAPES[thing.shape])]
    if colour:
        words.insert(0, rng.choice(COLOURS[thing.colour]))
    if rng.random() < size:
        words.insert(0, rng.choice(SIZES[thing.size]))
    phrase = " ".join(words)
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _place(cell: int, rng: random.Random) -> str:
    row, column = divmod(cell, 3)
    if cell == 4:
        return rng.choice(("in the middle", "in the centre"))
    if column == 1:
        return f"at the {('top', '', 'bottom')[row]}"
    if row == 1:
        return f"on the {COLUMNS[column]}"
    return f"at the {rng.choice(ROWS[row])} {COLUMNS[column]}"


def _relation(a: Thing, b: Thing, rng: random.Random) -> str:
    rows, columns = a.cell // 3 - b.cell // 3, a.cell % 3 - b.cell % 3
    words = []
    if rows:
        words.append(rng.choice(("above", "over") if rows < 0 else ("below", "under")))
    if columns:
        side = "left" if columns < 0 else "right"
        words.append(rng.choice((f"to the {side} of", f"{side} of")))
    if len(words) == 2 and rng.random() < 0.5:
        return f"{words[0]} and {words[1]}"
    return rng.choice(words)


def _ground(scene: Scene, rng: random.Random, chance: float = 0.9) -> str:
    """', on sand', or nothing; said with probability `chance`."""
    return f", {rng.choice(BACKGROUNDS[scene.background])}" if rng.random() < chance else ""


def _join(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _shuffled(scene: Scene, rng: random.Random) -> list[Thing]:
    return rng.sample(scene.things, len(scene.things))


def _say_places(scene: Scene, rng: random.Random) -> str:
    parts = [f"{_name(thing, rng)} {_place(thing.cell, rng)}" for thing in _shuffled(scene, rng)]
    return rng.choice(("", "there is ", "you can see ")) + _join(parts) + _ground(scene, rng)


def _say_relation(scene: Scene, rng: random.Random, ground: float = 0.9) -> str:
    a, b, *others = _shuffled(scene, rng)
    said = f"{_name(a, rng)} {_relation(a, b, rng)} {_name(b, rng)}"
    said += "".join(f", with {_name(other, rng)} {_place(other.cell, rng)}" for other in others)
    return rng.choice(("", "a picture of ", "here is ")) + said + _ground(scene, rng, ground)


def _say_ground(scene: Scene, rng: random.Random) -> str:
    """Sizes and background, but no places: for these a mirrored picture would be as right."""
    parts = [_name(thing, rng, size=0.9) for thing in _shuffled(scene, rng)]
    count = {2: "two", 3: "three"}[len(parts)]
    opening = rng.choice(("", f"{count} shapes: ", f"{count} things, "))
    return f"{opening}{_join(parts)} {rng.choice(BACKGROUNDS[scene.background])}"


def _say_vaguely(scene: Scene, rng: random.Random) -> str:
    """Every thing has its place, but one lacks its colour or its shape."""
    things = _shuffled(scene, rng)
    vague, *others = things
    if rng.random() < 0.5:
        name = f"something {rng.choice(COLOURS[vague.colour])}"
    else:
        name = _name(vague, rng, size=0.7, colour=False)
    parts = [f"{name} {_place(vague.cell, rng)}"]
    parts += [f"{_name(thing, rng)} {_place(thing.cell, rng)}" for thing in others]
    return _join(parts) + _ground(scene, rng)
