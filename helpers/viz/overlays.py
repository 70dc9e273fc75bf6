"""Maps drawn: over an image's patches, and as bars over a caption's words.

A map is shown as it is, one square a patch, never smoothed. Maps to be compared share one scale,
which starts at 0.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from helpers.storage.images import shown
from helpers.viz.figures import TEXT, literal, show_image, wrap

SHORT = FuncFormatter(lambda value, _: f"{value:.2g}")  # 0.0025, 0.5, 1


def heat(strength: float) -> ListedColormap:
    """From nothing over yellow and red to dark red: low values let the image shine through."""
    colours = plt.get_cmap("YlOrRd")(np.linspace(0.1, 1, 256))  # [256, 4]
    colours[:, 3] = strength * np.linspace(0, 2, 256).clip(max=1)
    return ListedColormap(colours)


def overlay(axes, image, grid, top=None, strength: float = 0.85, marked=None, visible=None):
    """A map [gh, gw] over its image, which turns grey and pale; returns what a colour bar takes.

    top: the end of the scale, by default the map's largest value; strength: from 0, the image
    alone, to 1, where high values hide it; marked: (row, column) of a patch to outline; visible:
    the tower's `visible`, where it does not see the whole image.
    """
    grid = np.asarray(grid, float)
    top = max(grid.max(), 1e-12) if top is None else top
    box = (0, 0, *image.size) if visible is None else visible(image.size)
    full, image = image.size, shown(image)
    width, height = image.size
    grey = image.convert("L").convert("RGB")
    grey = Image.blend(grey, Image.new("RGB", image.size, "white"), 0.4)
    show_image(axes, Image.blend(image.convert("RGB"), grey, min(1.0, 1.5 * strength)))
    look = {"cmap": heat(strength), "interpolation": "nearest"}
    left, right = (x * width / full[0] - 0.5 for x in box[::2])
    upper, lower = (y * height / full[1] - 0.5 for y in box[1::2])
    drawn = axes.imshow(grid, vmin=0, vmax=top, extent=(left, right, lower, upper), **look)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    if marked is not None:
        wide, high = (right - left) / grid.shape[1], (lower - upper) / grid.shape[0]  # of a patch
        corner = left + marked[1] * wide, upper + marked[0] * high
        for color, line in (("white", 4), ("black", 2)):  # visible on light and on dark
            look = {"fill": False, "edgecolor": color, "linewidth": line}
            axes.add_patch(plt.Rectangle(corner, wide, high, **look))
    return drawn


def word_bars(axes, words, scores, special: float | None = None, word: int | None = None) -> None:
    """A caption's words from top to bottom, each with its score as a bar.

    special: the share that [CLS] and [SEP] take; word: the number of one to mark.
    """
    scores = np.asarray(scores, float)
    axes.barh(range(len(words)), scores, color=TEXT, alpha=0.85, height=0.7)
    inches = axes.get_position().height * axes.figure.get_figheight()
    look = {"fontsize": min(10, 0.8 * 72 * inches / max(len(words), 1)), "annotation_clip": False}
    look |= {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right", "va": "center"}
    axes.set_yticks([])
    # Texts are drawn faster than the labels of ticks.
    for i, name in enumerate(words):
        name = literal(name if len(name) <= 16 else f"{name[:15]}…")
        name, weight = (f"▸ {name}", "bold") if i == word else (name, "normal")
        axes.annotate(name, (0, i), fontweight=weight, **look)
    axes.set_xlim(0, 1.05 * max(scores.max(initial=0), 1e-12))
    axes.xaxis.set(major_locator=MaxNLocator(3), major_formatter=SHORT)
    axes.tick_params(axis="x", labelsize=8.5)
    # Few words are no reason for fat bars.
    axes.set_ylim(max(len(words), 8) - 0.4, -0.6)
    label = "score" if special is None else f"score ([CLS] and [SEP] take {special:.0%})"
    axes.set_xlabel(label, fontsize=9, loc="right")


def maps(images, grids, titles=None, columns=5, title="", label="score", top=None, size=2.0,
         sources=False, outlines=None, visible=None) -> Figure:  # fmt: skip
    """Maps [gh, gw] over their images, in rows, with one colour bar for all.

    titles [N]: one above each; top: the end of the scale, by default the largest value of all;
    size: of an image, in inches; sources: with the first row's images as they are above it;
    outlines [N]: a mask [H, W] to outline in each image, or None; visible: as in `overlay`.
    """
    count, extra = len(images), int(sources)
    titles = [wrap(text, int(size * 12)) for text in titles or [""] * count]
    columns = min(columns, count)
    rows = -(-count // columns)
    tall = max(text.count("\n") + bool(text) for text in titles)  # lines of the longest title
    high = (size + 0.2 * tall) * rows + extra * size + 0.5
    shape = {"figsize": (size * columns + 1, high), "squeeze": False}
    figure, panels = plt.subplots(rows + extra, columns, **shape)
    top = max(*(float(np.max(np.asarray(grid))) for grid in grids), 1e-12) if top is None else top
    for axes, image in zip(panels[0][: columns * extra], images):
        show_image(axes, image)
    places, outlines = panels[extra:].flat, outlines or [None] * count
    for axes in places[count:]:
        axes.axis("off")
    for axes, image, grid, text, outline in zip(places[:count], images, grids, titles, outlines):
        drawn = overlay(axes, image, grid, top=top, visible=visible)
        axes.set_title(text, fontsize=9, fontweight="normal")
        if outline is not None:
            axes.contour(outline, [0.5], colors="black", linewidths=1)
    figure.colorbar(drawn, ax=panels, label=label, aspect=30, pad=0.02)
    figure.suptitle(title)
    return figure


def map_and_words(
    image, grid, words, title="", label="score", strength=0.85, marked=None, word=None, visible=None
) -> Figure:
    """An image, its map with a colour bar, and its caption's words (`attention.Words`) as bars.

    strength, marked, visible: as in `overlay`; word: the number of one to mark.
    """
    width, height = 10.6, 4.4
    # Laid out by hand, in inches: drawn three times as fast as a layout that has to be found.
    figure = plt.figure(figsize=(width, height), layout="none")
    maps_at = [(0.1, 0.5, 3.3, 3.3), (3.6, 0.5, 3.3, 3.3)]  # left, bottom, width, height
    places = [*maps_at, (7, 0.8, 0.13, 2.7), (8.95, 0.5, 1.6, 3.3)]
    left, middle, bar, right = (
        figure.add_axes([x / width, y / height, w / width, h / height]) for x, y, w, h in places
    )
    show_image(left, image)
    look = {"strength": strength, "marked": marked, "visible": visible}
    drawn = overlay(middle, image, grid, **look)
    figure.colorbar(drawn, cax=bar, ticks=MaxNLocator(5), format=SHORT)
    bar.set_ylabel(label, fontsize=9)
    bar.tick_params(labelsize=8.5)
    word_bars(right, *words, word=word)
    names = {left: "the picture", middle: "over its patches", right: "over the words"}
    for axes, name in names.items():
        axes.set_title(name, fontsize=11)
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", fontsize=12)
    return figure
