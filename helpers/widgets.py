"""The course's widgets: controls around pure functions `…(…) -> Figure`. The scene composer is in composer.py."""

from __future__ import annotations

import ipywidgets as widgets
import torch
from matplotlib.figure import Figure

from helpers import panels, plots
from helpers.evaluation import class_probabilities, nearest
from helpers.explorer import Explorer
from helpers.live import Live, opened, slider, textbox, upload, uploaded
from helpers.maps import Maps

DRAWN = "This model has seen drawings and nothing else: what it says of a photograph is a guess."


def retrieved(model, images, image_embeds, sentence: str, k: int = 5) -> Figure:
    """The k pictures nearest to a sentence; images [N] with their unit vectors image_embeds [N, E]."""
    if not sentence.strip():
        raise ValueError("Type a sentence, then press Enter.")
    cosines, rows = nearest(model.encode_texts([sentence])[0], image_embeds, k)
    return plots.found_images(sentence, [images[i] for i in rows.tolist()], cosines.tolist())


def retrieval_box(model, images, image_embeds, start: str = "a red car next to a dog") -> Live:
    """A text box that shows the five pictures nearest to what is typed, on Enter; arguments as in `retrieved`."""
    box = textbox("Sentence:", start, "type a sentence, then press Enter")
    return Live(
        lambda sentence: retrieved(model, images, image_embeds, sentence), {"sentence": box}, [["sentence"]], height=270
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
    controls = {"row": slider("Caption no.:", 1, rows, 1), "column": slider("Picture no.:", 1, columns, 1)}
    return Live(
        lambda row, column: panels.matrix_cell(images, captions, similarity, row - 1, column - 1),
        controls,
        [["row", "column"]],
        height=400,
    )


def softened(image, image_embed, captions, text_embeds, factor: float) -> Figure:
    """The softmax over captions [M] of one picture, its cosines multiplied by a factor (1 / temperature) first.

    image_embed [E] and text_embeds [M, E]: unit vectors.
    """
    chances = class_probabilities(image_embed[None], text_embeds, torch.tensor(factor).log())[0]
    return panels.sharpened(image, captions, (text_embeds @ image_embed).tolist(), chances.tolist(), factor)


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
        lambda number, factor: softened(images[number - 1], image_embeds[number - 1], captions, text_embeds, factor),
        controls,
        [["number", "factor"]],
        height=400,
    )


def explained(model, file, captions, caption_embeds, names, name_embeds, drawn: bool, caption: str = "") -> Figure:
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
    return panels.about(image, seen, caption, found, cosines.tolist(), classes, best.tolist(), DRAWN if drawn else "")


def own_picture(model, captions, caption_embeds, names, name_embeds, drawn: bool, start=None) -> Live:
    """Upload a picture: what `explained` makes of it. start: the path of a picture to begin with."""

    def figure(file, caption):
        picture = uploaded(file) or start
        if picture is None:
            raise ValueError("Upload a picture with the button above.")
        return explained(model, picture, captions, caption_embeds, names, name_embeds, False, caption)

    controls = {
        "file": upload("Upload a picture"),
        "caption": textbox("Caption:", "", "type one and press Enter; empty: the nearest"),
    }
    live = Live(figure, controls, [["file"], ["caption"]], height=700)
    if drawn:  # said above the controls, before there is a picture
        live.children = [widgets.HTML(f"<strong>{DRAWN}</strong>"), *live.children]
    return live
