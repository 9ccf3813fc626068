"""What a scene is, and how it is painted."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

SIDE = 64  # pixels
COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 150, 50),
    "blue": (40, 80, 220),
    "purple": (130, 50, 170),
    "pink": (250, 130, 190),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"large": (9.5, 10.0, 10.5), "small": (6.5, 7.0, 7.5)}  # pixels
BACKGROUNDS = ("grey", "dark", "striped", "checked", "sand", "grass")


@dataclass(frozen=True)
class Thing:
    cell: int  # of the 3×3 grid, row by row
    colour: str
    shape: str
    size: str


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]  # sorted by cell
    background: str


def paint(scene: Scene, seed: str) -> Image.Image:
    """The scene as a 64×64 RGB image; `seed` settles shades, exact places and exact sizes."""
    rng = random.Random(seed)
    image = _background(scene.background, rng.randrange(4)).copy()
    for thing in scene.things:
        fill, edge = _sprite(thing.shape, rng.choice(RADII[thing.size]))
        row, column = divmod(thing.cell, 3)
        x = (2 * column + 1) * SIDE // 6 + rng.randint(-1, 1) - fill.width // 2
        y = (2 * row + 1) * SIDE // 6 + rng.randint(-1, 1) - fill.height // 2
        shade = rng.randint(-15, 15)
        colour = tuple(min(255, max(0, c + shade)) for c in COLOURS[thing.colour])
        image.paste((25, 25, 25), (x, y), edge)
        image.paste(colour, (x, y), fill)
    return image


@cache
def _background(kind: str, variant: int) -> Image.Image:
    rng = random.Random(f"{kind}/{variant}")
    shade = 6 * variant
    image = Image.new("RGB", (SIDE, SIDE), (120 + shade,) * 3)
    pen = ImageDraw.Draw(image)
    if kind == "dark":
        pen.rectangle((0, 0, SIDE, SIDE), (28 + shade, 28 + shade, 48 + shade))
    elif kind == "striped":
        for x in range(-variant, SIDE, 8):
            pen.rectangle((x, 0, x + 3, SIDE), (165, 165, 190))
    elif kind == "checked":
        for x in range(-variant, SIDE, 16):
            for y in range(-variant, SIDE, 8):
                start = x + 8 * (((y + variant) // 8) % 2)
                pen.rectangle((start, y, start + 7, y + 7), (75, 90, 105))
    elif kind in ("sand", "grass"):
        base, grain = {
            "sand": ((205, 180, 130), (175, 150, 100)),
            "grass": ((95, 125, 60), (65, 95, 40)),
        }[kind]
        pen.rectangle((0, 0, SIDE, SIDE), tuple(c + shade // 2 for c in base))
        for _ in range(260):
            x, y = rng.randrange(SIDE), rng.randrange(SIDE)
            pen.line((x, y, x, y + (0 if kind == "sand" else 2)), grain)
    return image


@cache
def _sprite(shape: str, radius: float) -> tuple[Image.Image, Image.Image]:
    """Masks of the filled shape and of the shape with its dark edge, antialiased."""
    scale, margin = 8, 2
    side = 2 * math.ceil(radius + margin)
    masks = []
    for grow in (0.0, 1.0):
        mask = Image.new("L", (side * scale, side * scale))
        _draw_shape(ImageDraw.Draw(mask), shape, side * scale / 2, radius * scale, grow * scale)
        masks.append(mask.reduce(scale))
    return masks[0], masks[1]


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, c: float, r: float, grow: float) -> None:
    """Draw around (c, c); `grow` widens every outline, holes included."""
    if shape in ("circle", "ring"):
        outer = r + grow
        pen.ellipse((c - outer, c - outer, c + outer, c + outer), 255)
        if shape == "ring":
            inner = 0.55 * r - grow
            pen.ellipse((c - inner, c - inner, c + inner, c + inner), 0)
    elif shape == "square":
        half = 0.85 * r + grow
        pen.rectangle((c - half, c - half, c + half, c + half), 255)
    elif shape == "cross":
        long, wide = r + grow, 0.3 * r + grow
        pen.rectangle((c - long, c - wide, c + long, c + wide), 255)
        pen.rectangle((c - wide, c - long, c + wide, c + long), 255)
    else:
        points = 5 if shape == "star" else 3
        radii = (r, 0.45 * r) if shape == "star" else (r,)
        grown = 2.0 * grow if shape == "triangle" else 1.6 * grow
        steps = points * len(radii)
        corners = [
            (
                c + (radii[k % len(radii)] + grown) * math.sin(2 * math.pi * k / steps),
                c - (radii[k % len(radii)] + grown) * math.cos(2 * math.pi * k / steps),
            )
            for k in range(steps)
        ]
        lift = 0.25 * r if shape == "triangle" else 0.0  # centre of the bounding box
        pen.polygon([(x, y + lift) for x, y in corners], 255)
