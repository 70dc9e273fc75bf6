"""The explorer's page: whole, alone, and with the numbers that the methods give."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from helpers.attention import METHODS, explain
from scripts.export_explorer import page
from tests.tiny import deep_model

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]
CAPTIONS = [["a red bus and two dogs", "a bus"], ["</script><b>a cat</b> & a dog"]]


@pytest.fixture(scope="module")
def model():
    """Towers of unequal heads and layers: the page offers what both have, 2 heads and 3 layers."""
    return deep_model(num_hidden_layers=4, num_attention_heads=4)


@pytest.fixture(scope="module")
def text(model):
    return page(model, IMAGES, CAPTIONS, "Pictures & more")


@pytest.fixture(scope="module")
def data(text):
    return json.loads(re.search(r'type="application/json">(.*?)</script>', text, re.S)[1])


def test_it_needs_no_network_and_no_other_file(text):
    outside = r"https?:|//[a-z]|@import|url\(|<link[^>]+href=\"(?!data:)|\bfetch\(|XMLHttp"
    assert not re.search(outside, text)
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)"', text))
    assert "%" + "DATA%" not in text and "Pictures &amp; more" in text


def test_images_are_inside_and_captions_with_markup_stay_data(text, data):
    assert text.count("</script>") == 2
    first, second = (image["captions"] for image in data["pictures"])
    assert [row["text"] for row in first] == [*CAPTIONS[0], CAPTIONS[1][0]]
    assert [row["own"] for row in first] == [True, True, False]
    assert second[1]["text"] == CAPTIONS[0][0]
    for image, row in zip(IMAGES, data["pictures"], strict=True):
        content = row["src"].removeprefix("data:image/jpeg;base64,")
        file = io.BytesIO(base64.b64decode(content, validate=True))
        assert Image.open(file).size == image.size


# The place of a setting in the page's lists, and what it stands for.
SETTINGS = {
    "raw": {5: {"layer": 1, "head": 1}, 6: {"layer": 2}},
    "rollout": {0: {"layers": slice(1)}, 2: {"layers": slice(3)}},
    "flow": {1: {"layers": slice(2)}, 2: {"layers": slice(3)}},
    "relevance": {0: {"layers": slice(-1, None)}, 2: {"layers": slice(-3, None)}},
}


@pytest.mark.parametrize("method", METHODS)
def test_maps_and_words_are_those_of_the_method(model, data, method):
    assert (data["layers"], data["heads"], data["grid"]) == (3, 2, [4, 4])
    for image, row in zip(IMAGES, data["pictures"], strict=True):
        for caption in row["captions"]:
            maps = caption["relevance"] if method == "relevance" else row["maps"][method]
            scores, special = caption["scores"][method], caption["special"][method]
            assert len(maps) == len(scores) == len(special) == (9 if method == "raw" else 3)
            for place, options in SETTINGS[method].items():
                (grid,), (words,) = explain(model, [image], [caption["text"]], method, **options)
                assert maps[place] == pytest.approx(grid.flatten().tolist(), 0.01, 1e-7)
                assert scores[place] == pytest.approx(words.scores.tolist(), 0.01, 1e-7)
                assert special[place] == pytest.approx(words.special, abs=1e-3)
                assert caption["words"] == words.words
