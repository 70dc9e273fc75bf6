"""The course's figures: functions from arrays and images to a matplotlib `Figure`.

Images are blue, texts orange; right is green, wrong is red.
"""

import io
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython import get_ipython
from matplotlib.figure import Figure
from PIL import Image

from helpers.storage.images import shown

IMAGE, TEXT, RIGHT, WRONG, GREY = "#2a6fbb", "#e07b39", "#2e9e5b", "#cc3d3d", "#8a8f98"
HEAVY = 140_000  # bytes from which on a PNG is stored in 256 colours


def style() -> None:
    """The look of all figures; called once by each notebook's set-up cell."""
    sns.set_theme(style="whitegrid")
    plt.style.use(Path(__file__).with_name("course.mplstyle"))
    shell = get_ipython()
    if shell:
        # matplotlib sets up its own formatter with the first figure; ours has to come after it.
        plt.close(plt.figure())
        shell.display_formatter.formatters["image/png"].for_type(Figure, light_png)


def light_png(figure: Figure) -> bytes:
    """The figure as PNG bytes; a heavy one in 256 colours, a fifth of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    if buffer.tell() > HEAVY:
        pixels = Image.open(buffer).convert("RGB")
        colours = pixels.quantize(256, Image.Quantize.MEDIANCUT, kmeans=3)
        buffer = io.BytesIO()
        colours.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, and closed: fast rather than small, for what is drawn again."""
    buffer = io.BytesIO()
    # A figure that was laid out by hand is not cropped.
    crop = "tight" if figure.get_layout_engine() else None
    figure.savefig(buffer, format="png", bbox_inches=crop, pil_kwargs={"compress_level": 1})
    plt.close(figure)
    return buffer.getvalue()


def literal(text: str) -> str:
    """Text that matplotlib shows as it is: what stands between two `$` is no formula."""
    return text.replace("$", r"\$")


def wrap(text: str, width: int, lines: int = 6) -> str:
    """Text in at most `lines` lines of at most `width` characters, to be shown as it is."""
    return literal("\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")))


def show_image(axes, image, edge: str | None = None) -> None:
    """An image without ticks, in a frame of the colour `edge`."""
    axes.imshow(np.asarray(shown(image)))
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set(visible=edge is not None, color=edge or "black", linewidth=4)


def image_grid(
    images, titles=None, columns=4, size=2.2, title="", marks=None, width=None
) -> Figure:
    """Images in rows, a caption under each.

    size: inches of an image; width: characters of a caption's line; marks: for each image True
    (right, green), False (wrong, red) or None.
    """
    rows, width = -(-len(images) // columns), width or int(size * 11)
    parts = [text.split("\n") for text in (() if titles is None else titles)]
    captions = ["\n".join(wrap(line, width) for line in lines) for lines in parts]
    tallest = max((caption.count("\n") + 1 for caption in captions), default=0)
    shape = (size * columns, (size + 0.15 * tallest + 0.07) * rows + 0.3)
    figure, grid = plt.subplots(rows, columns, figsize=shape, squeeze=False)
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    for i, (axes, image) in enumerate(zip(grid.flat, images)):
        mark = None if marks is None else marks[i]
        edge = None if mark is None else (RIGHT if mark else WRONG)
        show_image(axes, image, edge)
        if captions:
            axes.set_xlabel(captions[i], fontsize=9, color=edge or "black")
    figure.suptitle(title)
    return figure


def similarity_matrix(images, captions, similarity, title="") -> Figure:
    """Cosines [M, N] of captions (rows) with images (columns); the diagonal is framed."""
    similarity = np.asarray(similarity).round(2) + 0  # no -0.00
    rows, columns = similarity.shape
    figure, axes = plt.subplots(figsize=(4.6 + 0.78 * columns, 1.6 + 0.6 * rows))
    numbers = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 9}, "linewidths": 1}
    scale = {"cmap": "vlag", "vmin": -1, "vmax": 1, "cbar_kws": {"label": "cosine"}}
    sns.heatmap(similarity, ax=axes, xticklabels=False, **numbers, **scale)
    names = [wrap(caption, 44, 4) for caption in captions]
    axes.set_yticks(np.arange(rows) + 0.5, names, rotation=0, fontsize=8.5)
    for column, image in enumerate(images):
        above = (column + 0.04) / columns, 1.01, 0.92 / columns, 1.2 / rows
        show_image(axes.inset_axes(above), image)
    for k in range(min(rows, columns)):
        frame = {"fill": False, "edgecolor": "black", "linewidth": 2, "clip_on": False}
        axes.add_patch(plt.Rectangle((k, k), 1, 1, **frame))
    figure.suptitle(title)
    return figure


