"""Every figure of the course: functions from arrays and pictures to a matplotlib `Figure`, without mathematics.

Colours: images are blue, texts orange; right is green, wrong is red.
"""

from __future__ import annotations

import io
import textwrap
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from IPython import get_ipython
from matplotlib.colors import is_color_like
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D
from PIL import Image

from helpers.viz import overlays

IMAGE, TEXT, RIGHT, WRONG, GREY = "#2a6fbb", "#e07b39", "#2e9e5b", "#cc3d3d", "#8a8f98"


def style() -> None:
    """The look of all figures; called once by each notebook's set-up cell."""
    sns.set_theme(style="whitegrid", context="notebook")
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
            "figure.titlesize": 14,
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "image.interpolation": "antialiased",
        }
    )
    if shell := get_ipython():  # a gallery must not make the notebook too heavy for GitHub
        plt.close(
            plt.figure()
        )  # matplotlib sets up its own formatter with the first figure; ours comes after it
        shell.display_formatter.formatters["image/png"].for_type(Figure, light_png)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, and closed: what a notebook keeps."""
    data = light_png(figure)
    plt.close(figure)
    return data


def light_png(figure: Figure) -> bytes:
    """The figure as PNG bytes; where many pictures make it heavy, in 256 colours, a fifth of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    if buffer.tell() > 140_000:
        colours = Image.open(buffer).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE)
        buffer = io.BytesIO()
        colours.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def literal(text: str) -> str:
    """Text that matplotlib shows as it is, where two `$` would otherwise make a formula of what is between them."""
    return text.replace("$", r"\$")


def wrap(text: str, width: int, lines: int = 6) -> str:
    """A caption for a figure: broken into `lines` at most of `width` characters, and literal."""
    return literal("\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")))


def show_image(axes, image, edge: str | None = None) -> None:
    """A picture without ticks; `edge` frames it."""
    axes.imshow(np.asarray(image))
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(edge is not None)
        spine.set(color=edge or "black", linewidth=4)


