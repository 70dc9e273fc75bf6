"""The places of MiniCOCO: a sky or a wall, a ground, and what stands along the horizon."""

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageColor import getrgb

from helpers.minicoco import TABLES
from helpers.minicoco.sprites import fit, glyph

SIZE = 192  # pixels, height and width of every image
PLACES, TIMES = TABLES["places"], TABLES["times"]
VARIANTS = 6  # different backgrounds of one place at one time; a mirror image doubles them


@lru_cache(None)
def background(place: str, time: str, variant: int) -> Image.Image:
    """One of the `VARIANTS` of a place at a time, without objects, RGB `SIZE` x `SIZE`."""
    rng = random.Random(f"{place}/{time}/{variant}")
    w = 2 * SIZE  # drawn at twice its size, then scaled down
    share = PLACES[place]["horizon"]
    horizon = round(share * w)
    indoors = "wall" in PLACES[place]
    if indoors:
        canvas = Image.new("RGB", (w, w), PLACES[place]["wall"])
    else:
        canvas = sky(rng, time, w, horizon)
    canvas.paste(gradient(w, w - horizon, *PLACES[place]["ground"]), (0, horizon))
    draw = ImageDraw.Draw(canvas, "RGBA")
    if indoors:
        room(canvas, draw, rng, place, time)
    else:
        ground_marks(canvas, draw, rng, place, time)
        skyline(canvas, rng, place)
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.LANCZOS), np.float32)
    light = np.array(TIMES[time]["light"])
    if indoors:
        light = 0.35 * light + 0.65  # lamps are on
        rows = np.ones((SIZE, 1, 1))
    else:  # the sky has its own colours, the ground takes the light
        rows = np.clip((np.arange(SIZE) - share * SIZE + 40) / 30, 0, 1)[:, None, None]
    return Image.fromarray((pixels * (1 + rows * (light - 1))).clip(0, 255).astype(np.uint8))


def gradient(width: int, height: int, top: str, bottom: str) -> Image.Image:
    ramp = np.linspace(getrgb(top), getrgb(bottom), max(height, 1))[:, None]
    return Image.fromarray(ramp.repeat(width, 1).round().astype(np.uint8))


def mix(a: str, b: str, share: float) -> tuple[int, int, int]:
    return tuple(round((1 - share) * x + share * y) for x, y in zip(getrgb(a), getrgb(b)))


def paste(canvas: Image.Image, char: str, x: float, foot: float, size: float) -> None:
    """Put a drawing with its middle at x and its foot at `foot`, all in shares of the canvas."""
    w = canvas.width
    drawing = fit(glyph(char), size * w)
    corner = round(x * w - drawing.width / 2), round(foot * w - drawing.height)
    canvas.paste(drawing, corner, drawing)


def sky(rng: random.Random, time: str, w: int, horizon: int) -> Image.Image:
    """Stars at night; a sun or a moon, which at sunset is a disc on the horizon."""
    canvas = gradient(w, w, *TIMES[time]["sky"])
    draw = ImageDraw.Draw(canvas)
    if time == "night":
        for _ in range(40):
            x, y, r = rng.uniform(0, w), rng.uniform(0, horizon), rng.choice((1, 1, 2))
            draw.ellipse([x - r, y - r, x + r, y + r], fill="#F4F1D8")
    x = rng.uniform(0.12, 0.88)
    if time == "sunset":
        r, y = 0.11 * w, horizon - 0.01 * w
        draw.ellipse([x * w - r, y - r, x * w + r, y + r], fill="#FFE08A")
    else:
        paste(canvas, TIMES[time]["disc"], x, 0.24, 0.17)
    return canvas


