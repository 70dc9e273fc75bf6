"""The places of MiniCOCO: a sky or a wall, a ground, and what stands along the horizon, at three times of day."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from helpers.minicoco.sprites import fit, glyph, rgb

SIZE = 192  # pixels, height and width of every picture

# The phrases that name it, where ground meets sky (share of the height), ground colours from far to near, and what
# stands along the horizon; a room has a wall's colour there, and a window for a sun.
PLACES = {
    "beach": ("on the beach|at the beach", 0.42, "#F7E2A8 #EBC773", "🌴"),
    "street": ("on the street|in the street", 0.46, "#9AA0A8 #7B818A", "🏠 🏢 🏬"),
    "snow": ("in the snow|on the snow", 0.44, "#FFFFFF #D9E8F5", "🌲"),
    "meadow": ("in a meadow|on the grass", 0.42, "#B7DE7B #7CBF4B", "🌳 🌼"),
    "desert": ("in the desert", 0.45, "#F2C078 #DD9A52", "🌵"),
    "forest": ("in the forest|in the woods", 0.48, "#6E9A4E #4F7A3C", "🌲 🌳"),
    "lake": ("on the lake|on the water", 0.36, "#7CC4EA #3D86C6", "🌲"),
    "mountains": ("in the mountains", 0.52, "#A9C98A #7FA765", "🏔 ⛰"),
    "farm": ("on a farm|on the farm", 0.44, "#E4CF6B #C9A33F", "🏡 🌾"),
    "kitchen": ("in the kitchen|in a kitchen", 0.56, "#D9B48A #C49A6C", "#FBE9C6"),
    "living room": ("in the living room|in a living room", 0.58, "#B98555 #9A6B41", "#C9E4DA"),
    "bathroom": ("in the bathroom|in a bathroom", 0.56, "#E3ECF1 #C3D3DD", "#A9D6E5"),
}
TIMES = {"day": "", "sunset": "at sunset", "night": "at night"}
SKIES = {
    "day": ("#7EC8F2", "#DDF2FC"),
    "sunset": ("#7A5FA8", "#FFB36B"),
    "night": ("#101B3F", "#34507F"),
}
LIGHT = {"day": (1.0, 1.0, 1.0), "sunset": (1.0, 0.84, 0.74), "night": (0.50, 0.56, 0.78)}
VARIANTS = 6  # different backgrounds of one place at one time; a mirror image doubles them


def gradient(width: int, top: str, bottom: str, height: int) -> Image.Image:
    ramp = np.linspace(rgb(top), rgb(bottom), max(height, 1))[:, None]
    return Image.fromarray(ramp.repeat(width, 1).round().astype(np.uint8))


def paste(canvas: Image.Image, char: str, x: float, foot: float, size: float) -> None:
    """Put a drawing with its middle at x and its foot at `foot`, all in shares of the canvas."""
    drawn = fit(glyph(char), size * canvas.width)
    canvas.paste(
        drawn,
        (round(x * canvas.width - drawn.width / 2), round(foot * canvas.height - drawn.height)),
        drawn,
    )


def room(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random, place: str, time: str
) -> None:
    """A wall, a window that shows the hour, a floor; tiles or boards say which room."""
    w = canvas.width
    horizon = round(PLACES[place][1] * w)
    if place == "bathroom":
        step = w // 12
        for k in range(0, w, step):
            draw.line([(k, 0), (k, horizon)], fill="#C9E8F2", width=3)
            draw.line([(0, k), (w, k)], fill="#C9E8F2" if k < horizon else "#B3C4CF", width=3)
    else:
        for k in range(5):
            y = horizon + round((w - horizon) * (k / 5) ** 1.5)
            draw.line(
                [(0, y), (w, y)], fill="#00000022" if place == "kitchen" else "#85592F", width=2
            )
    x, top, side = rng.uniform(0.12, 0.6) * w, 0.07 * w, 0.27 * w
    pane = gradient(round(side), *SKIES[time], round(side))
    canvas.paste(pane, (round(x), round(top)))
    if time == "night":
        paste(canvas, "🌙", x / w + 0.2, 0.2, 0.07)
    frame = "#8A5A34" if place != "bathroom" else "#FFFFFF"
    draw.rectangle([x, top, x + side, top + side], outline=frame, width=7)
    draw.line([(x + side / 2, top), (x + side / 2, top + side)], fill=frame, width=5)
    draw.line([(x, top + side / 2), (x + side, top + side / 2)], fill=frame, width=5)
    if place == "living room":
        paste(canvas, "🖼", (x / w + 0.5) % 0.86 + 0.08 if x / w < 0.4 else 0.14, 0.3, 0.17)
    if place == "kitchen":
        draw.rectangle([0, horizon - 0.13 * w, w, horizon], fill="#E9F1EC")
        for k in range(0, w, w // 16):
            draw.line([(k, horizon - 0.13 * w), (k, horizon)], fill="#C7D8CE", width=2)
        draw.line([(0, horizon - 0.065 * w), (w, horizon - 0.065 * w)], fill="#C7D8CE", width=2)
    draw.rectangle(
        [0, horizon - 5, w, horizon + 2], fill="#FFFFFF" if place != "living room" else "#7A5230"
    )


def outdoors(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, rng: random.Random, place: str, time: str
) -> None:
    """What stands along the horizon, then the ground's own marks."""
    w = canvas.width
    horizon = PLACES[place][1]
    if time == "day":
        for _ in range(2):
            paste(
                canvas,
                "☁",
                rng.uniform(0.05, 0.95),
                rng.uniform(0.13, 0.26),
                rng.uniform(0.12, 0.2),
            )
    if place == "beach":
        canvas.paste(
            gradient(w, "#4FB3D9", "#8FD8E8", round(0.13 * w)), (0, round((horizon - 0.1) * w))
        )
        draw.ellipse(
            [-0.3 * w, (horizon - 0.005) * w, 1.3 * w, (horizon + 0.25) * w], fill="#F7E2A8"
        )
    if place == "street":
        draw.rectangle([0, (horizon - 0.01) * w, w, (horizon + 0.06) * w], fill="#C9C4BB")
        for k in range(5):
            draw.rectangle(
                [(k / 4 - 0.08) * w, 0.74 * w, (k / 4 + 0.06) * w, 0.76 * w], fill="#F5F1E3"
            )
    if place == "lake":
        for _ in range(14):
            x, y = rng.uniform(0, 1) * w, rng.uniform(horizon + 0.05, 0.97) * w
            draw.line([(x, y), (x + 0.09 * w, y)], fill="#A9DCF5", width=4)
    if place in ("desert", "snow", "meadow", "farm"):
        shade = PLACES[place][2].split()
        for k in range(3):
            x, y = rng.uniform(-0.3, 0.8) * w, (horizon + 0.13 + 0.16 * k) * w
            draw.ellipse(
                [x, y, x + 0.9 * w, y + 0.3 * w], fill=mix(shade[0], shade[1], 0.25 + 0.25 * k)
            )
    glyphs = PLACES[place][3].split()
    crowd = {"forest": 9, "street": 5, "mountains": 4}.get(place, 3)
    for k in range(crowd):
        size = {"mountains": 0.42, "street": 0.27, "forest": 0.3}.get(
            place, rng.uniform(0.14, 0.22)
        )
        x = (k + rng.uniform(0.2, 0.8)) / crowd
        char = rng.choice(glyphs)
        size *= 0.5 if char in "🌼🌾" else 1.0
        paste(canvas, char, x, horizon + rng.uniform(0.0, 0.03), size)