def image_grid(
    images,
    titles=None,
    columns: int = 4,
    size: float = 2.2,
    title: str = "",
    marks=None,
    width=None,
) -> Figure:
    """Pictures in rows with a caption under each; marks: True (right), False (wrong) or None for each picture."""
    rows = -(-len(images) // columns)
    width = width or int(size * 11)
    tallest = (
        max((wrap(t, width).count("\n") + 1 for t in titles), default=0)
        if titles is not None
        else 0
    )
    figure, grid = plt.subplots(
        rows, columns, figsize=(size * columns, (size + 0.19 * tallest) * rows + 0.4), squeeze=False
    )
    for i, axes in enumerate(grid.flat):
        if i >= len(images):
            axes.axis("off")
            continue
        mark = None if marks is None else marks[i]
        show_image(axes, images[i], edge=None if mark is None else (RIGHT if mark else WRONG))
        if titles is not None:
            axes.set_xlabel(
                wrap(titles[i], width),
                fontsize=9,
                color="black" if mark is None else axes.spines["left"].get_edgecolor(),
            )
    figure.suptitle(title)
    return figure


def similarity_matrix(
    images, captions, similarity, title: str = "", ax_label: str = "cosine", fmt: str = ".2f"
) -> Figure:
    """Images [N] (columns, as thumbnails) against captions [M] (rows): similarity [M, N], a number in every cell."""
    similarity = np.asarray(similarity)
    (m, n), left, cell, tall = similarity.shape, 3.3, 0.78, 0.6  # inches
    width, height = left + cell * n + 0.9, tall * m + cell + 0.5
    figure = plt.figure(figsize=(width, height), layout="none")

    def place(x, y, w, h):
        return figure.add_axes([x / width, y / height, w / width, h / height])

    axes = place(left, 0.1, cell * n, tall * m)
    bar = place(left + cell * n + 0.15, 0.1 + 0.1 * tall * m, 0.14, 0.8 * tall * m)
    limit = np.abs(similarity).max()
    sns.heatmap(
        similarity,
        annot=True,
        fmt=fmt,
        cmap="vlag",
        vmin=-limit,
        vmax=limit,
        ax=axes,
        cbar_ax=bar,
        linewidths=1,
        cbar_kws={"label": ax_label},
        annot_kws={"fontsize": 9},
    )
    axes.set_yticks(
        np.arange(m) + 0.5, [wrap(c, 44, 2) for c in captions], rotation=0, fontsize=8.5
    )
    axes.set_xticks([])
    for i, image in enumerate(images):
        show_image(
            place(left + (i + 0.04) * cell, 0.1 + tall * m + 0.04, 0.92 * cell, 0.92 * cell), image
        )
    for k in range(min(m, n)):
        axes.add_patch(
            plt.Rectangle((k, k), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False)
        )
    figure.suptitle(
        title, x=left / width, ha="left", y=1 - 0.05 / height, fontweight="bold", fontsize=12
    )
    return figure


def number_grids(
    tables: dict, title: str = "", fmt: str = ".2f", rows=None, columns=None, cmap: str = "Blues"
) -> Figure:
    """Small matrices side by side, each named, every number visible: {"softmax over rows": [n, n], …}."""
    figure, grid = plt.subplots(1, len(tables), figsize=(3.5 * len(tables), 3.5), squeeze=False)
    for axes, (name, table) in zip(grid[0], tables.items(), strict=True):
        table = np.asarray(table)
        sns.heatmap(
            table,
            annot=True,
            fmt=fmt,
            cmap=cmap,
            cbar=False,
            square=True,
            linewidths=1,
            ax=axes,
            xticklabels=columns or [f"text {j}" for j in range(table.shape[1])],
            yticklabels=rows or [f"image {i}" for i in range(table.shape[0])],
        )
        axes.set_title(name, fontsize=11)
        axes.tick_params(axis="y", rotation=0)
    figure.suptitle(title)
    return figure


def training_curves(
    histories: dict, title: str = "", recall: str = "dev_recall@5", chance_loss: float | None = None
) -> Figure:
    """Loss, dev recall and temperature by epoch, for one or more named histories (lists of rows of `train_heads`)."""
    figure, (loss, found, scale) = plt.subplots(1, 3, figsize=(12, 3.6))
    for k, (name, history) in enumerate(histories.items()):
        color = sns.color_palette()[k]
        epochs = [row["epoch"] for row in history]
        loss.plot(
            epochs,
            [row["train_loss"] for row in history],
            color=color,
            linestyle="--",
            label=f"{name}, train",
        )
        loss.plot(epochs, [row["dev_loss"] for row in history], color=color, label=f"{name}, dev")
        found.plot(epochs, [row[recall] for row in history], color=color, label=name)
        scale.plot(epochs, [np.exp(row["logit_scale"]) for row in history], color=color, label=name)
    if chance_loss is not None:
        loss.axhline(chance_loss, color=GREY, linestyle=":")
        spot = {
            "xy": (0.12, chance_loss),
            "xycoords": loss.get_yaxis_transform(),
            "xytext": (0, -3),
        }
        loss.annotate(
            "nothing learned", **spot, textcoords="offset points", va="top", color=GREY, fontsize=9
        )
    loss.set(title="Contrastive loss", xlabel="epoch", ylabel="loss (nats)")
    found.set(
        title="Recall on dev",
        xlabel="epoch",
        ylabel=recall.removeprefix("dev_") + ", text→image",
        ylim=(0, 1),
    )
    scale.set(title="Temperature", xlabel="epoch", ylabel="factor on the cosines")
    loss.legend(fontsize=9)
    if len(histories) > 1:
        found.legend(fontsize=9)
    figure.suptitle(title)
    return figure


def embedding_map(
    points, kinds, title: str = "", links: bool = False, labels=("image", "caption"), axes=None
) -> Figure:
    """Points [N, 2] of two kinds (0 or 1) in one plane; links: the first half belongs to the second, row by row.

    `axes`: draws there instead of in a figure of its own.
    """
    points, kinds = np.asarray(points), np.asarray(kinds)
    axes = plt.subplots(figsize=(6, 5))[1] if axes is None else axes
    if links:
        half = len(points) // 2
        for a, b in zip(points[:half], points[half:], strict=True):
            axes.plot(*zip(a, b), color=GREY, linewidth=0.5, alpha=0.5, zorder=1)
    for kind, (color, label) in enumerate(zip((IMAGE, TEXT), labels, strict=True)):
        axes.scatter(
            *points[kinds == kind].T,
            s=14,
            color=color,
            label=label,
            alpha=0.75,
            edgecolor="none",
            zorder=2,
        )
    axes.set(title=title, xlabel="first principal component", ylabel="second principal component")
    axes.legend()
    return axes.figure


def histograms(
    groups: dict, title: str = "", xlabel: str = "cosine", bins=60, marks: dict | None = None
) -> Figure:
    """Overlaid densities of named samples; marks: {label: x} draws a named vertical line."""
    figure, axes = plt.subplots(figsize=(8, 3.8))
    everything = np.concatenate([np.ravel(v) for v in groups.values()])
    edges = np.linspace(everything.min(), everything.max(), bins)
    for color, (name, values) in zip(
        (RIGHT, WRONG, IMAGE, TEXT, GREY), groups.items(), strict=False
    ):
        axes.hist(np.ravel(values), edges, density=True, alpha=0.55, color=color, label=name)
    for k, (name, x) in enumerate((marks or {}).items()):
        axes.axvline(x, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            name,
            (x, axes.get_ylim()[1] * (0.93 - 0.1 * k)),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set(title=title, xlabel=xlabel, ylabel="density")
    axes.legend()
    return figure


def word_cloud(counts: dict, title: str = "") -> Figure:
    """Words, larger the more often they occur, the commonest in the middle; a word that names a colour wears it."""
    shades = plt.cm.Blues(np.linspace(0.55, 1, 7))
    figure, axes = plt.subplots(figsize=(10, 4.4))
    bold, most, taken = FontProperties(weight="bold"), max(counts.values()), []
    for word, count in sorted(counts.items(), key=lambda item: -item[1]):
        path = TextPath((0, 0), literal(word), size=8 + 40 * (count / most) ** 0.5, prop=bold)
        box = path.get_extents()
        for turn in np.arange(0, 400, 0.15):  # along a spiral to the first free spot
            x, y = (
                4.4 * turn * np.cos(turn) - box.width / 2,
                1.5 * turn * np.sin(turn) - box.height / 2,
            )
            if all(
                x > b[2] or x + box.width < b[0] or y > b[3] or y + box.height < b[1] for b in taken
            ):
                break
        taken.append((x - 4, y - 4, x + box.width + 4, y + box.height + 4))
        shade = word if is_color_like(word) and len(word) > 1 else shades[len(taken) % 7]
        moved = path.transformed(Affine2D().translate(x - box.x0, y - box.y0))
        axes.add_patch(
            PathPatch(
                moved, facecolor=shade, edgecolor="#555", linewidth=0.6 if shade is word else 0
            )
        )
    low, high = np.min(taken, 0)[:2], np.max(taken, 0)[2:]
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", title=title)
    axes.axis("off")
    return figure


def bars(
    rows: dict,
    title: str = "",
    xlabel: str = "",
    chance: dict | None = None,
    ceiling: dict | None = None,
) -> Figure:
    """Horizontal bars {name: value or (value, (low, high))} between 0 and 1; chance and ceiling as marks on them."""
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.46 * max(2, len(rows))))
    for y, (name, value) in enumerate(rows.items()):
        value, interval = value if isinstance(value, tuple) else (value, None)
        axes.barh(y, value, color=IMAGE, alpha=0.85, height=0.62)
        low, high = interval if interval is not None else (value, value)
        if interval is not None:
            axes.errorbar(
                value,
                y,
                xerr=[[value - interval[0]], [interval[1] - value]],
                color="black",
                capsize=4,
            )
        for marks, look in ((chance, (WRONG, "chance")), (ceiling, (RIGHT, "ceiling"))):
            if marks and name in marks:
                axes.plot(
                    [marks[name]] * 2,
                    [y - 0.4, y + 0.4],
                    color=look[0],
                    linewidth=3,
                    label=look[1] if y == 0 else None,
                )
        inside = low > 0.2  # where no mark of a ceiling runs through the number
        look = {"ha": "right", "color": "white", "fontweight": "bold"} if inside else {}
        spot = {
            "xy": (low if inside else high, y),
            "xytext": (-6 if inside else 6, 0),
            "textcoords": "offset points",
        }
        axes.annotate(f"{value:.3f}", **spot, va="center", fontsize=9, **look)
    axes.set_yticks(range(len(rows)), [literal(name) for name in rows])
    axes.set(title=title, xlabel=xlabel, xlim=(0, 1.08))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if chance or ceiling:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.6 / (0.3 + 0.46 * len(rows))),
            ncols=2,
            frameon=False,
        )
    return figure


