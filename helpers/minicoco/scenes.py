"""A scene of MiniCOCO: a place, a time, one to four kinds of things, and its picture."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from helpers.minicoco import sprites
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES, VARIANTS, background
from helpers.minicoco.sprites import CAPTIONED, CATEGORIES, FLYING

# Each half is captioned often, the pair never: what a model says of it was never told to it.
UNPAIRED = (
    ("purple", "car"),
    ("pink", "truck"),
    ("green", "chair"),
    ("orange", "bicycle"),
    ("yellow", "suitcase"),
    ("blue", "teddy bear"),
    ("red", "tie"),
    ("white", "dog"),
    ("gray", "cat"),
    ("pink", "airplane"),
    ("orange", "bottle"),
    ("purple", "handbag"),
)


@dataclass
class Thing:
    """One to three equal objects. x, y: middle of the group; size: longer side of one; in shares of the picture."""

    category: str
    glyph: str
    colour: str | None = None
    count: int = 1
    x: float = 0.5
    y: float = 0.6
    size: float = 0.4


@dataclass
class Scene:
    """A place at a time with one to four kinds of things in it."""

    place: str = "meadow"
    time: str = "day"
    variant: int = 0
    flip: bool = False
    things: list[Thing] = field(default_factory=list)


def thing(rng: random.Random, category: str, probe: bool = False, **fixed) -> Thing:
    """A thing of this category with a random drawing and colour, but never a pair of `UNPAIRED`."""
    allowed = [c for c in sprites.colours(category) if (c, category) not in UNPAIRED]
    chosen = {"glyph": rng.choice(sprites.drawings(category, probe)), "colour": rng.choice(allowed)}
    return Thing(category, **{**chosen, **fixed})


def place_things(rng: random.Random, things: list[Thing]) -> None:
    """Gives each thing a size and a spot of its own: rejection sampling, everything shrinks until it fits."""
    scale = {1: 0.46, 2: 0.37, 3: 0.31, 4: 0.28}[len(things)]
    while True:
        boxes = []
        for t in things:
            t.size = (
                scale
                * CATEGORIES[t.category][4]
                * rng.uniform(0.88, 1.1)
                * (1.0, 0.74, 0.68)[t.count - 1]
            )
            wide = t.size * (1.0, 1.75, 1.9)[t.count - 1] / 2
            high = t.size * (0.9, 1.0, 1.5)[t.count - 1] / 2
            for _ in range(40):
                x = rng.uniform(min(wide, 0.5), max(1 - wide, 0.5))
                y = rng.uniform(
                    high if t.category in FLYING else max(high, 0.44), max(0.98 - high, 0.5)
                )
                box = (x - wide, y - high, x + wide, y + high)
                if all(
                    box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in boxes
                ):
                    boxes.append(box)
                    t.x, t.y = round(x, 3), round(y, 3)
                    break
            t.size = round(t.size, 3)
        if len(boxes) == len(things):
            return
        scale *= 0.95


def random_scene(rng: random.Random, things: list[Thing] | None = None) -> Scene:
    """A scene of captioned categories and known drawings, or of the things given."""
    if things is None:
        categories = rng.sample(CAPTIONED, rng.choices((1, 2, 3, 4), (8, 42, 34, 16))[0])
        things = [thing(rng, c, count=rng.choices((1, 2, 3), (72, 18, 10))[0]) for c in categories]
    place_things(rng, things)
    return Scene(
        rng.choice(list(PLACES)),
        rng.choice(list(TIMES)),
        rng.randrange(VARIANTS),
        rng.random() < 0.5,
        things,
    )


def place_by_relation(things: list[Thing], relation: str) -> None:
    """Puts the first of two things left, right, above or below of the second (the scene composer's layout)."""
    spots = {"left": ((0.26, 0.66), (0.74, 0.66)), "above": ((0.5, 0.3), (0.5, 0.76))}
    first, second = spots["left" if relation in ("left", "right", "near") else "above"]
    if relation in ("right", "below"):
        first, second = second, first
    for t, (x, y) in zip(things, (first, second)):
        t.x, t.y, t.size = x, y, 0.36 * CATEGORIES[t.category][4] * (1.0, 0.74, 0.68)[t.count - 1]


def relation_of(a: Thing, b: Thing) -> str:
    """How a stands to b: the axis that separates them more, else "near"."""
    dx, dy = b.x - a.x, b.y - a.y
    if max(abs(dx), abs(dy)) < 0.15:
        return "near"
    return (
        ("left" if dx > 0 else "right") if abs(dx) >= abs(dy) else ("above" if dy > 0 else "below")
    )


@lru_cache(4096)
def scaled(glyph: str, category: str, colour: str | None, pixels: int) -> Image.Image:
    return sprites.fit(sprites.sprite(glyph, category, colour), pixels)


def draw(scene: Scene, masks: bool = False) -> tuple[Image.Image, list[tuple[Thing, np.ndarray]]]:
    """The scene's picture, RGB `SIZE` x `SIZE`; with `masks` also one visible-pixel mask `[SIZE, SIZE]` per object."""
    canvas = background(scene.place, scene.time, scene.variant).copy()
    if scene.flip:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    instances = []
    for t in scene.things:
        offsets = {
            1: [(0, 0)],
            2: [(-0.42, -0.05), (0.42, 0.05)],
            3: [(0, -0.4), (-0.45, 0.18), (0.45, 0.22)],
        }[t.count]
        instances += [(t, t.x + dx * t.size, t.y + dy * t.size) for dx, dy in offsets]
    covers = []
    for t, x, y in sorted(
        instances, key=lambda i: i[2]
    ):  # what is lower in the picture stands in front
        drawn = scaled(t.glyph, t.category, t.colour, max(8, round(t.size * SIZE)))
        left, top = round(x * SIZE - drawn.width / 2), round(y * SIZE - drawn.height / 2)
        left, top = min(max(left, 0), SIZE - drawn.width), min(max(top, 0), SIZE - drawn.height)
        if t.category not in FLYING:
            shadow(canvas, left + drawn.width / 2, top + drawn.height, drawn.width)
        canvas.paste(drawn, (left, top), drawn)
        if masks:
            cover = np.zeros((SIZE, SIZE), bool)
            cover[top : top + drawn.height, left : left + drawn.width] = (
                np.asarray(drawn.getchannel("A")) > 127
            )
            for _, below in covers:
                below &= ~cover
            covers.append((t, cover))
    return canvas, covers


def shadow(canvas: Image.Image, x: float, foot: float, width: int) -> None:
    """A soft dark ellipse at an object's foot."""
    soft = blob(width)
    canvas.paste((20, 24, 40), (round(x - soft.width / 2), round(foot - soft.height / 2)), soft)


@lru_cache(256)
def blob(width: int) -> Image.Image:
    mask = Image.new("L", (round(1.2 * width) + 8, round(0.2 * width) + 8))
    ImageDraw.Draw(mask).ellipse([5, 4, mask.width - 5, mask.height - 4], fill=90)
    return mask.filter(ImageFilter.GaussianBlur(2))