def number_grids(tables: dict, title="", rows=None, columns=None) -> Figure:
    """Small matrices side by side, every number visible: {"softmax over rows": [n, n], …}."""
    figure, grid = plt.subplots(1, len(tables), figsize=(3 * len(tables), 3), squeeze=False)
    numbers = {"annot": True, "fmt": ".2f", "cmap": "Blues", "cbar": False, "linewidths": 1}
    for axes, (name, table) in zip(grid[0], tables.items()):
        sns.heatmap(np.asarray(table), ax=axes, square=True, **numbers)
        axes.set_xticklabels(columns or [f"text {j}" for j in range(len(table[0]))])
        axes.set_yticklabels(rows or [f"image {i}" for i in range(len(table))], rotation=0)
        axes.set_title(name, fontsize=11)
    figure.suptitle(title)
    return figure


def histograms(groups: dict, title="", xlabel="cosine", bins=60, marks: dict | None = None):
    """Densities of named samples on top of each other; marks: {name: x} draws vertical lines."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    edges = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins - 1)
    colors = (RIGHT, WRONG, IMAGE, TEXT, GREY)
    for color, (name, values) in zip(colors, groups.items()):
        axes.hist(values, edges, density=True, alpha=0.55, color=color, label=name)
    for k, (name, x) in enumerate((marks or {}).items()):
        axes.axvline(x, color="black", linestyle="--", linewidth=1)
        spot = x, axes.get_ylim()[1] * (0.93 - 0.1 * k)
        axes.annotate(f"{name} ", spot, ha="right", fontsize=9)
    axes.set(title=title, xlabel=xlabel, ylabel="density")
    axes.legend()
    return figure


def bars(rows: dict, title="", xlabel="", chance=(), attainable=()) -> Figure:
    """Horizontal bars between 0 and 1, with their numbers: {name: value or (value, (low, high))}.

    chance, attainable: {name: value}, drawn as marks across the bars.
    """
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.46 * max(2, len(rows))))
    labels = []
    for y, (name, value) in enumerate(rows.items()):
        value, interval = value if isinstance(value, tuple) else (value, None)
        labels.append(f"{literal(name)}   {value:.3f}")
        axes.barh(y, value, color=IMAGE, alpha=0.85, height=0.62)
        if interval is not None:
            ends = [[value - interval[0]], [interval[1] - value]]
            axes.errorbar(value, y, xerr=ends, color="black", capsize=4)
    for label, marks, color in (("chance", chance, WRONG), ("attainable", attainable, RIGHT)):
        spots = [(marks[name], y) for y, name in enumerate(rows) if name in marks]
        for k, (x, y) in enumerate(spots):
            axes.vlines(x, y - 0.4, y + 0.4, color=color, linewidth=3, label="_" * k + label)
    axes.set_yticks(range(len(rows)), labels)
    axes.set(title=title, xlabel=xlabel, xlim=(0, 1.02))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if chance or attainable:
        below = 0.5, -0.6 / (0.3 + 0.46 * len(rows))
        axes.legend(loc="upper center", bbox_to_anchor=below, ncols=2, frameon=False)
    return figure


def found_images(images, scores, right=None, title="") -> Figure:
    """The images found for a query, best first, right ones framed green, wrong ones red."""
    titles = [f"{i + 1}.  cosine {score:.2f}" for i, score in enumerate(scores)]
    return image_grid(images, titles, len(images), 2.1, wrap(title, 100, 2), marks=right)


def text_bars(axes, texts, values, colors, width: int, fmt=".2f", title="", xlabel="") -> None:
    """Bars from the top down, each with its number and its text written over it.

    width: characters of a text's line; fmt: of the numbers; with "%" the axis ends at 1.
    """
    axes.barh(range(len(texts)), values, color=colors, alpha=0.35, height=0.75)
    place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
    for y, (text, value) in enumerate(zip(texts, values)):
        axes.annotate(f"{value:{fmt}}   {wrap(text, width, 2)}", (0, y), **place)
    end = 1 if "%" in fmt else max(0.01, *values) * 1.02
    axes.set(yticks=[], xlabel=xlabel, xlim=(min(0, *values), end))
    axes.set_title(title, fontsize=11)
    axes.invert_yaxis()
    axes.grid(False)


def found_captions(image, captions, scores, right=None, title="") -> Figure:
    """The captions found for an image, as bars of cosine; right ones green, wrong ones red."""
    figure, (left, axes) = plt.subplots(1, 2, figsize=(11, 2.9), width_ratios=[2.6, 8])
    show_image(left, image)
    colors = GREY if right is None else [RIGHT if r else WRONG for r in right]
    text_bars(axes, captions, scores, colors, width=88, xlabel="cosine")
    figure.suptitle(title)
    return figure
