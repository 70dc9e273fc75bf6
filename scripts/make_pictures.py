"""Draws the pictures of README and the notebooks into assets/, once heads are trained.

Run it as `python -m scripts.make_pictures`. Drawings are OpenMoji's (CC BY-SA 4.0).
"""

import json

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
EXPLAINED = "an elephant in the forest"
SENTENCES = ("an orange cat", "a truck in the snow", "boats on the lake")
WIDTH, HEIGHT = 10, 5.5  # of the diagram, in inches
SHARES = {2_000: "@2000", 7_500: "@7500", 30_000: ""}  # train images, and their mark in the study
GROWTH = {
    "projection{}": {"label": "heads", "color": figures.IMAGE},
    "finetuned{}-averaged": {"label": "both towers, averaged", "color": figures.TEXT},
}
CELL, LEFT, LOW = 0.62, 6.55, 0.62  # its matrix: side of a cell, left and lower edge


def box(canvas, x, y, width, height, text, fill, edge, color="black", size=10) -> None:
    """A rectangle with a text in its middle."""
    canvas.add_patch(plt.Rectangle((x, y), width, height, facecolor=fill, edgecolor=edge))
    look = {"ha": "center", "va": "center", "fontsize": size, "color": color}
    canvas.text(x + width / 2, y + height / 2, text, **look)


def arrow(canvas, *points) -> None:
    """A line through some points, with a head at its end."""
    canvas.plot(*zip(*points), color="#444", linewidth=1.6)
    head = {"arrowstyle": "-|>", "color": "#444", "linewidth": 1.6}
    canvas.annotate("", points[-1], points[-2], arrowprops=head)


def tower(canvas, name: str, kind: str, color: str, y: float) -> None:
    """A tower that narrows to the right, and its head."""
    corners = [(2.75, y - 0.72), (4.25, y - 0.45), (4.25, y + 0.45), (2.75, y + 0.72)]
    canvas.add_patch(Polygon(corners, facecolor=color, alpha=0.9, edgecolor="white"))
    look = {"ha": "center", "va": "center", "color": "white", "weight": "bold", "fontsize": 10.5}
    canvas.text(3.5, y, f"{name}\n{kind} tower", **look)
    box(canvas, 4.65, y - 0.26, 0.7, 0.52, "head", "white", color, color)
    arrow(canvas, (2.3, y), (2.7, y))
    arrow(canvas, (4.25, y), (4.62, y))


def clip_diagram(images, captions, similarity) -> Figure:
    """The course in one picture: two towers, two heads and a matrix of cosines [n, n]."""
    n, top = len(images), LOW + CELL * len(images)
    middle, side = LEFT + CELL * n / 2, 0.96 * CELL
    shades = (np.asarray(similarity) - np.min(similarity)) / np.ptp(similarity)
    figure = plt.figure(figsize=(WIDTH, HEIGHT), layout="none", facecolor="white")
    canvas = figure.add_axes([0, 0, 1, 1])
    canvas.axis("off")
    canvas.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    tower(canvas, "ViT", "image", figures.IMAGE, 1.95)
    tower(canvas, "BERT", "text", figures.TEXT, 4.62)
    note = {"boxstyle": "round,pad=0.25", "facecolor": "#fdf0e6", "edgecolor": figures.TEXT}
    for i, (image, caption) in enumerate(zip(images, captions)):
        y = top - (i + 1) * CELL
        place = (0.12 + 0.2 * i) / WIDTH, (2 - 0.3 * i) / HEIGHT, 1.25 / WIDTH, 1.25 / HEIGHT
        figures.show_image(figure.add_axes(place), image, edge="white")
        text = figures.wrap(caption, 40, 1)
        canvas.text(0.12, 5.24 - 0.32 * i, text, fontsize=7.6, va="center", bbox=note)
        x, tint = LEFT + i * CELL, ("#fbe3d3", figures.TEXT)
        box(canvas, x, top + 0.1, side, 0.36, f"$T_{i + 1}$", *tint)
        box(canvas, LEFT - 0.48, y, 0.36, side, f"$I_{i + 1}$", "#d9e6f5", figures.IMAGE)
        for j, shade in enumerate(shades[i]):
            fill = plt.cm.Greens(0.3 + 0.6 * shade) if i == j else plt.cm.Greys(0.04 + 0.4 * shade)
            color, name = "white" if i == j else "black", f"$I_{i + 1}\\cdot T_{j + 1}$"
            box(canvas, LEFT + j * CELL, y, side, side, name, fill, "white", color, 9)
    arrow(canvas, (5.35, 1.95), (LEFT - 0.52, 1.95))
    arrow(canvas, (5.35, 4.62), (middle, 4.62), (middle, top + 0.48))
    legend = "green: pairs, pulled together  ·  grey: all others, pushed apart"
    canvas.text(middle, 0.36, legend, ha="center", fontsize=8, color="#444")
    return figure