def confusion(matrix, names, title: str = "", top: int | None = None) -> Figure:
    """Confusion matrix [C, C] (rows: true class), each row in shares; `top` keeps the most confused classes."""
    matrix = np.asarray(matrix, float)
    if top is not None and top < len(matrix):
        wrong = matrix.sum(1) - np.diag(matrix) + matrix.sum(0) - np.diag(matrix)
        keep = np.sort(np.argsort(-wrong)[:top])
        matrix, names = matrix[np.ix_(keep, keep)], [names[k] for k in keep]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    classes = [literal(name) for name in names]
    figure, axes = plt.subplots(figsize=(2.2 + 0.36 * len(names), 1.8 + 0.34 * len(names)))
    sns.heatmap(
        shares,
        cmap="Blues",
        vmin=0,
        vmax=1,
        xticklabels=classes,
        yticklabels=classes,
        ax=axes,
        square=True,
        cbar_kws={"label": "share of the row", "shrink": 0.7},
    )
    axes.set(title=title, xlabel="predicted", ylabel="true")
    axes.tick_params(axis="x", rotation=60)
    plt.setp(axes.get_xticklabels(), ha="right", rotation_mode="anchor")
    return figure


def found_images(query: str, images, scores, right=None, title: str = "") -> Figure:
    """The images found for a sentence, best first, with their cosines; right ones framed green, wrong ones red."""
    titles = [f"{i + 1}.  cosine {s:.2f}" for i, s in enumerate(scores)]
    heading = title or f"“{wrap(query, 90, 2)}”"
    return image_grid(images, titles, columns=len(images), size=2.1, title=heading, marks=right)


