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

PICTURES = [
    Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
]
CAPTIONS = [["a red bus and two dogs", "a bus"], ["</script><b>a cat</b> & a dog"]]


@pytest.fixture(scope="module")
def model():
    return deep_model()


@pytest.fixture(scope="module")
def text(model):
    return page(model, PICTURES, CAPTIONS, "Pictures & more")


@pytest.fixture(scope="module")
def data(text):
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)[1]
    )


def test_it_needs_no_network_and_no_other_file(text):
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link[^>]+href=\"(?!data:)|\bfetch\(|XMLHttp", text
    )
    assert all(source.startswith("data:") for source in re.findall(r'\bsrc="([^"]*)"', text))
    assert "%" + "DATA%" not in text and "Pictures &amp; more" in text


def test_captions_with_markup_stay_data(text, data):
    assert text.count("</script>") == 2
    assert [c["text"] for c in data["pictures"][0]["captions"]] == [*CAPTIONS[0], CAPTIONS[1][0]]
    assert [c["own"] for c in data["pictures"][0]["captions"]] == [True, True, False]
    assert data["pictures"][1]["captions"][1]["text"] == CAPTIONS[0][0]


def test_every_control_has_a_label(text):
    controls = re.findall(r"<(?:select|input)[^>]* id=\"([^\"]+)\"", text)
    assert sorted(controls) == ["caption", "head", "layer", "method", "same", "strength"]
    assert all(f'for="{name}"' in text for name in controls)
    assert '<html lang="en">' in text and 'role="status"' in text


def test_pictures_are_inside(data):
    for picture, source in zip(PICTURES, (p["src"] for p in data["pictures"]), strict=True):
        kind, content = source.split(",")
        assert kind == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == picture.size


@pytest.mark.parametrize("method", METHODS)
def test_maps_and_words_are_those_of_the_method(model, data, method):
    for picture, told in zip(PICTURES, data["pictures"], strict=True):
        for caption in told["captions"]:
            grids, words = explain(
                model, [picture], [caption["text"]], method
            )  # all layers; raw: the last, mean of heads
            setting = 2 * 3 if method == "raw" else 2
            found = caption["relevance"] if method == "relevance" else told["maps"][method]
            assert len(found) == (9 if method == "raw" else 3)
            assert found[setting] == pytest.approx(grids[0].flatten().tolist(), rel=0.01)
            assert caption["words"] == words[0].words
            assert caption["scores"][method][setting] == pytest.approx(
                words[0].scores.tolist(), rel=0.01, abs=1e-7
            )
            assert caption["special"][method][setting] == pytest.approx(words[0].special, abs=1e-3)


def test_settings_are_layers_and_heads(model, data):
    first = data["pictures"][0]
    for method, setting, options in (
        ("raw", 3 * 1 + 2, {"layer": 1, "head": 1}),
        ("rollout", 0, {"layers": slice(0, 1)}),
        ("relevance", 0, {"layers": slice(-1, None)}),
    ):
        grids, _ = explain(model, PICTURES[:1], CAPTIONS[0][:1], method, **options)
        found = (
            first["captions"][0]["relevance"] if method == "relevance" else first["maps"][method]
        )
        assert found[setting] == pytest.approx(grids[0].flatten().tolist(), rel=0.01, abs=1e-9)
