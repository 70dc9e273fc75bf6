"""Draws the pictures of README and the notebooks into assets/: `python -m scripts.make_pictures`, once heads are trained.

Drawings in them are OpenMoji's (CC BY-SA 4.0).
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from helpers import load_or_build
from helpers.attention import explain
from helpers.config import ROOT, get_profile
from helpers.evaluation import nearest
from helpers.minicoco import render
from helpers.minicoco.scenes import draw
from helpers.viz import figures, overlays

DIAGRAM = (1, 5, 11, 14, 20)  # val scenes with short captions
LOOKED_FOR = "an elephant in the desert"
SENTENCES = ("a red car in the desert", "a teddy bear and a banana", "boats on the lake at sunset")


def clip_diagram(images, captions, similarity) -> Figure:
    """The course in one picture: two towers, two heads, one matrix of similarities [n, n] whose diagonal should win."""
    n, side, low = len(images), 0.62, 0.62
    left, top, middle = 6.55, low + side * n, {"image": 1.95, "text": 4.62}
    figure = plt.figure(figsize=(10, 5.5), layout="none", facecolor="white")
    canvas = figure.add_axes([0, 0, 1, 1])
    canvas.axis("off")
    canvas.set(xlim=(0, 10), ylim=(0, 5.5))

    def box(x, y, w, h, fill, edge, text, color="black", size=10):
        canvas.add_patch(plt.Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge))
        canvas.text(
            x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=size, color=color
        )

    def arrow(*points):
        canvas.plot(*zip(*points, strict=True), color="#444", linewidth=1.6)
        canvas.annotate(
            "",
            points[-1],
            points[-2],
            arrowprops={"arrowstyle": "-|>", "color": "#444", "linewidth": 1.6},
        )

    for kind, name, color in (("image", "ViT", figures.IMAGE), ("text", "BERT", figures.TEXT)):
        y = middle[kind]
        corners = [(2.75, y - 0.72), (4.25, y - 0.45), (4.25, y + 0.45), (2.75, y + 0.72)]
        canvas.add_patch(Polygon(corners, facecolor=color, alpha=0.9, edgecolor="white"))
        canvas.text(
            3.5,
            y,
            f"{name}\n{kind} tower",
            ha="center",
            va="center",
            color="white",
            fontsize=10.5,
            weight="bold",
        )
        box(4.65, y - 0.26, 0.7, 0.52, "white", color, "head", color)
        arrow((2.3, y), (2.7, y))
        arrow((4.25, y), (4.62, y))
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        inset = figure.add_axes(
            [(0.12 + 0.2 * i) / 10, (2.0 - 0.3 * i) / 5.5, 1.25 / 10, 1.25 / 5.5]
        )
        figures.show_image(inset, image, edge="white")
        canvas.text(
            0.12,
            5.24 - 0.32 * i,
            figures.wrap(caption, 40, 1),
            fontsize=7.6,
            va="center",
            bbox={"boxstyle": "round,pad=0.25", "facecolor": "#fdf0e6", "edgecolor": figures.TEXT},
        )
        box(left + i * side, top + 0.1, 0.96 * side, 0.36, "#fbe3d3", figures.TEXT, f"$T_{i + 1}$")
        box(
            left - 0.48,
            top - (i + 1) * side,
            0.36,
            0.96 * side,
            "#d9e6f5",
            figures.IMAGE,
            f"$I_{i + 1}$",
        )
        for j in range(n):
            share = (similarity[i][j] - np.min(similarity)) / np.ptp(similarity)
            fill = plt.cm.Greens(0.3 + 0.6 * share) if i == j else plt.cm.Greys(0.04 + 0.4 * share)
            spot = (left + j * side, top - (i + 1) * side, 0.96 * side, 0.96 * side)
            box(
                *spot,
                fill,
                "white",
                f"$I_{i + 1}\\cdot T_{j + 1}$",
                "white" if i == j else "black",
                9,
            )
    arrow((5.35, middle["image"]), (left - 0.52, middle["image"]))
    arrow(
        (5.35, middle["text"]),
        (left + side * n / 2, middle["text"]),
        (left + side * n / 2, top + 0.48),
    )
    note = "green: pairs, pulled together  ·  grey: all others, pushed apart"
    canvas.text(left + side * n / 2, 0.36, note, ha="center", fontsize=8, color="#444")
    return figure


def typed_sentences(sentences, images, scores, best: int = 5) -> Figure:
    """For each sentence the `best` pictures by score [sentences, images], one sentence a row."""
    figure, grid = plt.subplots(
        len(sentences), best, figsize=(2 * best, 2.75 * len(sentences)), squeeze=False
    )
    for row, sentence, score in zip(grid, sentences, scores, strict=True):
        for axes, i in zip(row, np.argsort(-score)[:best], strict=True):
            figures.show_image(axes, images[i])
            axes.set_xlabel(f"cosine {score[i]:.2f}", fontsize=9)
        row[0].set_title(f"“{figures.literal(sentence)}”", loc="left", fontsize=11)
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.06)
    return figure


def main() -> None:
    """clip_desc.png (the two towers), scenes.png (what MiniCOCO looks like), retrieval.png (typed sentences),
    attention.png (what in the pictures found for a sentence made them fit)."""
    figures.style()
    profile = get_profile("mini")
    model = load_or_build.heads(profile)
    assets = ROOT / "assets"
    scenes = [render.scene_of("val2017", i, profile.seed) for i in DIAGRAM]
    told = [
        render.five_captions("val2017", i, profile.seed, s)
        for i, s in zip(DIAGRAM, scenes, strict=True)
    ]
    pictures, captions = [draw(scene)[0] for scene in scenes], [five[-1][0] for five in told]
    similarity = (model.encode_images(pictures) @ model.encode_texts(captions).T).numpy()
    clip_diagram(pictures, captions, similarity).savefig(assets / "clip_desc.png", dpi=130)
    gallery, told = load_or_build.gallery(profile, 1000)
    figures.image_grid(gallery[40:52], told[40:52], columns=6, title="MiniCOCO").savefig(
        assets / "scenes.png"
    )
    found = model.encode_texts(list(SENTENCES)) @ model.encode_images(gallery).T
    typed_sentences(SENTENCES, gallery, found.numpy()).savefig(assets / "retrieval.png")
    model = load_or_build.finetuned(profile) or model
    cosines, rows = nearest(model.encode_texts([LOOKED_FOR])[0], model.encode_images(gallery), k=5)
    pictures = [gallery[i] for i in rows.tolist()]
    grids, _ = explain(model, pictures, [LOOKED_FOR] * len(pictures))
    titles, title = (
        [f"cosine {cosine:.2f}" for cosine in cosines],
        f"“{LOOKED_FOR}”, and what spoke for it",
    )
    grids = [grid / grid.max() for grid in grids]
    figure = overlays.maps(
        pictures, grids, titles, title=title, label="relevance, largest = 1", sources=True
    )
    figure.savefig(assets / "attention.png")


if __name__ == "__main__":
    main()