def text_bars(axes, texts, values, colors, width: int, fmt: str = ".2f") -> None:
    """Bars from the top down, each with its number and its text written over it."""
    axes.barh(range(len(texts)), values, color=colors, alpha=0.35, height=0.75)
    for y, (text, value) in enumerate(zip(texts, values, strict=True)):
        label = f"{value:{fmt}}   {wrap(text, width, 2)}"
        axes.annotate(
            label, (0, y), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set(yticks=[], xlim=(min(0, min(values)), max(0.01, max(values)) * 1.02))
    axes.invert_yaxis()
    axes.grid(False)


def found_captions(image, captions, scores, right=None, title: str = "") -> Figure:
    """The captions found for a picture, best first, as bars of cosine; right ones green, wrong ones red."""
    figure, (left, axes) = plt.subplots(1, 2, figsize=(11, 2.9), width_ratios=[2.6, 8])
    show_image(left, image)
    colors = GREY if right is None else [RIGHT if r else WRONG for r in right]
    text_bars(axes, captions, scores, colors, width=88)
    axes.set(xlabel="cosine")
    figure.suptitle(title)
    return figure


def scene_report(image, captions, scores, names, probabilities) -> Figure:
    """A picture, the captions found for it with their cosines, and its most probable classes."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), width_ratios=[3, 5.5, 2.4])
    show_image(left, image)
    text_bars(middle, captions, scores, TEXT, width=56)
    text_bars(right, names, probabilities, IMAGE, width=24, fmt=".0%")
    right.set(xlim=(0, 1))
    for axes, title, label in (
        (left, "the scene", ""),
        (middle, "nearest captions", "cosine"),
        (right, "which class is it?", "probability"),
    ):
        axes.set(xlabel=label)
        axes.set_title(title, fontsize=11)
    return figure


def tokens_and_patches(
    image, grid: int, pieces: list[str], title: str = "", lines: int = 4
) -> Figure:
    """What the towers read: a picture as its strip of patches above its caption as a strip of WordPieces."""
    pixels = np.asarray(image)
    side, columns = pixels.shape[0] // grid, -(-grid * grid // lines)
    patches = [
        pixels[r * side : (r + 1) * side, c * side : (c + 1) * side]
        for r in range(grid)
        for c in range(grid)
    ]
    busiest = int(np.argmax([patch.astype(float).std(axis=(0, 1)).sum() for patch in patches]))

    def tiles(columns):  # the patches in rows, two pixels apart
        canvas = np.full(
            (-(-grid * grid // columns) * (side + 2) - 2, columns * (side + 2) - 2, 3),
            255,
            np.uint8,
        )
        for k, patch in enumerate(patches):
            y, x = k // columns * (side + 2), k % columns * (side + 2)
            canvas[y : y + side, x : x + side] = patch
        return canvas

    figure = plt.figure(figsize=(11, 5.5), layout="none")
    cut, strip = (
        figure.add_axes([0.22, 0.55, 0.18, 0.36]),
        figure.add_axes([0.065, 0.215, 0.915, 0.235]),
    )
    one = f"patch {busiest + 1}: {side} × {side} × 3 = {3 * side * side} numbers"
    for axes, content, name in (
        (figure.add_axes([0.01, 0.55, 0.18, 0.36]), pixels, "the picture"),
        (cut, tiles(grid), f"cut into {grid} × {grid} patches"),
        (figure.add_axes([0.45, 0.55, 0.18, 0.36]), patches[busiest], one),
        (strip, tiles(columns), ""),
    ):
        show_image(axes, content)
        axes.set_title(name, fontsize=10)
    for axes, wide in ((cut, grid), (strip, columns)):
        corner = (busiest % wide * (side + 2) - 1.5, busiest // wide * (side + 2) - 1.5)
        axes.add_patch(
            plt.Rectangle(corner, side + 2, side + 2, fill=False, edgecolor=WRONG, linewidth=2)
        )
    figure.text(
        0.01,
        0.475,
        f"[CLS], then {len(patches)} patches row by row: what the ViT reads",
        fontsize=10,
    )
    figure.text(0.01, 0.155, f"{len(pieces)} WordPieces: what BERT reads", fontsize=10)
    words = figure.add_axes([0, 0, 1, 1])
    words.axis("off")
    words.set(xlim=(0, 1), ylim=(0, 1))
    widths = np.array([len(p) + 2.2 for p in pieces], float)
    widths *= 0.98 / widths.sum()
    boxes = [
        (x, 0.06, w - 0.008, 0.07)
        for x, w in zip(np.cumsum(widths) - widths + 0.01, widths, strict=True)
    ]
    for (x, y, wide, high), piece in zip(
        [*boxes, (0.01, 0.395, 0.048, 0.05)], [*pieces, "[CLS]"], strict=True
    ):
        face, edge = ("#eeeeee", GREY) if piece.startswith("[") else ("#fbe3d3", TEXT)
        look = {"boxstyle": "round,pad=0,rounding_size=0.008", "facecolor": face, "edgecolor": edge}
        words.add_patch(FancyBboxPatch((x, y), wide, high, **look))
        size = 9.5 if len(pieces) < 24 else 8
        words.text(
            x + wide / 2, y + high / 2, literal(piece), ha="center", va="center", fontsize=size
        )
    figure.suptitle(title, fontweight="bold", fontsize=12)
    return figure


def matrix_cell(images, captions, similarity, row: int, column: int) -> Figure:
    """A matrix of cosines [M, N], captions by pictures, with one cell marked, and what it compares."""
    similarity = np.asarray(similarity)
    figure = plt.figure(figsize=(10, 4), layout="none")
    table, bar = (
        figure.add_axes([0.06, 0.13, 0.31, 0.77]),
        figure.add_axes([0.385, 0.2, 0.012, 0.6]),
    )
    limit = np.abs(similarity).max()
    shown = table.imshow(similarity, cmap="vlag", vmin=-limit, vmax=limit, aspect="auto")
    figure.colorbar(shown, cax=bar).set_label("cosine", fontsize=9)
    bar.tick_params(labelsize=8)
    for color, line in (("white", 5), ("black", 2.5)):
        spot = (column - 0.5, row - 0.5)
        table.add_patch(
            plt.Rectangle(spot, 1, 1, fill=False, edgecolor=color, linewidth=line, clip_on=False)
        )
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
    show_image(figure.add_axes([0.47, 0.14, 0.22, 0.72]), images[column])
    figure.text(0.71, 0.83, f"“{wrap(captions[row], 36)}”", va="top", fontsize=11, color=TEXT)
    figure.text(0.71, 0.17, "\n".join(told), va="bottom", fontsize=10, linespacing=1.6)
    figure.text(
        0.06, 0.94, f"caption {row + 1} with picture {column + 1}", fontsize=12, fontweight="bold"
    )
    return figure


def _ticks(count: int) -> list[int]:
    return list(range(0, count, max(1, -(-count // 10))))


def sharpened(image, captions, cosines, probabilities, factor: float, most: int = 8) -> Figure:
    """A picture, its cosines with captions [M], and the softmax over them once they are multiplied by a factor.

    The `most` highest are shown.
    """
    order, count = np.argsort(-np.asarray(cosines))[:most], len(captions)
    figure = plt.figure(figsize=(10, 4), layout="none")
    show_image(figure.add_axes([0.01, 0.2, 0.22, 0.6]), image)
    left, right = (
        figure.add_axes([0.26, 0.13, 0.48, 0.75]),
        figure.add_axes([0.76, 0.13, 0.22, 0.75]),
    )
    names, cosines, probabilities = (
        [values[i] for i in order] for values in (captions, cosines, probabilities)
    )
    text_bars(
        left, [shorten(name, 58, placeholder=" …") for name in names], cosines, TEXT, width=60
    )
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
    figure = overlays.pair(
        image, seen.grid, *seen.words, title=title, label="relevance", below=below, above=above
    )
    width, height = figure.get_size_inches()
    figure.text(
        0.1 / width,
        1 - 0.08 / height,
        notice,
        va="top",
        fontsize=12,
        fontweight="bold",
        color=WRONG,
    )
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
