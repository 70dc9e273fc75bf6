"""A scene of MiniCOCO: a place, a time, one to four kinds of objects, and its image."""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from helpers.minicoco import TABLES, sprites
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES, VARIANTS, background
from helpers.minicoco.sprites import CAPTIONED, CATEGORIES, FLYING

# [colour, category] by the folder of probes: each half is captioned often, the two never together.
NOVEL_COMBINATIONS = TABLES["novel_combinations"]
WITHHELD = {tuple(pair) for pairs in NOVEL_COMBINATIONS.values() for pair in pairs}
SPLITS = ("train2017", "dev2017", "val2017")
# Of the probes: single objects of these categories, and two objects of these kinds in turn.
PROBE_CATEGORIES = {
    "known": CAPTIONED,
    "unseen_drawing": [c for c in CAPTIONED if sprites.drawings(c, probe=True)],
    "uncaptioned": sprites.UNCAPTIONED,
    "unseen": sprites.UNSEEN,
}
KINDS = ("binding", "order")


@dataclass
class SceneObject:
    """One to three equal objects: x, y is the middle of the group, size the longer side of one.

    All three are shares of the image's side.
    """

    category: str
    glyph: str
    colour: str | None = None
    count: int = 1
    x: float = 0.5
    y: float = 0.6
    size: float = 0.4

    @property
    def group(self) -> dict:
        """How that many objects share a spot, in units of their size."""
        return TABLES["groups"][self.count - 1]


@dataclass
class Scene:
    """A place at a time with one to four kinds of objects in it."""

    place: str = "meadow"
    time: str = "day"
    variant: int = 0
    flip: bool = False
    objects: list[SceneObject] = field(default_factory=list)


def random_object(rng: random.Random, category: str, probe=False, **fixed) -> SceneObject:
    """An object with a random drawing and colour, but none of the `WITHHELD` combinations."""
    allowed = [c for c in sprites.colours(category) if (c, category) not in WITHHELD]
    drawing, colour = rng.choice(sprites.drawings(category, probe)), rng.choice(allowed)
    return SceneObject(category, **{"glyph": drawing, "colour": colour, **fixed})


def place_objects(rng: random.Random, objects: list[SceneObject]) -> None:
    """Gives each object a size and a spot of its own; while they do not fit, all shrink."""
    scale = (0.46, 0.37, 0.31, 0.28)[len(objects) - 1]
    while True:
        boxes = []
        for o in objects:
            size = scale * CATEGORIES[o.category]["size"] * rng.uniform(0.88, 1.1) * o.group["size"]
            o.size = round(size, 3)
            box = free_box(rng, o, size, boxes)
            if box:
                boxes.append(box)
        if len(boxes) == len(objects):
            return
        scale *= 0.95


def free_box(rng: random.Random, o: SceneObject, size: float, boxes: list) -> tuple | None:
    """Moves the object to a spot where it overlaps none of the boxes; None after 40 tries."""
    wide, high = size * o.group["width"] / 2, size * o.group["height"] / 2
    highest = high if o.category in FLYING else max(high, 0.44)  # what does not fly stands
    for _ in range(40):
        x = rng.uniform(min(wide, 0.5), max(1 - wide, 0.5))
        y = rng.uniform(highest, max(0.98 - high, 0.5))
        box = x - wide, y - high, x + wide, y + high
        left, top, right, bottom = box
        if all(left > b[2] or right < b[0] or top > b[3] or bottom < b[1] for b in boxes):
            o.x, o.y = round(x, 3), round(y, 3)
            return box
    return None


def random_scene(rng: random.Random, objects: list[SceneObject] | None = None) -> Scene:
    """A scene of captioned categories and known drawings, or of the objects given."""
    if objects is None:
        categories = rng.sample(CAPTIONED, rng.choices((1, 2, 3, 4), (8, 42, 34, 16))[0])
        weights = (72, 18, 10)
        objects = [
            random_object(rng, c, count=rng.choices((1, 2, 3), weights)[0]) for c in categories
        ]
    place_objects(rng, objects)
    place, time = rng.choice(list(PLACES)), rng.choice(list(TIMES))
    return Scene(place, time, rng.randrange(VARIANTS), rng.random() < 0.5, objects)


def two_objects(rng: random.Random, kind: str) -> Scene:
    """A scene for the compositional probe: two objects, in two colours for "binding"."""
    categories = CAPTIONED
    if kind == "binding":
        categories = [c for c in CAPTIONED if CATEGORIES[c].get("paint") == "any"]
    while True:
        a, b = (random_object(rng, c) for c in rng.sample(categories, 2))
        swapped = {(a.colour, b.category), (b.colour, a.category)}
        if kind == "order" or a.colour != b.colour and not swapped & WITHHELD:
            return random_scene(rng, [a, b])


