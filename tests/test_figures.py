"""Figures: each function returns one, titled, with labelled axes where it has any, and leaves the inputs alone."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from helpers.viz import figures
from scripts import make_pictures

PICTURES = [Image.new("RGB", (48, 48), color) for color in ("red", "green", "blue", "white")]
WORDS = ["a red square", "a green square", "a blue square", "a white square"]
SCORES = np.arange(16).reshape(4, 4) / 16
HISTORY = [
    {
        "epoch": k,
        "train_loss": 2 / k,
        "dev_loss": 2.5 / k,
        "dev_recall@5": 0.2 * k,
        "logit_scale": 2.6,
    }
    for k in (1, 2, 3)
]
FIGURES = {
    "image_grid": lambda: figures.image_grid(
        PICTURES, WORDS, title="four", marks=[True, False, None, None]
    ),
    "similarity_matrix": lambda: figures.similarity_matrix(PICTURES, WORDS, SCORES, "before"),
    "number_grids": lambda: figures.number_grids({"rows": SCORES, "columns": SCORES.T}, "by hand"),
    "training_curves": lambda: figures.training_curves(
        {"seed 0": HISTORY, "seed 1": HISTORY}, "heads", chance_loss=3.0
    ),
    "embedding_map": lambda: figures.embedding_map(SCORES[:, :2], [0, 0, 1, 1], "map", links=True),
    "histograms": lambda: figures.histograms(
        {"matched": SCORES, "others": SCORES - 1}, "cosines", marks={"here": 0.2}
    ),
    "bars": lambda: figures.bars(
        {"a": 0.5, "b": (0.4, (0.3, 0.5))}, "bars", "share", {"a": 0.1}, {"b": 0.9}
    ),
    "confusion": lambda: figures.confusion(SCORES, WORDS, "confusion", top=3),
    "found_images": lambda: figures.found_images(
        "a square", PICTURES, [0.4, 0.3, 0.2, 0.1], [True, False, False, True]
    ),
    "found_captions": lambda: figures.found_captions(
        PICTURES[0], WORDS, [0.4, 0.3, 0.2, 0.1], [True] * 4, "found"
    ),
    "tokens_and_patches": lambda: figures.tokens_and_patches(
        PICTURES[0], 12, ["[CLS]", "square", "[SEP]"], "strips"
    ),
    "clip_diagram": lambda: make_pictures.clip_diagram(PICTURES, WORDS, SCORES),
    "typed_sentences": lambda: make_pictures.typed_sentences(
        WORDS[:2], PICTURES, SCORES[:2], best=3
    ),
}


@pytest.fixture(autouse=True)
def styled():
    figures.style()
    yield
    plt.close("all")


@pytest.mark.parametrize("name", FIGURES)
def test_every_function_draws_one_figure(name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure) and plt.get_fignums() == [figure.number]
    data = figures.png(figure)
    assert data.startswith(b"\x89PNG") and plt.get_fignums() == []


def test_numbers_are_written_into_the_cells():
    figure = figures.similarity_matrix(PICTURES, WORDS, SCORES)
    written = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {f"{value:.2f}" for value in SCORES.ravel()} <= written


def test_long_captions_are_wrapped_and_cut():
    assert figures.wrap("one two three", 5) == "one\ntwo\nthree"
    assert figures.wrap("word " * 50, 20, lines=2).endswith("…")


MARKUP = r"<b>$\frac{$</b> & $x_1$ &amp; \$5"  # what is between the first two dollars is no formula
MARKED = {
    "image_grid": lambda: figures.image_grid(PICTURES[:1], [MARKUP], width=40),
    "similarity_matrix": lambda: figures.similarity_matrix(PICTURES[:1], [MARKUP], [[0.5]]),
    "bars": lambda: figures.bars({MARKUP: 0.5}),
    "confusion": lambda: figures.confusion(np.eye(8), [MARKUP, *"abcdefg"]),
    "found_images": lambda: figures.found_images(MARKUP, PICTURES[:2], [0.4, 0.3]),
    "found_captions": lambda: figures.found_captions(PICTURES[0], [MARKUP], [0.4]),
    "scene_report": lambda: figures.scene_report(PICTURES[0], [MARKUP], [0.4], [MARKUP[:9]], [0.9]),
    "tokens_and_patches": lambda: figures.tokens_and_patches(
        PICTURES[0], 12, ["[CLS]", MARKUP, "[SEP]"]
    ),
    "clip_diagram": lambda: make_pictures.clip_diagram(
        PICTURES[:2], [MARKUP, "a dog"], SCORES[:2, :2]
    ),
    "typed_sentences": lambda: make_pictures.typed_sentences(
        [MARKUP], PICTURES, SCORES[:1], best=1
    ),
}


@pytest.mark.parametrize("name", MARKED)
def test_markup_in_a_caption_is_shown_as_it_is(name):
    figure = MARKED[name]()
    figures.png(figure)  # draws it: a formula that is none would raise
    texts = [text.get_text() for text in figure.findobj(Text)]
    shown = [
        text.replace(r"\$", "$") for text in texts if not is_math_text(text)
    ]  # as matplotlib does
    assert any(MARKUP in text for text in shown), texts


def test_a_word_with_dollars_is_drawn_as_it_is():
    widths = []
    for word in ("$x^1$", "x1"):
        [drawn] = figures.word_cloud({word: 1}).axes[0].patches
        widths.append(drawn.get_path().get_extents().width)
    assert widths[0] > 2 * widths[1]