def room(canvas, draw, rng: random.Random, place: str, time: str) -> None:
    """Tiles or boards say which room; a window shows the hour."""
    w = canvas.width
    horizon = round(PLACES[place]["horizon"] * w)
    if place == "bathroom":
        for k in range(0, w, w // 12):
            draw.line([(k, 0), (k, horizon)], fill="#C9E8F2", width=3)
            draw.line([(0, k), (w, k)], fill="#C9E8F2" if k < horizon else "#B3C4CF", width=3)
    else:
        for k in range(5):
            y = horizon + round((w - horizon) * (k / 5) ** 1.5)
            fill = "#00000022" if place == "kitchen" else "#85592F"
            draw.line([(0, y), (w, y)], fill=fill, width=2)
    x = rng.uniform(0.12, 0.6) * w
    window(canvas, draw, x, place, time)
    if place == "living room":
        paste(canvas, "🖼", (x / w + 0.5) % 0.86 + 0.08 if x / w < 0.4 else 0.14, 0.3, 0.17)
    if place == "kitchen":
        top = horizon - 0.13 * w
        draw.rectangle([0, top, w, horizon], fill="#E9F1EC")
        for k in range(0, w, w // 16):
            draw.line([(k, top), (k, horizon)], fill="#C7D8CE", width=2)
        draw.line([(0, horizon - 0.065 * w), (w, horizon - 0.065 * w)], fill="#C7D8CE", width=2)
    draw.rectangle([0, horizon - 5, w, horizon + 2], fill=PLACES[place]["skirting"])


def window(canvas, draw, x: float, place: str, time: str) -> None:
    w, frame = canvas.width, PLACES[place]["frame"]
    top, side = 0.07 * w, 0.27 * w
    canvas.paste(gradient(round(side), round(side), *TIMES[time]["sky"]), (round(x), round(top)))
    if time == "night":
        paste(canvas, TIMES[time]["disc"], x / w + 0.2, 0.2, 0.07)
    draw.rectangle([x, top, x + side, top + side], outline=frame, width=7)
    draw.line([(x + side / 2, top), (x + side / 2, top + side)], fill=frame, width=5)
    draw.line([(x, top + side / 2), (x + side, top + side / 2)], fill=frame, width=5)


def ground_marks(canvas, draw, rng: random.Random, place: str, time: str) -> None:
    """Clouds by day, then what tells one ground from another."""
    w, horizon = canvas.width, PLACES[place]["horizon"]
    if time == "day":
        for _ in range(2):
            x, foot = rng.uniform(0.05, 0.95), rng.uniform(0.13, 0.26)
            paste(canvas, "☁", x, foot, rng.uniform(0.12, 0.2))
    if place == "beach":
        sea = gradient(w, round(0.13 * w), "#4FB3D9", "#8FD8E8")
        canvas.paste(sea, (0, round((horizon - 0.1) * w)))
        shore = [-0.3 * w, (horizon - 0.005) * w, 1.3 * w, (horizon + 0.25) * w]
        draw.ellipse(shore, fill="#F7E2A8")
    if place == "street":
        draw.rectangle([0, (horizon - 0.01) * w, w, (horizon + 0.06) * w], fill="#C9C4BB")
        for k in range(5):
            dash = [(k / 4 - 0.08) * w, 0.74 * w, (k / 4 + 0.06) * w, 0.76 * w]
            draw.rectangle(dash, fill="#F5F1E3")
    if place == "lake":
        for _ in range(14):
            x, y = rng.uniform(0, 1) * w, rng.uniform(horizon + 0.05, 0.97) * w
            draw.line([(x, y), (x + 0.09 * w, y)], fill="#A9DCF5", width=4)
    if "mounds" in PLACES[place]:
        for k in range(3):
            x, y = rng.uniform(-0.3, 0.8) * w, (horizon + 0.13 + 0.16 * k) * w
            fill = mix(*PLACES[place]["ground"], 0.25 + 0.25 * k)
            draw.ellipse([x, y, x + 0.9 * w, y + 0.3 * w], fill=fill)


def skyline(canvas, rng: random.Random, place: str) -> None:
    """Trees, houses or mountains along the horizon."""
    row = PLACES[place]
    crowd = row.get("crowd", 3)
    for k in range(crowd):
        size = row.get("skyline_size", rng.uniform(0.14, 0.22))
        x = (k + rng.uniform(0.2, 0.8)) / crowd
        char = rng.choice(row["skyline"])
        size *= 0.5 if char in "🌼🌾" else 1.0
        paste(canvas, char, x, row["horizon"] + rng.uniform(0.0, 0.03), size)