def typed_sentences(sentences, images, scores, best: int = 5) -> Figure:
    """For each sentence the `best` images by score [sentences, images], one sentence a row."""
    shape = 2 * best, 2.75 * len(sentences)
    figure, grid = plt.subplots(len(sentences), best, figsize=shape, squeeze=False)
    for row, sentence, score in zip(grid, sentences, scores):
        for axes, i in zip(row, np.argsort(-score)):
            figures.show_image(axes, images[i])
            axes.set_xlabel(f"cosine {score[i]:.2f}", fontsize=9)
        row[0].set_title(f"“{figures.literal(sentence)}”", loc="left", fontsize=11)
    figure.get_layout_engine().set(h_pad=0.08, hspace=0.06)
    return figure


def diagram(model, seed: int) -> Figure:
    """`clip_diagram` of a few scenes of val, each with its shortest caption."""
    scenes = [render.scene_of("val2017", i, seed) for i in DIAGRAM]
    captions = [
        render.captions_of("val2017", i, seed, scene)[-1][0] for i, scene in zip(DIAGRAM, scenes)
    ]
    images = [draw(scene)[0] for scene in scenes]
    similarity = model.encode_images(images) @ model.encode_texts(captions).T
    return clip_diagram(images, captions, similarity.numpy())


def explained(model, images, sentence: str) -> Figure:
    """The images nearest to a sentence, and their relevance maps."""
    cosines, rows = nearest(model.encode_texts([sentence])[0], model.encode_images(images))
    found = [images[i] for i in rows.tolist()]
    grids, _ = explain(model, found, [sentence])
    nearest_of = f"the {len(found)} nearest of {len(images):,} pictures"
    title = f"“{sentence}”: {nearest_of}, and their relevance"
    texts = {"title": title, "label": "relevance, largest = 1"}
    texts["visible"] = model.image_tower.visible
    titles = [f"cosine {cosine:.2f}" for cosine in cosines]
    return overlays.maps(found, [g / g.max() for g in grids], titles, sources=True, **texts)


def growth(metrics: dict) -> Figure:
    """Recall@1 by the number of train images, from the metrics of the study."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6))
    for axes, way in zip(panels, ("text_to_image", "image_to_text")):
        for model, look in GROWTH.items():
            names = {n: f"{model.format(at)}/{way}/recall@1" for n, at in SHARES.items()}
            rows = {n: metrics[name] for n, name in names.items() if name in metrics}
            means, stds = ([row[part] for row in rows.values()] for part in ("mean", "std"))
            axes.errorbar(list(rows), means, stds, fmt="o-", capsize=4, **look)
        axes.set(title=way.replace("_to_", " → "), xlabel="train images", xscale="log")
        axes.set_xticks(list(SHARES), [f"{n:,}" for n in SHARES])
        axes.minorticks_off()
    panels[0].set_ylabel("recall@1 on val")
    panels[0].legend(loc="lower right")
    figure.suptitle("More images bring higher recall, at equal steps")
    return figure


def main() -> None:
    """The two towers, typed sentences, maps, what more images bring."""
    figures.style()
    profile, assets = get_profile("mini"), ROOT / "assets"
    model = load_or_build.finetuned(profile) or load_or_build.heads(profile)
    images, _ = load_or_build.gallery(profile, 1000)
    diagram(model, profile.seed).savefig(assets / "clip_desc.png", dpi=130)
    scores = model.encode_texts(list(SENTENCES)) @ model.encode_images(images).T
    typed_sentences(SENTENCES, images, scores.numpy()).savefig(assets / "retrieval.png")
    metrics = json.loads((profile.results / "study.json").read_text())["metrics"]
    growth(metrics).savefig(assets / "growth.png")
    explained(model, images, EXPLAINED).savefig(assets / "attention.png")


if __name__ == "__main__":
    main()
