"""The widgets without a kernel: a value is set, the PNG's bytes change."""

import io
import zlib

import ipywidgets
import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from helpers.minicoco import sprites
from helpers.minicoco.scenes import draw, relation_of
from helpers.model import CLIP
from helpers.viz import controls, figures, widgets
from helpers.viz.controls import AS_DRAWN, NOTHING, RELATIONS, compose
from tests.tiny import image_tower, text_tower
from tests.uploads import send

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
        return F.normalize(
            torch.randn(16, generator=torch.Generator().manual_seed(zlib.crc32(content))), dim=0
        )


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
    assert [a.get_xlabel().split("cosine ")[1] for a in axes] == [
        f"{c:.2f}" for c in cosines.values[:5].tolist()
    ]
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
    box = controls.Live(figure, {"sentence": text}, [["sentence"]], height=100)
    assert shown(box)
    text.value = "<script>alert(1)</script>"
    assert "&lt;script&gt;" in box.message.value and "<script>" not in box.message.value
    assert 'role="alert"' in box.message.value
    assert plt.get_fignums() == []


MARKUP = r"<script>alert(1)</script> $\frac{$ & $x_1$"


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

    box = controls.Live(
        figure, {"sentence": ipywidgets.Text(description="Sentence:")}, [["sentence"]], height=100
    )
    assert "RuntimeError" in box.message.value


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
    values = dict(
        place="beach",
        time="day",
        first="car",
        colour="red",
        count=2,
        relation="above",
        second="dog",
        second_colour="brown",
    )
    return compose(**{**values, **changes})


def test_compose_makes_the_scene_asked_for():
    made = scene()
    assert (made.place, made.time) == ("beach", "day")
    assert [(t.category, t.colour, t.count) for t in made.things] == [
        ("car", "red", 2),
        ("dog", "brown", 1),
    ]
    assert [(t.category, t.colour) for t in scene(second=NOTHING).things] == [("car", "red")]
    assert scene(first="stop sign", colour=AS_DRAWN).things[0].colour is None


@pytest.mark.parametrize("told, relation", RELATIONS.items())
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
    nearest = [
        (f"{c:.2f}", CAPTIONS[i])
        for c, i in zip(cosines.values[:5].tolist(), cosines.indices[:5].tolist())
    ]
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


@pytest.mark.parametrize(
    "name", ["place", "time", "first", "colour", "count", "relation", "second", "second_colour"]
)
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
        expected = [paint or AS_DRAWN for paint in sprites.colours(name)]
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
    composer = widgets.scene_composer(
        model, CAPTIONS, model.encode_texts(CAPTIONS), NAMES, start=start
    )
    assert {name: composer.controls[name].value for name in start} == start
    shown(composer)


def test_every_captioned_thing_can_be_composed():
    for name in sprites.CATEGORIES:
        for paint in sprites.colours(name):
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
    assert figures.png(plt.figure()).startswith(b"\x89PNG")


# A matrix, a softmax, a picture of one's own


def test_the_matrix_shows_what_meets_in_a_cell(images):
    similarity = torch.arange(12.0).view(4, 3) / 12 - 0.3
    matrix = widgets.matrix_explorer(images[:3], CAPTIONS[:4], similarity)
    before = shown(matrix)[0]
    for name, value in (("row", 4), ("column", 2)):
        matrix.controls[name].value = value
        assert shown(matrix)[0] != before
        before = shown(matrix)[0]
    figure = figures.matrix_cell(images[:3], CAPTIONS[:4], similarity.numpy(), 3, 1)
    text = "\n".join(t.get_text() for t in figure.texts)
    assert "cosine 0.53" in text and CAPTIONS[3] in text
    assert "number 2 of the caption's 3" in text and "number 1 of the picture's 4" in text
    assert figure.axes[0].patches[-1].get_xy() == (0.5, 2.5)
    assert (figure.axes[2].images[0].get_array()[0, 0] == images[1].getpixel((0, 0))).all()
    plt.close(figure)


def test_the_factor_sharpens_the_softmax(model, images):
    embeds = model.encode_images(images), model.encode_texts(CAPTIONS)
    slider = widgets.temperature_slider(images, embeds[0], CAPTIONS, embeds[1], factor=10.0)
    before = shown(slider)[0]
    slider.controls["factor"].value = 80
    assert shown(slider)[0] != before
    highest = []
    for factor in (1.0, 10.0, 100.0):
        figure = widgets.softened(images[2], embeds[0][2], CAPTIONS, embeds[1], factor)
        cosines, chances = ([bar.get_width() for bar in axes.patches] for axes in figure.axes[1:])
        plt.close(figure)
        expected = (factor * embeds[1] @ embeds[0][2]).softmax(dim=0).sort(descending=True).values
        assert chances == pytest.approx(expected[:8].tolist(), abs=1e-5)
        assert cosines == sorted(cosines, reverse=True)
        highest.append(chances[0])
    assert highest == sorted(highest) and highest[0] < 0.2 < 0.5 < highest[2]


