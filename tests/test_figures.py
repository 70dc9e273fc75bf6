"""Figures: each function returns one, shows captions as they are, and leaves the inputs alone."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.cbook import is_math_text
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from helpers.viz import figures
from scripts import make_pictures

pytestmark = pytest.mark.usefixtures("styled")
IMAGES = [Image.new("RGB", (48, 48), color) for color in ("red", "green", "blue", "white")]
# What stands between the first two dollars is no formula.
MARKUP = r"<b>$\frac{$</b> & $x_1$ &amp; \$5"
WORDS = [MARKUP, "a green square", "a blue square", "a white square"]
COSINES = [0.4, 0.3, 0.2, 0.1]
SCORES = np.arange(16).reshape(4, 4) / 16
MARKS = [True, False, None, None]
DRAWN = {
    figures.image_grid: (IMAGES, WORDS, 4, 3, "four", MARKS, 40),
    figures.similarity_matrix: (IMAGES, WORDS, SCORES, "before"),
    figures.bars: ({MARKUP: 0.5, "b": (0.4, (0.3, 0.5))}, "", "", {"b": 0.1}, {MARKUP: 0.9}),
    figures.found_images: (IMAGES, COSINES, MARKS, MARKUP),
    figures.found_captions: (IMAGES[0], WORDS, COSINES, [True] * 4, "found"),
    make_pictures.clip_diagram: (IMAGES, WORDS, SCORES),
    make_pictures.typed_sentences: (WORDS[:2], IMAGES, SCORES[:2], 3),
    figures.number_grids: ({"rows": SCORES, "columns": SCORES.T}, "by hand"),
    figures.histograms: ({"own": COSINES, "others": [0, 0.1]}, "cosines", "", 9, {"here": 0.2}),
}


@pytest.mark.parametrize("draw, inputs", DRAWN.items())
def test_every_function_draws_one_figure_and_shows_markup_as_it_is(draw, inputs):
    figure = draw(*inputs)
    assert isinstance(figure, Figure) and plt.get_fignums() == [figure.number]
    texts = [text.get_text() for text in figure.findobj(Text)]
    texts = [text.replace(r"\$", "$") for text in texts if not is_math_text(text)]
    # Drawing it would raise for a formula that is none.
    assert figures.png(figure).startswith(b"\x89PNG") and plt.get_fignums() == []
    if repr(MARKUP) in repr(inputs):
        assert any(MARKUP in text for text in texts), texts


def test_numbers_are_written_into_the_cells():
    figure = figures.similarity_matrix(IMAGES, WORDS, SCORES)
    written = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {f"{value:.2f}" for value in SCORES.ravel()} <= written


def test_bars_show_value_interval_chance_and_what_is_attainable():
    [axes] = figures.bars({"a": (0.4, (0.3, 0.5))}, chance={"a": 0.1}, attainable={"a": 0.9}).axes
    assert axes.get_yticklabels()[0].get_text() == "a   0.400"
    assert [bar.get_width() for bar in axes.patches] == [0.4]
    spots = sorted(float(lines.get_segments()[0][0, 0]) for lines in axes.collections)
    assert spots == pytest.approx([0.1, 0.3, 0.9])


def test_long_captions_are_wrapped_and_cut():
    assert figures.wrap("one two three", 5) == "one\ntwo\nthree"
    assert figures.wrap("word " * 50, 20, lines=2).endswith("…")


def test_a_heavy_figure_is_stored_in_few_colours(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    figure = figures.image_grid([noise] * 4, columns=4)
    light = figures.light_png(figure)
    monkeypatch.setattr(figures, "HEAVY", 10**9)
    assert len(light) < len(figures.light_png(figure)) / 2