def mix(a: str, b: str, share: float) -> tuple[int, int, int]:
    return tuple(round((1 - share) * x + share * y) for x, y in zip(rgb(a), rgb(b)))


@lru_cache(None)
def background(place: str, time: str, variant: int) -> Image.Image:
    """One of the `VARIANTS` pictures of a place at a time, without objects, RGB `SIZE` x `SIZE`."""
    rng = random.Random(f"{place}/{time}/{variant}")
    w = 2 * SIZE
    horizon = round(PLACES[place][1] * w)
    far, near = PLACES[place][2].split()
    indoors = PLACES[place][3].startswith("#")
    if indoors:
        wall = PLACES[place][3]
        canvas = Image.new("RGB", (w, w), wall)
    else:
        canvas = gradient(w, *SKIES[time], w)
        draw = ImageDraw.Draw(canvas)
        if time == "night":
            for _ in range(40):
                x, y, r = rng.uniform(0, w), rng.uniform(0, horizon), rng.choice((1, 1, 2))
                draw.ellipse([x - r, y - r, x + r, y + r], fill="#F4F1D8")
        char = {"day": "☀", "night": "🌙", "sunset": ""}[time]
        x = rng.uniform(0.12, 0.88)
        if char:
            paste(canvas, char, x, 0.24, 0.17)
        else:
            r, y = 0.11 * w, horizon - 0.01 * w
            draw.ellipse([x * w - r, y - r, x * w + r, y + r], fill="#FFE08A")
    canvas.paste(gradient(w, far, near, w - horizon), (0, horizon))
    draw = ImageDraw.Draw(canvas, "RGBA")
    (room if indoors else outdoors)(canvas, draw, rng, place, time)
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.LANCZOS), np.float32)
    light = np.array(LIGHT[time])
    if indoors:
        light = 0.35 * light + 0.65  # lamps are on
        rows = np.ones((SIZE, 1, 1))
    else:  # the sky has its own colours, the ground takes the light
        rows = np.clip((np.arange(SIZE) - PLACES[place][1] * SIZE + 40) / 30, 0, 1)[:, None, None]
    return Image.fromarray((pixels * (1 + rows * (light - 1))).clip(0, 255).astype(np.uint8))
