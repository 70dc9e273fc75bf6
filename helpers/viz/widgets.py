"""The course's widgets: controls around pure functions `…(…) -> Figure`. The scene composer is in composer.py."""

from __future__ import annotations

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure

from helpers.attention import Maps
from helpers.evaluation import class_embeds, class_probabilities, nearest
from helpers.minicoco import sprites
from helpers.minicoco.scenes import Scene, draw
from helpers.viz import figures
from helpers.viz.attention_explorer import Explorer
from helpers.viz.controls import (
    Live,
    SceneControls,
    compose,
    opened,
    slider,
    textbox,
    upload,
    uploaded,
)


def described(
    model, scene: Scene, captions, caption_embeds, names, name_embeds, k: int = 5
) -> Figure:
    """A scene drawn, its k nearest captions and its k most probable classes.

    captions [M] and names [C] with their unit vectors [M, E] and [C, E].
    """
    picture = draw(scene)[0]
    image_embed = model.encode_images([picture])  # [1, E]
    cosines, rows = nearest(image_embed[0], caption_embeds, k)
    chances = class_probabilities(image_embed, name_embeds, model.logit_scale.detach().cpu())[0]
    best, classes = chances.topk(min(k, len(names)))
    found = [captions[i] for i in rows.tolist()], cosines.tolist()
    return figures.scene_report(
        picture, *found, [names[c] for c in classes.tolist()], best.tolist()
    )


class SceneComposer(Live):
    """The dropdowns of a scene above what `figure` makes of it."""

    def __init__(self, figure, objects: list[str], start: dict):
        self.scene = SceneControls(objects, start)
        super().__init__(figure, self.scene.controls, self.scene.rows, height=300)

    def redraw(self, change=None) -> None:
        """First the colours that a new object can be painted in, then the picture, once."""
        if self.paused:
            return
        self.paused = True
        self.scene.follow(change and change["owner"])
        self.paused = False
        super().redraw(change)


def scene_composer(
    model, captions, caption_embeds, names, name_embeds=None, start: dict | None = None
) -> SceneComposer:
    """A scene put together from dropdowns: its picture, its nearest captions, its class probabilities.

    captions [M] with their unit vectors caption_embeds [M, E]; names [C]: the classes, of which those that can be drawn
    are offered as objects; name_embeds [C, E] by default from `class_embeds`; start: values for the controls, by name,
    by default a red car beside a dog.
    Raises ValueError when none of the names can be drawn.
    """
    objects = [name for name in names if name in sprites.CATEGORIES]
    if not objects:
        raise ValueError(
            f"None of these {len(names)} names can be drawn; sprites.CATEGORIES lists what can."
        )
    if name_embeds is None:
        name_embeds = class_embeds(model.encode_texts, names)
    if start is None:
        start = (
            {"first": "car", "colour": "red", "second": "dog"}
            if {"car", "dog"} <= set(objects)
            else {}
        )
    return SceneComposer(
        lambda **values: described(
            model, compose(**values), captions, caption_embeds, names, name_embeds
        ),
        objects,
        start,
    )


DRAWN = "This model has seen drawings and nothing else: what it says of a photograph is a guess."


def retrieved(model, images, image_embeds, sentence: str, k: int = 5) -> Figure:
    """The k pictures nearest to a sentence; images [N] with their unit vectors image_embeds [N, E]."""
    if not sentence.strip():
        raise ValueError("Type a sentence, then press Enter.")
    cosines, rows = nearest(model.encode_texts([sentence])[0], image_embeds, k)
    return figures.found_images(sentence, [images[i] for i in rows.tolist()], cosines.tolist())


def retrieval_box(model, images, image_embeds, start: str = "a red car next to a dog") -> Live:
    """A text box that shows the five pictures nearest to what is typed, on Enter; arguments as in `retrieved`."""
    box = textbox("Sentence:", start, "type a sentence, then press Enter")
    return Live(
        lambda sentence: retrieved(model, images, image_embeds, sentence),
        {"sentence": box},
        [["sentence"]],
        height=270,
    )


