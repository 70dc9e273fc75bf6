"""The widgets without a kernel: a value is set, the PNG's bytes change."""

from functools import partial

import ipywidgets
import matplotlib.pyplot as plt
import pytest
from PIL import Image

from helpers.minicoco import sprites
from helpers.minicoco.scenes import draw, relation_of
from helpers.model import CLIP
from helpers.storage.images import open_image
from helpers.storage.images import shown as shown_image
from helpers.viz import controls, widgets
from helpers.viz.controls import AS_DRAWN, NOTHING, RELATIONS, compose
from tests.tiny import image_tower, text_tower
from tests.uploads import shown

pytestmark = pytest.mark.usefixtures("no_figure_stays_open")
CAPTIONS = ["a red bus", "a blue dog", "two cats on the beach", "a small cat near the street"]
NAMES = ["car", "dog", "stop sign", "apple", "giraffe", "hair drier"]
MARKUP = r"<script>alert(1)</script> $\frac{$ & $x_1$"


@pytest.fixture(scope="module")
def model():
    return CLIP(16, 16, 8, image_tower(size=32, num_hidden_layers=2), text_tower()).eval()


@pytest.fixture(scope="module")
def images():
    return [Image.new("RGB", (24, 24), (9 * i, 255 - 9 * i, 90)) for i in range(20)]


@pytest.fixture(scope="module")
def answers(model):
    """Captions and names with their embeddings, as the widgets take them."""
    return CAPTIONS, model.encode_texts(CAPTIONS), NAMES, model.encode_texts(NAMES)


@pytest.fixture(scope="module")
def embeds(model, images):
    return model.encode_images(images)


@pytest.fixture
def photo(tmp_path):
    """A photograph larger than what is shown of it."""
    image = Image.linear_gradient("L").convert("RGB").resize((3000, 1500))
    image.save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


@pytest.fixture
def make(model, images, embeds, answers, photo):
    """Makes each widget, by name."""
    start = {"first": "car", "colour": "red", "second": "dog"}
    return {
        "sentence": partial(widgets.retrieval_box, model, images, embeds, "two cats"),
        "scene": partial(widgets.scene_composer, model, *answers, start),
        "own": partial(widgets.own_picture, model, *answers, True, photo),
    }


def closed(figure):
    """The figure, which can still be read."""
    plt.close(figure)
    return figure


# Live


def test_an_error_is_shown_escaped_and_leaves_no_figure_but_the_readers_own():
    def figure(sentence):
        drawn = plt.figure()
        if sentence != "fine":
            raise ValueError(sentence) if sentence else RuntimeError
        return drawn

    own = plt.figure()
    sentence = ipywidgets.Text(value="fine", description="Sentence:")
    box = controls.Live(figure, {"sentence": sentence}, [["sentence"]], height=100)
    before = shown(box)
    sentence.value = MARKUP
    assert "&lt;script&gt;" in box.message.value and "<script>" not in box.message.value
    assert 'role="alert"' in box.message.value and box.image.value == before
    sentence.value = ""
    assert "RuntimeError" in box.message.value
    assert plt.get_fignums() == [own.number]
    plt.close(own)


def other(control):
    """Another value of a control."""
    if hasattr(control, "options"):
        return next(option for option in control.options[::-1] if option != control.value)
    return getattr(control, "max", MARKUP)


@pytest.mark.parametrize("name", ["sentence", "scene", "own"])
def test_every_control_can_be_named_and_reached_and_changes_the_image_and_back(make, name):
    widget = make[name]()
    inside = [child for row in widget.children for child in getattr(row, "children", ())]
    assert inside == list(widget.controls.values())
    assert {widget.image, widget.message} <= set(widget.children)
    assert widget.image.layout.height.endswith("px")
    for key, control in widget.controls.items():
        assert control.description.strip()
        assert getattr(control, "continuous_update", False) is False
        assert getattr(control, "tabbable", None) is not False
        if key != "file":
            before, value = shown(widget), control.value
            control.value = other(control)
            assert shown(widget) != before
            control.value = value
            # Another object may have had another colour.
            assert shown(widget) == before or key in ("first", "second")


# A sentence


def test_retrieved_shows_the_nearest_images_best_first(model, images, embeds):
    figure = closed(widgets.retrieved(model, images, embeds, "a cat"))
    cosines = (embeds @ model.encode_texts(["a cat"])[0]).sort(descending=True)
    for axes, cosine, i in zip(figure.axes, *cosines):
        assert axes.get_xlabel().endswith(f"cosine {cosine:.2f}")
        assert tuple(axes.images[0].get_array()[0, 0]) == images[i].getpixel((0, 0))
    assert len(figure.axes) == 5 and "a cat" in figure.get_suptitle()


