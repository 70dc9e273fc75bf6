"""The widgets without a kernel: a value is set, the PNG's bytes change."""

import io
import zlib

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers import drawings, plots, widgets
from helpers.scenes import draw, relation_of
from helpers.widgets import AS_DRAWN, NOTHING, compose

CAPTIONS = [f"Caption number {i}." for i in range(12)]
NAMES = ["car", "dog", "stop sign", "apple", "giraffe"]


class Model:
    """In place of CLIP: a vector drawn from the checksum of what is encoded."""

    logit_scale = torch.nn.Parameter(torch.tensor(2.0))

    def encode_texts(self, texts):
        return torch.stack([self.vector(text.encode()) for text in texts])

    def encode_images(self, images):
        return torch.stack([self.vector(image.tobytes()) for image in images])

    def vector(self, content):
        return F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(zlib.crc32(content))), dim=0)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def images():
    return [Image.new("RGB", (24, 24), (9 * i, 255 - 9 * i, 90)) for i in range(20)]


@pytest.fixture
def box(model, images):
    return widgets.retrieval_box(model, images, model.encode_images(images))


@pytest.fixture
def composer(model):
    return widgets.scene_composer(model, CAPTIONS, model.encode_texts(CAPTIONS), NAMES)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def shown(widget):
    """The widget's picture, decoded: (bytes, width, height)."""
    assert widget.message.value == ""
    with Image.open(io.BytesIO(widget.picture.value)) as picture:
        picture.load()
        assert picture.format == "PNG"
        return widget.picture.value, *picture.size


def test_retrieved_shows_the_nearest_pictures_best_first(model, images):
    embeds = model.encode_images(images)
    figure = widgets.retrieved(model, images, embeds, "a cat")
    cosines = (embeds @ model.encode_texts(["a cat"])[0]).sort(descending=True)
    axes = figure.axes
    assert [a.get_xlabel().split("cosine ")[1] for a in axes] == [f"{c:.2f}" for c in cosines.values[:5].tolist()]
    assert [tuple(a.images[0].get_array()[0, 0]) for a in axes] == [
        images[i].getpixel((0, 0)) for i in cosines.indices[:5].tolist()
    ]
    assert "a cat" in figure.get_suptitle()
    plt.close(figure)


def test_retrieved_from_fewer_pictures_than_asked_for(model, images):
    figure = widgets.retrieved(model, images[:2], model.encode_images(images[:2]), "a cat")
    assert len(figure.axes) == 2
    plt.close(figure)


def test_a_sentence_changes_the_picture_and_back(box):
    first = shown(box)[0]
    box.controls["sentence"].value = "a green apple"
    assert shown(box)[0] != first
    box.controls["sentence"].value = "a red car next to a dog"
    assert shown(box)[0] == first


def test_retrieval_is_asked_on_enter_with_the_start_given(model, images):
    box = widgets.retrieval_box(model, images, model.encode_images(images), start="two cats")
    sentence = box.controls["sentence"]
    assert (sentence.value, sentence.continuous_update) == ("two cats", False)


@pytest.mark.parametrize("sentence", ["", "   "])
def test_an_empty_sentence_is_answered_in_the_widget(box, sentence):
    before = box.picture.value
    box.controls["sentence"].value = sentence
    assert "Type a sentence" in box.message.value
    assert box.picture.value == before
    box.controls["sentence"].value = "a dog"
    assert shown(box)[0] != before


def test_an_error_is_shown_escaped_and_leaves_no_figure():
    def figure(sentence):
        drawn = plt.figure()
        if "<" in sentence:
            raise ValueError(f"cannot read {sentence}")
        return drawn

    text = ipywidgets.Text(value="fine", description="Sentence:")
    live = widgets.Live(figure, {"sentence": text}, [["sentence"]], height=100)
    assert shown(live)
    text.value = "<script>alert(1)</script>"
    assert "&lt;script&gt;" in live.message.value and "<script>" not in live.message.value
    assert 'role="alert"' in live.message.value
    assert plt.get_fignums() == []


MARKUP = r"<script>alert(1)</script> $\frac{ & $x_1$"


def test_a_sentence_with_markup_is_searched_for_and_shown(box):
    box.controls["sentence"].value = "a dog"
    other = shown(box)[0]
    box.controls["sentence"].value = MARKUP
    assert shown(box)[0] != other


def test_captions_and_names_with_markup_are_shown(model):
    captions, names = [MARKUP, "A dog."], ["car", "dog", MARKUP]
    composer = widgets.scene_composer(model, captions, model.encode_texts(captions), names)
    assert shown(composer)


def test_an_error_without_a_word_is_named():
    def figure(sentence):
        raise RuntimeError

    live = widgets.Live(figure, {"sentence": ipywidgets.Text(description="Sentence:")}, [["sentence"]], height=100)
    assert "RuntimeError" in live.message.value


def test_a_figure_of_the_readers_own_stays_open(box):
    own = plt.figure()
    box.controls["sentence"].value = "a dog"
    assert plt.get_fignums() == [own.number]
    plt.close(own)


