"""The explorer without a browser: each control changes the picture's bytes or is said not to; and the page's parts."""

import io

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from helpers.attention import METHODS, UNREAD, Maps
from helpers.viz import attention_explorer, controls, figures
from helpers.viz.attention_explorer import FILE, GALLERY, PATCH, POOLING, SCENE, seen_figure
from helpers.viz.widgets import explorer
from tests.tiny import deep_model
from tests.uploads import send

PICTURES = [
    Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
]
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
    "top": (0.5, {}),
}


@pytest.fixture(scope="module")
def model():
    return deep_model()


@pytest.fixture
def widget(model):
    figures.style()
    return explorer(model, PICTURES, CAPTIONS)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def shown(widget) -> bytes:
    """The bytes of the widget's picture, once it is sure that they are a PNG and that nothing went wrong."""
    assert widget.message.value == ""
    with Image.open(io.BytesIO(widget.picture.value)) as picture:
        picture.load()
        assert picture.format == "PNG"
    return widget.picture.value


def put(widget, **values):
    for name, value in values.items():
        widget.controls[name].value = value


def jpeg(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30), color).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", OTHERS)
def test_each_control_changes_the_picture_and_back(widget, name):
    other, needs = OTHERS[name]
    put(widget, **needs)
    control, before = widget.controls[name], shown(widget)
    kept = control.value
    assert not control.disabled and control.layout.display != "none"
    control.value = other
    assert shown(widget) != before
    control.value = kept
    if name == "number":
        assert widget.controls["caption"].value == CAPTIONS[0][0]
    assert shown(widget) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_control_that_is_not_read_is_disabled_and_changes_nothing(widget, method):
    put(widget, method=method)
    before = shown(widget)
    for name in ("tower", "head", "layer", "layers", "source", "row", "column"):
        control = widget.controls[name]
        unread = name in UNREAD[method] or name in ("row", "column")
        assert control.disabled == unread, name
        if not unread:
            continue
        assert name in widget.note.value or name in ("row", "column")
        choices = getattr(control, "options", (None,))
        control.value = {"layer": 1, "layers": (1, 2)}.get(name, choices[-1] or 1)
        if (
            name != "tower"
        ):  # which changes what heads and sources there are, though not the picture
            assert control.disabled
        assert shown(widget) == before, name


def test_it_says_what_cannot_change_the_map(widget):
    for method in METHODS:
        put(widget, method=method)
        assert ("caption cannot change the map" in widget.note.value) == (method != "relevance")
        assert 'role="status"' in widget.note.value and "row" in widget.note.value


def test_words_are_on_offer_as_sources_of_the_text_tower(widget):
    put(widget, method="rollout", tower="text")
    source, before = widget.controls["source"], shown(widget)
    assert list(source.options) == [
        POOLING,
        "word 1: a",
        "word 2: red",
        "word 3: bus",
        "word 4: and",
        "word 5: two",
        "word 6: dogs",
    ]
    source.value = "word 6: dogs"
    assert shown(widget) != before and widget.controls["row"].disabled
    put(widget, caption="a bus")
    assert source.value == POOLING and len(source.options) == 3
    put(widget, tower="image")
    assert list(source.options) == [POOLING, PATCH]


def test_captions_follow_the_picture(widget):
    choice, caption = widget.controls["choice"], widget.controls["caption"]
    assert list(choice.options) == CAPTIONS[0] and caption.value == CAPTIONS[0][0]
    put(widget, number=2)
    assert list(choice.options) == [CAPTIONS[1]] and caption.value == CAPTIONS[1]
    put(widget, caption="two dogs")
    assert choice.value == CAPTIONS[1], "what is typed leaves the choice alone"
    shown(widget)


def test_a_gallery_may_be_a_data_set(model):
    class Images:
        def __len__(self):
            return 2

        def image(self, i):
            return PICTURES[i]

        def captions(self, i):
            return [CAPTIONS[1], "a cat"]

    widget = explorer(model, Images(), start=1)
    assert widget.controls["number"].value == 2 and widget.controls["choice"].options == (
        CAPTIONS[1],
        "a cat",
    )
    shown(widget)


