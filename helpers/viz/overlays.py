"""Maps drawn: over the picture's patches, and as bars over a caption's words.

A map is shown as it is, one square a patch, never smoothed: what looks like an outline should be one. Maps that are to
be compared share one scale, which the colour bar tells.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from helpers.viz.figures import TEXT, literal, show_image, wrap


def heat(strength: float) -> ListedColormap:
    """From nothing over yellow and red to dark red; the lower a value, the more of the picture shines through."""
    colours = plt.get_cmap("YlOrRd")(np.linspace(0.1, 1, 256))  # [256, 4]
    colours[:, 3] = strength * np.linspace(0, 2, 256).clip(max=1)
    return ListedColormap(colours)


def overlay(axes, image, grid, top: float | None = None, strength: float = 0.85, marked=None):
    """A map [gh, gw] over its picture, which turns grey and pale; returns what a colour bar takes.

    top: the end of the scale, which starts at 0 (None: the map's own largest value); strength: from 0, the picture
    alone, to 1, where high values hide it; marked: (row, column) of a patch to outline.
    """
    grid = np.asarray(grid, float)
    (high, wide), (width, height) = grid.shape, image.size
    grey = Image.blend(
        image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.4
    )
    show_image(axes, Image.blend(image.convert("RGB"), grey, min(1.0, 1.5 * strength)))
    top = max(grid.max(), 1e-12) if top is None else top
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axes.imshow(
        grid, cmap=heat(strength), vmin=0, vmax=top, extent=extent, interpolation="nearest"
    )
    if marked is not None:
        corner = marked[1] * width / wide - 0.5, marked[0] * height / high - 0.5
        for color, line in (("white", 4), ("black", 2)):  # seen on light and on dark
            box = plt.Rectangle(
                corner, width / wide, height / high, fill=False, edgecolor=color, linewidth=line
            )
            axes.add_patch(box)
    return shown


def short(value: float, _position=None) -> str:
    """A number of a scale in two digits: 0.0025, 0.5, 1."""
    return f"{value:.2g}"


def word_bars(
    axes, words, scores, special: float | None = None, top: float | None = None, word=None
) -> None:
    """A caption's words from top to bottom, each with its score as a bar.

    special: the share [CLS] and [SEP] take; top: the end of the scale; word: the number of one to mark.
    """
    scores = np.asarray(scores, float)
    axes.barh(range(len(words)), scores, color=TEXT, alpha=0.85, height=0.7)
    room = (
        72 * axes.get_position().height * axes.figure.get_figheight() / max(len(words), 1)
    )  # points a line
    words = [name if len(name) <= 16 else f"{name[:15]}…" for name in words]
    axes.set_yticks([])
    look = {
        "xytext": (-6, 0),
        "textcoords": "offset points",
        "ha": "right",
        "va": "center",
        "annotation_clip": False,
    }
    for i, name in enumerate(words):  # texts are drawn faster than the labels of ticks
        name, weight = ("▸ " + literal(name), "bold") if i == word else (literal(name), "normal")
        axes.annotate(name, (0, i), fontsize=min(10, 0.8 * room), fontweight=weight, **look)
    axes.set_xlim(0, 1.05 * max(scores.max(initial=0) if top is None else top, 1e-12))
    axes.xaxis.set(major_locator=MaxNLocator(3), major_formatter=FuncFormatter(short))
    axes.tick_params(axis="x", labelsize=8.5)
    axes.set_ylim(max(len(words), 8) - 0.4, -0.6)  # few words are no reason for fat bars
    label = "score" if special is None else f"score ([CLS] and [SEP] take {special:.0%})"
    axes.set_xlabel(label, fontsize=9, loc="right")


def maps(
    images,
    grids,
    titles=None,
    columns: int = 5,
    title: str = "",
    label: str = "score",
    top: float | None = None,
    size: float = 2.0,
    sources: bool = False,
    outlines=None,
) -> Figure:
    """Maps [gh, gw] over their pictures, in rows, with one colour bar for all; titles [N] stand above them.

    top: the end of the scale, by default the largest value of all; sources: with the first row's pictures as they are
    above it; outlines [N]: a mask [H, W] to outline in each picture, or None.
    """
    columns, extra = min(columns, len(images)), int(sources)
    rows, width = -(-len(images) // columns), int(size * 12)
    tallest = (
        max((wrap(t, width).count("\n") + 1 for t in titles), default=0)
        if titles is not None
        else 0
    )
    high = (size + 0.2 * tallest) * rows + extra * size + 0.5
    figure, panels = plt.subplots(
        rows + extra, columns, figsize=(size * columns + 1, high), squeeze=False
    )
    top = max(max(np.asarray(grid).max() for grid in grids), 1e-12) if top is None else top
    for axes, image in zip(panels[0] if sources else (), images, strict=False):
        show_image(axes, image)
    for i, axes in enumerate(panels[extra:].flat):
        if i >= len(images):
            axes.axis("off")
            continue
        shown = overlay(axes, images[i], grids[i], top=top)
        if outlines is not None and outlines[i] is not None:
            axes.contour(outlines[i], [0.5], colors="black", linewidths=1)
        if titles is not None:
            axes.set_title(wrap(titles[i], width), fontsize=9, fontweight="normal")
    figure.colorbar(shown, ax=panels, label=label, aspect=30, pad=0.02)
    figure.suptitle(title)
    return figure


def own_scales(image, grids: dict, title: str = "", size: float = 3.0) -> Figure:
    """Maps of one picture side by side {name: [gh, gw]}, each with a scale and a colour bar of its own."""
    figure, panels = plt.subplots(
        1, len(grids), figsize=((size + 0.9) * len(grids), size + 0.8), squeeze=False
    )
    for axes, (name, grid) in zip(panels[0], grids.items(), strict=True):
        shown = overlay(axes, image, grid)
        figure.colorbar(
            shown, ax=axes, shrink=0.8, ticks=MaxNLocator(5), format=FuncFormatter(short)
        )
        axes.set_title(name, fontsize=11)
    figure.suptitle(title)
    return figure


def pair(
    image,
    grid,
    words,
    scores,
    special: float | None = None,
    title: str = "",
    label: str = "score",
    strength: float = 0.85,
    top: float | None = None,
    marked=None,
    word: int | None = None,
    below: float = 0.0,
    above: float = 0.0,
) -> Figure:
    """A picture, its map with a colour bar, and its caption's words as bars; word: the number of one to mark.

    Laid out by hand, in inches, which is drawn three times as fast as a layout that has to be found. below, above:
    inches to leave free under and over it all.
    """
    width, height, side, low = 10.6, 4.4 + below + above, 3.3, 0.5 + below
    figure = plt.figure(figsize=(width, height), layout="none")

    def place(x, y, w, h):
        return figure.add_axes([x / width, y / height, w / width, h / height])

    left, middle, right = (
        place(0.1, low, side, side),
        place(3.6, low, side, side),
        place(8.95, low, 1.6, side),
    )
    bar = place(7.0, low + 0.3, 0.13, side - 0.6)
    show_image(left, image)
    shown = overlay(middle, image, grid, top=top, strength=strength, marked=marked)
    figure.colorbar(shown, cax=bar, ticks=MaxNLocator(5), format=FuncFormatter(short)).set_label(
        label, fontsize=9
    )
    bar.tick_params(labelsize=8.5)
    word_bars(right, words, scores, special, word=word)
    for axes, name in (
        (left, "the picture"),
        (middle, "over its patches"),
        (right, "over the words"),
    ):
        axes.set_title(name, fontsize=11)
    figure.text(0.1 / width, 1 - (0.1 + above) / height, title, va="top", fontsize=12)
    return figure
