"""Maps drawn: every value where it belongs, one scale, and what is asked for is outlined."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from helpers.viz import figures, overlays

PICTURES = [Image.new("RGB", (48, 32), color) for color in ("red", "green", "blue")]
GRIDS = [torch.arange(6.0).view(2, 3) * k for k in (1, 2, 0)]


@pytest.fixture(autouse=True)
def styled():
    figures.style()
    yield
    plt.close("all")


def heatmaps(figure):
    return [axes.images[1] for axes in figure.axes if len(axes.images) == 2]


def test_a_map_covers_its_picture_patch_by_patch():
    axes = plt.subplots()[1]
    shown = overlays.overlay(axes, PICTURES[0], GRIDS[0], marked=(1, 2))
    assert np.array_equal(shown.get_array(), GRIDS[0]) and shown.get_extent() == [
        -0.5,
        47.5,
        31.5,
        -0.5,
    ]
    assert shown.get_clim() == (0, 5), "the scale starts at 0, whatever the smallest value is"
    assert axes.patches[0].get_bbox().bounds == (31.5, 15.5, 16, 16), (
        "row 1, column 2 of patches of 16 pixels"
    )


def test_strength_goes_from_the_picture_alone_to_the_map_alone():
    axes = plt.subplots()[1]
    shown = overlays.overlay(axes, PICTURES[0], GRIDS[0], strength=0)
    assert shown.cmap(255)[3] == 0 and np.array_equal(
        axes.images[0].get_array(), np.asarray(PICTURES[0])
    )
    assert overlays.heat(1)(255)[3] == 1 and overlays.heat(1)(0)[3] == 0


def test_maps_share_one_scale_and_one_colour_bar():
    figure = overlays.maps(
        PICTURES, GRIDS, ["a", "b", "c $1"], columns=2, title="three", sources=True
    )
    assert [shown.get_clim() for shown in heatmaps(figure)] == [(0, 10)] * 3, (
        "also the map that is 0 everywhere"
    )
    assert sum(axes.get_label() == "<colorbar>" for axes in figure.axes) == 1
    assert figures.png(figure).startswith(b"\x89PNG")
    assert [s.get_clim() for s in heatmaps(overlays.maps(PICTURES, GRIDS, top=20.0))] == [
        (0, 20)
    ] * 3


def test_maps_with_scales_of_their_own():
    figure = overlays.own_scales(PICTURES[0], dict(zip("abc", GRIDS, strict=True)), "three")
    assert [shown.get_clim() for shown in heatmaps(figure)] == [(0, 5), (0, 10), (0, 1e-12)]
    assert sum(axes.get_label() == "<colorbar>" for axes in figure.axes) == 3
    assert figures.png(figure).startswith(b"\x89PNG")


def test_a_map_of_zeros_can_be_drawn():
    assert figures.png(overlays.maps(PICTURES[:1], GRIDS[2:])).startswith(b"\x89PNG")


def test_the_asked_object_is_outlined():
    mask = np.zeros((32, 48), bool)
    mask[8:20, 8:20] = True
    figure = overlays.maps(PICTURES[:2], GRIDS[:2], outlines=[mask, None])
    assert [len(axes.collections) for axes in figure.axes[:2]] == [1, 0]


def test_a_pair_shows_the_words_from_top_to_bottom():
    figure = overlays.pair(
        PICTURES[0], GRIDS[0], ["a", "$5", "bus"], [0.1, 0.2, 0.4], 0.25, "a bus for $5"
    )
    bars = figure.axes[2]
    assert isinstance(figure, Figure) and [
        bar.get_width() for bar in bars.patches
    ] == pytest.approx([0.1, 0.2, 0.4])
    assert [label.get_text() for label in bars.texts] == ["a", r"\$5", "bus"]
    assert bars.yaxis_inverted() and "25%" in bars.get_xlabel()
    assert figures.png(figure).startswith(b"\x89PNG")
