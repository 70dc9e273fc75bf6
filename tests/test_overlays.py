"""Maps drawn: every value where it belongs, one scale, and what is asked for is outlined."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from helpers.attention import Words
from helpers.viz import figures, overlays

pytestmark = pytest.mark.usefixtures("styled")
IMAGES = [Image.new("RGB", (48, 32), color) for color in ("red", "green", "blue")]
GRIDS = [torch.arange(6.0).view(2, 3) * k for k in (1, 2, 0)]


def is_png(figure):
    return figures.png(figure).startswith(b"\x89PNG")


def scales(figure):
    return [axes.images[1].get_clim() for axes in figure.axes if len(axes.images) == 2]


def colour_bars(figure):
    return sum(axes.get_label() == "<colorbar>" for axes in figure.axes)


def test_a_map_covers_its_image_patch_by_patch():
    axes = plt.subplots()[1]
    drawn = overlays.overlay(axes, IMAGES[0], GRIDS[0], marked=(1, 2))
    assert np.array_equal(drawn.get_array(), GRIDS[0])
    assert drawn.get_extent() == [-0.5, 47.5, 31.5, -0.5]
    assert drawn.get_clim() == (0, 5), "the scale starts at 0, whatever the smallest value is"
    # Row 1, column 2 of patches of 16 pixels.
    assert axes.patches[0].get_bbox().bounds == (31.5, 15.5, 16, 16)


def test_a_map_lies_over_the_part_that_the_tower_sees():
    axes = plt.subplots()[1]
    look = {"marked": (1, 2), "visible": lambda size: (8, 0, 8 + size[1], size[1])}
    drawn = overlays.overlay(axes, IMAGES[0], GRIDS[0], **look)
    assert drawn.get_extent() == [7.5, 39.5, 31.5, -0.5]
    assert axes.get_xlim() == (-0.5, 47.5) and axes.get_ylim() == (31.5, -0.5), "all is shown"
    high, wide = 32 / np.array(GRIDS[0].shape)
    assert axes.patches[0].get_bbox().bounds == pytest.approx((7.5 + 2 * wide, 15.5, wide, high))


def test_maps_share_one_scale_and_one_colour_bar():
    titles = ["a", "b", "c $1"]
    figure = overlays.maps(IMAGES, GRIDS, titles, columns=2, title="three", sources=True)
    assert scales(figure) == [(0, 10)] * 3, "also the map that is 0 everywhere"
    assert colour_bars(figure) == 1 and is_png(figure)
    assert scales(overlays.maps(IMAGES, GRIDS, top=20.0)) == [(0, 20)] * 3
    assert is_png(overlays.maps(IMAGES[:1], GRIDS[2:])), "a map of zeros alone"


def test_the_named_object_is_outlined():
    mask = np.zeros((32, 48), bool)
    mask[8:20, 8:20] = True
    figure = overlays.maps(IMAGES[:2], GRIDS[:2], outlines=[mask, None])
    assert [len(axes.collections) for axes in figure.axes[:2]] == [1, 0]


def test_words_stand_from_top_to_bottom_beside_the_map():
    words = Words(["a", "$5", "bus"], torch.tensor([0.1, 0.2, 0.4]), 0.25)
    figure = overlays.map_and_words(IMAGES[0], GRIDS[0], words, "a bus for $5", word=2)
    bars = figure.axes[3]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.1, 0.2, 0.4])
    assert [label.get_text() for label in bars.texts] == ["a", r"\$5", "▸ bus"]
    assert bars.yaxis_inverted() and "25%" in bars.get_xlabel() and is_png(figure)