def explorer(model, images, captions=None, start: int = 0) -> Explorer:
    """Where a model looks: any picture and caption, by any method, from any layer, head, patch or word.

    images: a `CaptionedImages`, or a list of pictures with captions, one or a list of them for each; start: the row of
    the picture to begin with. Files can be uploaded, scenes composed, captions typed.
    """
    return Explorer(model, images, captions, start)


def matrix_explorer(images, captions, similarity) -> Live:
    """A matrix of cosines [M, N] of captions with pictures: choose a row and a column, see what meets there."""
    rows, columns = similarity.shape
    controls = {
        "row": slider("Caption no.:", 1, rows, 1),
        "column": slider("Picture no.:", 1, columns, 1),
    }
    return Live(
        lambda row, column: figures.matrix_cell(images, captions, similarity, row - 1, column - 1),
        controls,
        [["row", "column"]],
        height=400,
    )


def softened(image, image_embed, captions, text_embeds, factor: float) -> Figure:
    """The softmax over captions [M] of one picture, its cosines multiplied by a factor (1 / temperature) first.

    image_embed [E] and text_embeds [M, E]: unit vectors.
    """
    chances = class_probabilities(image_embed[None], text_embeds, torch.tensor(factor).log())[0]
    return figures.sharpened(
        image, captions, (text_embeds @ image_embed).tolist(), chances.tolist(), factor
    )


def temperature_slider(images, image_embeds, captions, text_embeds, factor: float = 14.3) -> Live:
    """A slider for the factor on the cosines, from 1 to 100, and what it makes of a picture's softmax.

    images [N] and captions [M] with their unit vectors [N, E] and [M, E]; factor: where it starts.
    """
    log = {"kind": widgets.FloatLogSlider, "base": 10, "step": 0.02, "readout_format": ".1f"}
    controls = {
        "number": slider("Picture:", 1, len(images), 1),
        "factor": slider("Factor:", 0, 2, factor, **log),
    }
    return Live(
        lambda number, factor: softened(
            images[number - 1], image_embeds[number - 1], captions, text_embeds, factor
        ),
        controls,
        [["number", "factor"]],
        height=400,
    )


def explained(
    model, file, captions, caption_embeds, names, name_embeds, drawn: bool, caption: str = ""
) -> Figure:
    """A picture of one's own: its nearest captions, its classes, and where its cosine with a caption comes from.

    file: a path, or what `uploaded` gives; captions [M] and names [C] with their unit vectors [M, E] and [C, E];
    drawn: says first that the model has seen only drawings (a profile's `rendered`); caption: the one to explain, by
    default the nearest. Raises FileNotFoundError or OSError, in one sentence, for a file that holds no picture.
    """
    image = opened(file)
    image_embed = model.encode_images([image])  # [1, E]
    cosines, rows = nearest(image_embed[0], caption_embeds)
    chances = class_probabilities(image_embed, name_embeds, model.logit_scale.detach().cpu())[0]
    best, classes = chances.topk(min(5, len(names)))
    found = [captions[i] for i in rows.tolist()]
    caption = caption.strip() or found[0]
    seen = Maps(model).see(image, caption, "relevance")
    classes = [names[c] for c in classes.tolist()]
    return figures.about(
        image,
        seen,
        caption,
        found,
        cosines.tolist(),
        classes,
        best.tolist(),
        DRAWN if drawn else "",
    )


def own_picture(
    model, captions, caption_embeds, names, name_embeds, drawn: bool, start=None
) -> Live:
    """Upload a picture: what `explained` makes of it. start: the path of a picture to begin with."""

    def figure(file, caption):
        picture = uploaded(file) or start
        if picture is None:
            raise ValueError("Upload a picture with the button above.")
        return explained(
            model, picture, captions, caption_embeds, names, name_embeds, False, caption
        )

    controls = {
        "file": upload("Upload a picture"),
        "caption": textbox("Caption:", "", "type one and press Enter; empty: the nearest"),
    }
    live = Live(figure, controls, [["file"], ["caption"]], height=700)
    if drawn:  # said above the controls, before there is a picture
        live.children = [widgets.HTML(f"<strong>{DRAWN}</strong>"), *live.children]
    return live
