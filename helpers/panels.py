"""The figures behind the widgets: one cell of a matrix, a softmax at some temperature, all about one picture."""

from __future__ import annotations

from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers import overlays
from helpers.plots import IMAGE, TEXT, WRONG, picture, text_bars, wrap


def matrix_cell(images, captions, similarity, row: int, column: int) -> Figure:
    """A matrix of cosines [M, N], captions by pictures, with one cell marked, and what it compares."""
    similarity = np.asarray(similarity)
    figure = plt.figure(figsize=(10, 4), layout="none")
    table, bar = figure.add_axes([0.06, 0.13, 0.31, 0.77]), figure.add_axes([0.385, 0.2, 0.012, 0.6])
    limit = np.abs(similarity).max()
    shown = table.imshow(similarity, cmap="vlag", vmin=-limit, vmax=limit, aspect="auto")
    figure.colorbar(shown, cax=bar).set_label("cosine", fontsize=9)
    bar.tick_params(labelsize=8)
    for color, line in (("white", 5), ("black", 2.5)):
        spot = (column - 0.5, row - 0.5)
        table.add_patch(plt.Rectangle(spot, 1, 1, fill=False, edgecolor=color, linewidth=line, clip_on=False))
    rows, columns = similarity.shape
    table.set(xlabel="picture", ylabel="caption", xticks=_ticks(columns), yticks=_ticks(rows))
    table.set_xticklabels([k + 1 for k in _ticks(columns)], fontsize=8)
    table.set_yticklabels([k + 1 for k in _ticks(rows)], fontsize=8)
    table.grid(False)
    score = similarity[row, column]
    better = (similarity[row] > score).sum(), (similarity[:, column] > score).sum()
    told = [
        f"cosine {score:.2f}",
        f"number {1 + better[0]} of the caption's {columns} pictures",
        f"number {1 + better[1]} of the picture's {rows} captions",
    ]
    picture(figure.add_axes([0.47, 0.14, 0.22, 0.72]), images[column])
    figure.text(0.71, 0.83, f"“{wrap(captions[row], 36)}”", va="top", fontsize=11, color=TEXT)
    figure.text(0.71, 0.17, "\n".join(told), va="bottom", fontsize=10, linespacing=1.6)
    figure.text(0.06, 0.94, f"caption {row + 1} with picture {column + 1}", fontsize=12, fontweight="bold")
    return figure


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 10))))


def sharpened(image, captions, cosines, probabilities, factor: float, most: int = 8) -> Figure:
    """A picture, its cosines with captions [M], and the softmax over them once they are multiplied by a factor.

    The `most` highest are shown.
    """
    order, count = np.argsort(-np.asarray(cosines))[:most], len(captions)
    figure = plt.figure(figsize=(10, 4), layout="none")
    picture(figure.add_axes([0.01, 0.2, 0.22, 0.6]), image)
    left, right = figure.add_axes([0.26, 0.13, 0.48, 0.75]), figure.add_axes([0.76, 0.13, 0.22, 0.75])
    names, cosines, probabilities = ([values[i] for i in order] for values in (captions, cosines, probabilities))
    text_bars(left, [shorten(name, 58, placeholder=" …") for name in names], cosines, TEXT, width=60)
    text_bars(right, ["" for _ in names], probabilities, IMAGE, width=10, fmt=".1%")
    right.set(xlim=(0, 1))
    _head(left, "cosines, as they are", "cosine")
    _head(right, f"softmax of {factor:.3g} × cosine", f"probability among {count}")
    return figure


def about(image, seen, caption, found, scores, names, probabilities, notice: str = "") -> Figure:
    """A picture, where its cosine with a caption comes from, the captions found for it and its most probable classes.

    seen: (grid [gh, gw], (words, scores, special), cosine); notice: what to know before anything else.
    """
    below, above = 2.5, 0.3 if notice else 0.0
    title = f"“{wrap(caption, 84, 1)}”: cosine {seen.cosine:.2f}"
    figure = overlays.pair(image, seen.grid, *seen.words, title=title, label="relevance", below=below, above=above)
    width, height = figure.get_size_inches()
    figure.text(0.1 / width, 1 - 0.08 / height, notice, va="top", fontsize=12, fontweight="bold", color=WRONG)
    left = figure.add_axes([0.2 / width, 0.5 / height, 6.6 / width, 1.7 / height])
    right = figure.add_axes([7.2 / width, 0.5 / height, 3.3 / width, 1.7 / height])
    text_bars(left, [shorten(text, 88, placeholder=" …") for text in found], scores, TEXT, width=90)
    text_bars(right, names, probabilities, IMAGE, width=30, fmt=".0%")
    right.set(xlim=(0, 1))
    _head(left, "nearest captions", "cosine")
    _head(right, "which class is it?", "probability")
    return figure


def _head(axes, title: str, label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(label, fontsize=9)
    axes.tick_params(labelsize=8.5)