@pytest.mark.parametrize("name", ["box", "composer"])
def test_controls_can_be_named_reached_and_read(name, request):
    widget = request.getfixturevalue(name)
    for control in widget.controls.values():
        assert control.description.strip()
        assert getattr(control, "continuous_update", False) is False
        assert getattr(control, "tabbable", None) is not False
    inside = [child for row in widget.children for child in getattr(row, "children", ())]
    assert inside == list(widget.controls.values())
    assert widget.picture in widget.children and widget.message in widget.children
    assert widget.picture.layout.height.endswith("px")


def scene(**changes):
    values = dict(place="beach", time="day", first="car", colour="red", count=2, relation="above", second="dog",
                  second_colour="brown")  # fmt: skip
    return compose(**{**values, **changes})


def test_compose_makes_the_scene_asked_for():
    made = scene()
    assert (made.place, made.time) == ("beach", "day")
    assert [(t.category, t.colour, t.count) for t in made.things] == [("car", "red", 2), ("dog", "brown", 1)]
    assert [(t.category, t.colour) for t in scene(second=NOTHING).things] == [("car", "red")]
    assert scene(first="stop sign", colour=AS_DRAWN).things[0].colour is None


@pytest.mark.parametrize("told, relation", widgets.RELATIONS.items())
def test_compose_puts_things_as_told(told, relation):
    assert relation_of(*scene(relation=told).things) == relation


def test_described_shows_scene_captions_and_probabilities(model):
    made, embeds, classes = scene(), model.encode_texts(CAPTIONS), model.encode_texts(NAMES)
    figure = widgets.described(model, made, CAPTIONS, embeds, NAMES, classes)
    left, middle, right = figure.axes
    picture = draw(made)[0]
    assert (left.images[0].get_array() == picture).all()
    image = model.encode_images([picture])[0]
    cosines = (embeds @ image).sort(descending=True)
    nearest = [(f"{c:.2f}", CAPTIONS[i]) for c, i in zip(cosines.values[:5].tolist(), cosines.indices[:5].tolist())]
    assert [tuple(t.get_text().split("   ")) for t in middle.texts] == nearest
    probabilities = (model.logit_scale.detach().exp() * classes @ image).softmax(0)
    assert [patch.get_width() for patch in right.patches] == pytest.approx(
        probabilities.sort(descending=True).values.tolist()
    )
    plt.close(figure)


def test_the_composer_offers_what_can_be_drawn(model):
    composer = widgets.scene_composer(
        model, CAPTIONS, model.encode_texts(CAPTIONS), ["hair drier", "dog", "parking meter"]
    )
    assert composer.controls["first"].options == ("dog",)
    assert composer.controls["second"].options == (NOTHING, "dog")
    with pytest.raises(ValueError, match="can be drawn"):
        widgets.scene_composer(model, CAPTIONS, model.encode_texts(CAPTIONS), ["hair drier"])


@pytest.mark.parametrize("name", ["place", "time", "first", "colour", "count", "relation", "second", "second_colour"])
def test_every_control_changes_the_scene_and_back(composer, name):
    before, control = shown(composer)[0], composer.controls[name]
    value = control.value
    control.value = next(option for option in control.options[::-1] if option != value)
    assert shown(composer)[0] != before
    control.value = value
    if name not in ("first", "second"):  # whose colour may have become another
        assert shown(composer)[0] == before


def test_colours_follow_the_object(composer):
    first, colour = composer.controls["first"], composer.controls["colour"]
    assert (first.value, colour.value) == ("car", "red")
    colour.value = "yellow"
    for name in (*NAMES, "apple"):
        first.value = name
        expected = [paint or AS_DRAWN for paint in drawings.colours(name)]
        assert list(colour.options) == expected and colour.value in expected
        assert colour.disabled == (len(expected) == 1)
        shown(composer)
    first.value, colour.value = "apple", "red"
    first.value = "car"
    assert colour.value == "red"  # kept where the new object has it
    second, paint = composer.controls["second"], composer.controls["second_colour"]
    second.value = NOTHING
    assert list(paint.options) == [AS_DRAWN] and composer.controls["relation"].disabled
    shown(composer)


def test_a_new_object_is_drawn_once(composer):
    calls = []
    figure = composer.figure
    composer.figure = lambda **values: calls.append(values) or figure(**values)
    composer.controls["first"].value = "apple"
    assert len(calls) == 1
    assert (calls[0]["first"], calls[0]["colour"]) == ("apple", "red")


def test_the_composer_starts_where_it_is_told_to(model):
    start = {"first": "stop sign", "second": NOTHING, "place": "street", "time": "night"}
    composer = widgets.scene_composer(model, CAPTIONS, model.encode_texts(CAPTIONS), NAMES, start=start)
    assert {name: composer.controls[name].value for name in start} == start
    shown(composer)


def test_every_captioned_thing_can_be_composed():
    for name in drawings.CATEGORIES:
        for paint in drawings.colours(name):
            picture = draw(scene(first=name, colour=paint or AS_DRAWN))[0]
            assert picture.mode == "RGB"


def test_pictures_keep_their_height(composer):
    heights = set()
    for place in composer.controls["place"].options[:3]:
        composer.controls["place"].value = place
        heights.add(shown(composer)[2])
    assert max(heights) - min(heights) < 12
    assert composer.picture.layout.object_fit == "contain"


def test_png_closes_its_figure():
    assert plots.png(plt.figure()).startswith(b"\x89PNG")