# A scene


def scene(**changes):
    values = {"place": "beach", "time": "day", "first": "car", "colour": "red", "count": 2}
    values |= {"relation": "above", "second": "dog", "second_colour": "brown"}
    return compose(**{**values, **changes})


def test_compose_makes_the_scene_asked_for():
    made = scene()
    car, dog = made.objects
    assert (made.place, made.time) == ("beach", "day")
    assert (car.category, car.colour, car.count) == ("car", "red", 2)
    assert (dog.category, dog.colour, dog.count) == ("dog", "brown", 1)
    assert [o.category for o in scene(second=NOTHING).objects] == ["car"]
    assert scene(first="stop sign", colour=AS_DRAWN).objects[0].colour is None
    for words, relation in RELATIONS.items():
        assert relation_of(*scene(relation=words).objects) == relation


def test_described_shows_scene_captions_and_probabilities(model, answers):
    left, middle, right = closed(widgets.described(model, scene(), *answers)).axes
    image = draw(scene())[0]
    assert (left.images[0].get_array() == image).all()
    embed = model.encode_images([image])[0]
    cosines = (answers[1] @ embed).sort(descending=True)
    expected = [f"{c:.2f}   {CAPTIONS[i]}" for c, i in zip(*cosines)]
    assert [text.get_text() for text in middle.texts] == expected
    probabilities = (model.logit_scale.detach().exp() * answers[3] @ embed).softmax(0)
    widths = [patch.get_width() for patch in right.patches]
    assert widths == pytest.approx(probabilities.sort(descending=True).values[:5].tolist())


def test_the_composer_offers_what_can_be_drawn_and_starts_as_asked_with_markup_too(model):
    texts, names = [MARKUP, "A dog."], [*NAMES, MARKUP]
    embeds = model.encode_texts(texts), model.encode_texts(names)
    start = {"first": "stop sign", "second": NOTHING, "place": "street", "time": "night"}
    composer = widgets.scene_composer(model, texts, embeds[0], names, embeds[1], start)
    assert {name: composer.controls[name].value for name in start} == start
    assert composer.controls["first"].options == tuple(NAMES[:5])
    assert composer.controls["second"].options == (NOTHING, *NAMES[:5])
    assert composer.controls["second_colour"].options == (AS_DRAWN,)
    assert composer.controls["relation"].disabled and shown(composer)


def test_colours_follow_the_object(make):
    composer = make["scene"]()
    first, colour = composer.controls["first"], composer.controls["colour"]
    colour.value = "yellow"
    for name in ("dog", "stop sign", "apple"):
        first.value = name
        expected = [paint or AS_DRAWN for paint in sprites.colours(name)]
        assert list(colour.options) == expected and colour.value in expected
        assert colour.disabled == (len(expected) == 1)
    colour.value, first.value = "red", "car"
    assert colour.value == "red", "kept where the new object has it"


# An image of one's own


def test_an_image_of_ones_own_is_classified_captioned_and_explained(model, answers, photo):
    assert shown_image(open_image(photo)).size == (800, 400) != open_image(photo).size
    figure = closed(widgets.explained(model, photo, *answers, drawn=True))
    embed = model.encode_images(photo)[0]
    cosines, rows = (answers[1] @ embed).sort(descending=True)
    nearest = CAPTIONS[rows[0]]
    _, _, _, words, captions, classes = figure.axes
    lines = figure.get_suptitle().split("\n")
    assert lines == [widgets.DRAWN, f"“{nearest}”: cosine {cosines[0]:.2f}"]
    assert len(captions.texts) == len(CAPTIONS) and len(classes.patches) == 5
    expected = nearest.split()
    assert [text.get_text() for text in words.texts] == expected
    figure = closed(widgets.explained(model, photo, *answers, drawn=False, caption="a big dog"))
    assert figure.get_suptitle().startswith("“a big dog”")


def test_uploads_of_both_versions_of_ipywidgets_are_read():
    assert controls.uploaded({}) is controls.uploaded(()) is None
    seven = {"a.jpg": {"content": b"old"}, "b.jpg": {"content": b"new"}}
    eight = ({"name": "b.jpg", "size": 3, "content": memoryview(b"new")},)
    for value in (seven, eight):
        file = controls.uploaded(value)
        assert (file.name, file.read()) == ("b.jpg", b"new")
