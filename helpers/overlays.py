"""Maps drawn: over the picture's patches, and as bars over a caption's words.

A map is shown as it is, one square a patch, never smoothed: what looks like an outline should be one. Maps that are to
be compared share one scale, which the colour bar tells.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from helpers.plots import TEXT, literal, picture, wrap


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
    grey = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.4)
    picture(axes, Image.blend(image.convert("RGB"), grey, min(1.0, 1.5 * strength)))
    top = max(grid.max(), 1e-12) if top is None else top
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = axes.imshow(grid, cmap=heat(strength), vmin=0, vmax=top, extent=extent, interpolation="nearest")
    if marked is not None:
        corner = marked[1] * width / wide - 0.5, marked[0] * height / high - 0.5
        axes.add_patch(plt.Rectangle(corner, width / wide, height / high, fill=False, edgecolor="black", linewidth=2))
    return shown


def word_bars(axes, words, scores, special: float | None = None, top: float | None = None) -> None:
    """A caption's words from top to bottom, each with its score as a bar; special: the share [CLS] and [SEP] take."""
    scores = np.asarray(scores, float)
    axes.barh(range(len(words)), scores, color=TEXT, alpha=0.85, height=0.7)
    axes.set_yticks(range(len(words)), [literal(word) for word in words], fontsize=10 if len(words) < 14 else 8)
    axes.set_xlim(0, 1.05 * max(scores.max(initial=0) if top is None else top, 1e-12))
    axes.locator_params(axis="x", nbins=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="score" if special is None else f"score ([CLS] and [SEP] take {special:.0%})")


def maps(images, grids, titles=None, columns: int = 5, title: str = "", label: str = "score",
         top: float | None = None, size: float = 2.0, sources: bool = False, outlines=None) -> Figure:  # fmt: skip
    """Maps [gh, gw] over their pictures, in rows, with one colour bar for all; titles [N] stand above them.

    top: the end of the scale, by default the largest value of all; sources: with the first row's pictures as they are
    above it; outlines [N]: a mask [H, W] to outline in each picture, or None.
    """
    columns, extra = min(columns, len(images)), int(sources)
    rows, width = -(-len(images) // columns), int(size * 12)
    tallest = max((wrap(t, width).count("\n") + 1 for t in titles), default=0) if titles is not None else 0
    high = (size + 0.2 * tallest) * rows + extra * size + 0.5
    figure, panels = plt.subplots(rows + extra, columns, figsize=(size * columns + 1, high), squeeze=False)
    top = max(max(np.asarray(grid).max() for grid in grids), 1e-12) if top is None else top
    for axes, image in zip(panels[0] if sources else (), images, strict=False):
        picture(axes, image)
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


def pair(image, grid, words, scores, special: float | None = None, title: str = "", label: str = "score",
         strength: float = 0.85, top: float | None = None, marked=None) -> Figure:  # fmt: skip
    """A picture, its map with a colour bar, and its caption's words as bars."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6), width_ratios=[3, 3.5, 3.2])
    picture(left, image)
    shown = overlay(middle, image, grid, top=top, strength=strength, marked=marked)
    figure.colorbar(shown, ax=middle, label=label, shrink=0.85)
    word_bars(right, words, scores, special)
    for axes, name in ((left, "the picture"), (middle, "over its patches"), (right, "over the words")):
        axes.set_title(name, fontsize=11)
    figure.suptitle(title)
    return figure
