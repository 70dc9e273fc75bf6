"""The explorer without a browser: each control changes the image's bytes, or is said not to."""

import io
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from helpers.attention import METHODS
from helpers.viz import attention_explorer, figures
from helpers.viz.attention_explorer import FILE, GALLERY, PATCH, SCENE, UNREAD
from helpers.viz.widgets import explorer
from tests.tiny import deep_model
from tests.uploads import send, shown

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]
CAPTIONS = [["a red bus and two dogs", "a bus"], "a blue cat on the beach", ["a dog sleeps"]]
# Another value of each control, and what has to be set for it to be read.
OTHERS = {
    "number": (2, {}),
    "choice": ("a bus", {}),
    "caption": ("a small cat near the street", {}),
    "method": ("rollout", {}),
    "tower": ("text", {"method": "raw", "head": 1}),
    "head": (2, {"method": "raw"}),
    "layer": (1, {"method": "raw"}),
    "layers": ((1, 2), {}),
    "source": (PATCH, {"method": "rollout"}),
    "row": (1, {"method": "rollout", "source": PATCH}),
    "column": (1, {"method": "rollout", "source": PATCH}),
    "strength": (0.2, {}),
}


@pytest.fixture(scope="module")
def model():
    return deep_model()


@pytest.fixture
def widget(model):
    figures.style()
    return explorer(model, IMAGES, CAPTIONS)


def put(widget, **values):
    for name, value in values.items():
        widget.controls[name].value = value


def jpeg(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", OTHERS)
def test_each_control_changes_the_image_and_back(widget, name):
    other, needs = OTHERS[name]
    put(widget, **needs)
    control, before = widget.controls[name], shown(widget)
    value = control.value
    assert not control.disabled and control.layout.display != "none"
    control.value = other
    assert shown(widget) != before
    control.value = value
    if name == "number":
        assert widget.controls["caption"].value == CAPTIONS[0][0]
    assert shown(widget) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_control_that_is_not_read_is_disabled_and_changes_nothing(widget, method):
    put(widget, method=method)
    before, note = shown(widget), widget.note.value
    assert ("caption cannot change the map" in note) == (method != "relevance")
    assert 'role="status"' in note and all(name in note for name in UNREAD[method])
    for name in ("tower", "head", "layer", "layers", "source", "row", "column"):
        control = widget.controls[name]
        assert control.disabled == (name in UNREAD[method] or name in ("row", "column")), name
        if control.disabled:
            choices = getattr(control, "options", (1,))
            control.value = (1, 2) if name == "layers" else choices[-1]
            assert shown(widget) == before, name


def test_images_without_captions_ask_for_one(model):
    bare = explorer(model, IMAGES)
    assert "Type a caption" in bare.message.value
    put(bare, caption="a dog on the beach")
    assert bare.message.value == "" and bare.image.value
    put(bare, number=2)
    assert bare.captions() == []


def watch(monkeypatch, place, name):
    """The calls of a function from now on."""
    calls = Mock(wraps=getattr(place, name))
    monkeypatch.setattr(place, name, calls)
    return calls


def test_the_source_is_marked(widget, monkeypatch):
    drawn = watch(monkeypatch, attention_explorer.overlays, "map_and_words")
    put(widget, method="rollout", source=PATCH, row=1, column=3)
    assert drawn.call_args.kwargs["marked"] == (0, 2)
    put(widget, tower="text", source="word 6: dogs")
    assert drawn.call_args.kwargs["word"] == 5 and shown(widget)


def test_a_scene_is_composed_with_captions_of_its_own(widget):
    before = shown(widget)
    put(widget, origin=SCENE)
    assert shown(widget) != before
    assert all(line.layout.display is None for line in widget.lines[1:5])
    assert len(widget.controls["choice"].options) >= 2
    assert "car" in widget.controls["caption"].value
    before = shown(widget)
    put(widget, first="apple")
    assert shown(widget) != before and "apple" in widget.controls["caption"].value
    assert "red" in widget.controls["colour"].options
    put(widget, origin=GALLERY)
    assert all(line.layout.display == "none" for line in widget.lines[1:5])
    assert widget.controls["caption"].value == CAPTIONS[0][0]


def test_a_file_is_asked_for_opened_once_and_explored(widget, monkeypatch):
    opened = watch(monkeypatch, attention_explorer, "open_image")
    before = widget.image.value
    put(widget, origin=FILE)
    assert "Upload a picture" in widget.message.value and widget.image.value == before
    assert widget.controls["choice"].disabled and widget.controls["caption"].value == CAPTIONS[0][0]
    send(widget.controls["file"], "mine.jpg", jpeg())
    first = shown(widget)
    assert first != before
    put(widget, strength=0.3)
    assert shown(widget) != first and opened.call_count == 1
    put(widget, strength=0.85)
    send(widget.controls["file"], "mine.jpg", jpeg("blue"))
    second = shown(widget)
    assert second != first and opened.call_count == 2
    send(widget.controls["file"], "<img src=x>.jpg", b"not a picture")
    message = widget.message.value
    assert "&lt;img src=x&gt;.jpg is no whole picture" in message and "<img" not in message
    assert widget.image.value == second


def test_a_change_draws_once_and_computes_only_what_is_new(widget, monkeypatch):
    calls = [watch(monkeypatch, attention_explorer, name) for name in ("compare", "read_maps")]
    calls.append(watch(monkeypatch, attention_explorer.overlays, "map_and_words"))
    steps = [
        ("number", 2, [1, 1, 1]),
        ("method", "flow", [1, 2, 2]),  # both towers have read this pair already
        ("layers", (1, 2), [1, 3, 3]),
        ("strength", 0.5, [1, 3, 4]),  # and the map is there
        ("origin", SCENE, [2, 4, 5]),
        ("first", "dog", [3, 5, 6]),
    ]
    for name, value, counts in steps:
        put(widget, **{name: value})
        assert [call.call_count for call in calls] == counts, name