def test_a_scene_is_composed_with_captions_of_its_own(widget):
    before = shown(widget)
    put(widget, origin=SCENE)
    assert shown(widget) != before
    assert all(line.layout.display is None for line in widget.lines[1:5])
    choice = widget.controls["choice"]
    assert len(choice.options) >= 2 and "car" in widget.controls["caption"].value
    before = shown(widget)
    put(widget, first="apple")
    assert shown(widget) != before and "apple" in widget.controls["caption"].value
    assert "red" in widget.controls["colour"].options
    put(widget, origin=GALLERY)
    assert all(line.layout.display == "none" for line in widget.lines[1:5])
    assert widget.controls["caption"].value == CAPTIONS[0][0]


def test_a_file_is_asked_for_opened_once_and_explored(widget, monkeypatch):
    calls = []
    monkeypatch.setattr(
        attention_explorer, "opened", lambda file: calls.append(file.name) or controls.opened(file)
    )
    before = widget.picture.value
    put(widget, origin=FILE)
    assert "Upload a picture" in widget.message.value and widget.picture.value == before
    assert widget.controls["choice"].disabled and widget.controls["caption"].value == CAPTIONS[0][0]
    send(widget.controls["file"], "mine.jpg", jpeg())
    first = shown(widget)
    assert first != before
    put(widget, strength=0.3)
    assert shown(widget) != first and calls == ["mine.jpg"]
    put(widget, strength=0.85)
    send(widget.controls["file"], "mine.jpg", jpeg("blue"))
    assert shown(widget) != first and len(calls) == 2


@pytest.mark.parametrize("content", [b"", b"not a picture", jpeg()[:200]])
def test_a_bad_file_gives_a_sentence_escaped(widget, content):
    put(widget, origin=FILE)
    send(widget.controls["file"], "a<b>.jpg", jpeg())
    before = shown(widget)
    send(widget.controls["file"], "<img src=x>.jpg", content)
    assert (
        "&lt;img src=x&gt;.jpg is no whole picture" in widget.message.value
        and "<img" not in widget.message.value
    )
    assert "Traceback" not in widget.message.value and widget.picture.value == before


def test_a_caption_with_markup_is_shown_as_it_is(model, widget):
    put(widget, caption="<b>a red bus</b> for $5 and $6", method="raw", tower="text")
    shown(widget)
    assert "<b>" not in widget.note.value
    put(widget, caption="")
    assert "Type a caption" in widget.message.value
    put(widget, caption="🚌 \n中文")
    shown(widget)


def test_every_control_can_be_named_and_reached(widget):
    inside = [child for row in widget.children for child in getattr(row, "children", ())]
    assert inside == list(widget.controls.values())
    for control in inside:
        assert control.description.strip() and getattr(control, "continuous_update", False) is False
        assert getattr(control, "tabbable", None) is not False
    assert [type(child) for child in widget.children[-3:]] == [
        ipywidgets.HTML,
        ipywidgets.HTML,
        ipywidgets.Image,
    ]


def test_a_change_draws_once(widget):
    calls, figure = [], widget.figure
    widget.figure = lambda **values: calls.append(values["caption"]) or figure(**values)
    put(widget, number=2)
    put(widget, origin=SCENE)
    put(widget, first="dog")
    assert len(calls) == 3 and calls[0] == CAPTIONS[1] and "dog" in calls[2]


def test_seen_figure_marks_the_source(model):
    seen = Maps(model).see(PICTURES[0], "a red bus", "raw")
    patch = seen_figure(PICTURES[0], seen, "title", source=(1, 2), strength=0.5, top=0.2)
    assert patch.axes[1].patches and patch.axes[1].images[1].get_clim() == (0, 0.2)
    word = seen_figure(PICTURES[0], seen, tower="text", source=1)
    assert [t.get_text() for t in word.axes[2].texts] == ["a", "▸ red", "bus"]
    assert not word.axes[1].patches
    plt.close("all")