def random_numbers(split: str, index: int, seed: int, use: str = "") -> random.Random:
    """The generator of one image's scene, or of another use of its own.

    The edition of val and its probes is renewed once all choices are made: what is reported was
    never looked at before.
    """
    for_val = split == "val2017" or split.startswith("probes/")
    edition = f"/{TABLES['val_edition']}" if for_val else ""
    return random.Random(f"{seed}{edition}/{split}/{index}/{use}")


def scene_of(split: str, index: int, seed: int) -> Scene:
    """Scene `index` of a split or probe set: a pure function of (split, index, seed)."""
    rng = random_numbers(split, index, seed)
    if split in SPLITS:
        return random_scene(rng)
    folder, probe = split.split("/")
    if probe == "compositional":
        return two_objects(rng, KINDS[index % 2])
    if probe == "novel_combinations":
        combinations = NOVEL_COMBINATIONS[folder]
        colour, category = combinations[index % len(combinations)]
        return random_scene(rng, [random_object(rng, category, colour=colour)])
    categories = PROBE_CATEGORIES[probe]
    category = categories[index % len(categories)]
    return random_scene(rng, [random_object(rng, category, probe=probe == "unseen_drawing")])


def place_by_relation(objects: list[SceneObject], relation: str) -> None:
    """Puts the first of two objects left, right, above or below of the second."""
    spots = [(0.26, 0.66), (0.74, 0.66)]
    if relation in ("above", "below"):
        spots = [(0.5, 0.3), (0.5, 0.76)]
    if relation in ("right", "below"):
        spots = spots[::-1]
    for o, (x, y) in zip(objects, spots):
        o.x, o.y, o.size = x, y, 0.36 * CATEGORIES[o.category]["size"] * o.group["size"]


def relation_of(a: SceneObject, b: SceneObject) -> str:
    """How a stands to b: "left", "right", "above" or "below", on the axis that separates more."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= abs(dy):
        return "left" if dx > 0 else "right"
    return "above" if dy > 0 else "below"


def side_by_side(a: SceneObject, b: SceneObject) -> bool:
    """Whether two objects stand beside each other with little between: what one calls "next to"."""
    wide = (a.size * a.group["width"] + b.size * b.group["width"]) / 2
    return relation_of(a, b) in ("left", "right") and abs(b.x - a.x) - wide < 0.15


def draw(scene: Scene) -> tuple[Image.Image, list[tuple[SceneObject, np.ndarray]]]:
    """The scene's image, RGB `SIZE` x `SIZE`, and of each object the visible pixels, bool masks."""
    canvas = background(scene.place, scene.time, scene.variant).copy()
    if scene.flip:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    spots = [
        (o, o.x + dx * o.size, o.y + dy * o.size)
        for o in scene.objects
        for dx, dy in o.group["offsets"]
    ]
    masks = []
    for o, x, y in sorted(spots, key=lambda spot: spot[2]):  # what is lower stands in front
        sprite = scaled(o.glyph, o.category, o.colour, max(8, round(o.size * SIZE)))
        width, height = sprite.size
        left = min(max(round(x * SIZE - width / 2), 0), SIZE - width)
        top = min(max(round(y * SIZE - height / 2), 0), SIZE - height)
        if o.category not in FLYING:
            soft = shadow(width)
            foot = round(left + width / 2 - soft.width / 2), round(top + height - soft.height / 2)
            canvas.paste((20, 24, 40), foot, soft)
        canvas.paste(sprite, (left, top), sprite)
        mask = np.zeros((SIZE, SIZE), bool)
        mask[top : top + height, left : left + width] = np.asarray(sprite.getchannel("A")) > 127
        for _, behind in masks:
            behind &= ~mask
        masks.append((o, mask))
    return canvas, masks


@lru_cache(4096)
def scaled(char: str, category: str, colour: str | None, pixels: int) -> Image.Image:
    return sprites.fit(sprites.sprite(char, category, colour), pixels)


@lru_cache(256)
def shadow(width: int) -> Image.Image:
    """A soft ellipse to darken the ground at an object's foot."""
    mask = Image.new("L", (round(1.2 * width) + 8, round(0.2 * width) + 8))
    ImageDraw.Draw(mask).ellipse([5, 4, mask.width - 5, mask.height - 4], fill=90)
    return mask.filter(ImageFilter.GaussianBlur(2))