@pytest.fixture(scope="module")
def clip():
    towers = image_tower(size=32, num_hidden_layers=2), text_tower()
    torch.manual_seed(0)
    return CLIP(16, 16, 8, *towers).eval()


WORDED, CLASSES = ["a red bus", "a blue dog", "two cats on the beach"], ["dog", "cat"]


def own(clip, drawn=True, start=None):
    embeds = clip.encode_texts(WORDED), clip.encode_texts(CLASSES)
    return widgets.own_picture(clip, WORDED, embeds[0], CLASSES, embeds[1], drawn, start)


def told(figure):
    return "\n".join(t.get_text() for t in figure.texts)


def explained(clip, file, drawn=True, caption=""):
    embeds = clip.encode_texts(WORDED), clip.encode_texts(CLASSES)
    return widgets.explained(clip, file, WORDED, embeds[0], CLASSES, embeds[1], drawn, caption)


@pytest.fixture
def photo(tmp_path):
    Image.linear_gradient("L").convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def test_a_picture_of_ones_own_is_classified_captioned_and_explained(clip, photo):
    figure = explained(clip, photo)
    image_embed = clip.encode_images([controls.opened(photo)])[0]
    best = (clip.encode_texts(WORDED) @ image_embed).sort(descending=True)
    nearest = WORDED[int(best.indices[0])]
    notice = next(text for text in figure.texts if text.get_text() == widgets.DRAWN)
    assert notice.get_position()[1] == max(text.get_position()[1] for text in figure.texts), (
        "it stands above all else"
    )
    assert f"“{nearest}”: cosine {best.values[0]:.2f}" in told(figure)
    captions, classes = figure.axes[-2:]
    assert [t.get_text().split("   ")[1] for t in captions.texts] == [
        WORDED[i] for i in best.indices.tolist()
    ]
    assert sum(bar.get_width() for bar in classes.patches) == pytest.approx(1, abs=1e-5)
    assert [t.get_text() for t in figure.axes[2].texts] == nearest.replace("cats", "[UNK]").split()
    plt.close(figure)
    typed = explained(clip, photo, drawn=False, caption="a big dog")
    assert widgets.DRAWN not in told(typed) and "“a big dog”" in told(typed)
    plt.close(typed)


def test_only_a_model_of_drawings_says_so_and_says_so_first(clip, photo):
    first = own(clip, True, photo).children[0]
    assert widgets.DRAWN in first.value
    assert all(
        widgets.DRAWN not in getattr(child, "value", "")
        for child in own(clip, False, photo).children[:-1]
    )


@pytest.mark.parametrize("content", [b"", b"plain text", b"GIF89a"])
def test_a_file_that_is_no_picture_is_answered_in_a_sentence(clip, photo, tmp_path, content):
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    with pytest.raises(OSError, match="bad.png is no whole picture"):
        explained(clip, bad)
    with pytest.raises(FileNotFoundError, match="none.png does not exist"):
        explained(clip, tmp_path / "none.png")
    assert plt.get_fignums() == []


def test_ones_own_picture_and_caption_change_what_is_shown(clip, photo):
    widget = own(clip, True, photo)
    first = shown(widget)[0]
    widget.controls["caption"].value = "a small cat"
    second = shown(widget)[0]
    content = io.BytesIO()
    Image.new("RGB", (60, 40), "green").save(content, "PNG")
    send(widget.controls["file"], "g.png", content.getvalue())
    third = shown(widget)[0]
    assert len({first, second, third}) == 3
    send(widget.controls["file"], "<b>.png", b"oops")
    assert (
        "&lt;b&gt;.png is no whole picture" in widget.message.value
        and widget.picture.value == third
    )


def test_uploads_of_both_versions_of_ipywidgets_are_read():
    assert controls.uploaded({}) is controls.uploaded(()) is None
    seven = {
        "a.jpg": {"metadata": {"name": "a.jpg"}, "content": b"old"},
        "b.jpg": {"metadata": {"name": "b.jpg"}, "content": b"new"},
    }
    eight = ({"name": "b.jpg", "type": "image/jpeg", "size": 3, "content": memoryview(b"new")},)
    for value in (seven, eight):
        file = controls.uploaded(value)
        assert (file.name, file.read()) == ("b.jpg", b"new")


def test_a_large_picture_is_shown_smaller(tmp_path):
    Image.new("RGB", (3000, 1500), "blue").save(tmp_path / "large.jpg")
    assert controls.opened(tmp_path / "large.jpg").size == (800, 400)
