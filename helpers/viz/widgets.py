"""The course's widgets, each a function that returns controls around a pure `…(…) -> Figure`."""

from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from ipywidgets import FloatLogSlider
from matplotlib.figure import Figure

from helpers.attention import explain
from helpers.evaluation import class_probabilities, nearest
from helpers.minicoco import sprites
from helpers.minicoco.scenes import Scene, draw
from helpers.storage.images import open_image
from helpers.viz import controls, figures, overlays
from helpers.viz.attention_explorer import Explorer
from helpers.viz.controls import Live, compose, slider, textbox

DRAWN = "This model has seen drawings and nothing else: what it says of a photograph is a guess."


def answers(model, image_embed, captions, caption_embeds, names, name_embeds, k=5) -> tuple:
    """The k captions nearest to an image, with cosines, and its k most probable names.

    image_embed [E]; captions [M] and names [C] with their unit vectors [M, E] and [C, E].
    """
    cosines, rows = nearest(image_embed, caption_embeds, k)
    scale = model.logit_scale.detach().cpu()
    probabilities = class_probabilities(image_embed[None], name_embeds, scale)[0]
    highest, classes = probabilities.topk(min(k, len(names)))
    found = [captions[i] for i in rows.tolist()], cosines.tolist()
    return found, ([names[c] for c in classes.tolist()], highest.tolist())


def show_answers(left, right, found, classes, width: int) -> None:
    """What `answers` returns, as bars."""
    figures.text_bars(left, *found, figures.TEXT, width, ".2f", "nearest captions", "cosine")
    title = "which class is it?"
    figures.text_bars(right, *classes, figures.IMAGE, 24, ".0%", title, "probability")


def described(model, scene: Scene, captions, caption_embeds, names, name_embeds) -> Figure:
    """A scene drawn, its nearest captions and its most probable classes; see `answers`."""
    image = draw(scene)[0]
    embed = model.encode_images([image])[0]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3), width_ratios=[3, 5.5, 2.4])
    figures.show_image(left, image)
    left.set_title("the scene", fontsize=11)
    both = answers(model, embed, captions, caption_embeds, names, name_embeds)
    show_answers(middle, right, *both, width=56)
    return figure


def scene_composer(model, captions, caption_embeds, names, name_embeds, start: dict) -> Live:
    """A scene put together from dropdowns, and what `described` makes of it.

    Objects on offer are the names that can be drawn; start: values of controls, by name.
    """
    scene = controls.SceneControls([name for name in names if name in sprites.CATEGORIES], start)

    def figure(**values):
        made = compose(**values)
        return described(model, made, captions, caption_embeds, names, name_embeds)

    return Live(figure, scene.controls, scene.rows, 300, scene.follow)


def retrieved(model, images, image_embeds, sentence: str, k: int = 5) -> Figure:
    """The k images nearest to a sentence; images [N] with their unit vectors [N, E]."""
    if not sentence.strip():
        raise ValueError("Type a sentence, then press Enter.")
    cosines, rows = nearest(model.encode_texts([sentence])[0], image_embeds, k)
    return figures.found_images(sentence, [images[i] for i in rows.tolist()], cosines.tolist())


def retrieval_box(model, images, image_embeds, start: str = "a red car next to a dog") -> Live:
    """A text box above the five images nearest to what is typed; see `retrieved`."""
    box = textbox("Sentence:", start, "type a sentence, then press Enter")
    figure = partial(retrieved, model, images, image_embeds)
    return Live(figure, {"sentence": box}, [["sentence"]], height=270)


def explorer(model, images, captions=None, start: int = 0) -> Explorer:
    """Where a model looks: any image and caption, by any method, layer, head, patch or word.

    images: a `CaptionedImages`, or a list of images with captions, one or a list of them for each;
    start: the row of the image to begin with.
    """
    return Explorer(model, images, captions, start)


def matrix_cell(images, captions, similarity, row: int, column: int) -> Figure:
    """Cosines [M, N] of captions with images, one cell of them marked, and what it compares."""
    similarity = np.asarray(similarity)
    (rows, columns), score = similarity.shape, similarity[row, column]
    figure, (table, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[3, 2])
    limit = np.abs(similarity).max()
    look = {"cmap": "vlag", "vmin": -limit, "vmax": limit, "aspect": "auto"}
    cells = table.imshow(similarity, extent=(0.5, columns + 0.5, rows + 0.5, 0.5), **look)
    figure.colorbar(cells, label="cosine")
    frame = {"fill": False, "edgecolor": "black", "linewidth": 3, "clip_on": False}
    table.add_patch(plt.Rectangle((column + 0.5, row + 0.5), 1, 1, **frame))
    table.set(title=f"caption {row + 1} with picture {column + 1}")
    table.set(xlabel="picture", ylabel="caption")
    table.grid(False)
    figures.show_image(right, images[column])
    right.set_title(f"“{figures.wrap(captions[row], 40)}”", fontsize=11, color=figures.TEXT)
    right.set_xlabel(
        f"cosine {score:.2f}\n"
        f"number {(similarity[row] > score).sum() + 1} of the caption's {columns} pictures\n"
        f"number {(similarity[:, column] > score).sum() + 1} of the picture's {rows} captions"
    )
    return figure


def matrix_explorer(images, captions, similarity) -> Live:
    """Sliders for the row and the column of `matrix_cell`."""

    def figure(row, column):
        return matrix_cell(images, captions, similarity, row - 1, column - 1)

    rows, columns = similarity.shape
    sliders = {
        "row": slider("Caption no.:", 1, rows, 1),
        "column": slider("Picture no.:", 1, columns, 1),
    }
    return Live(figure, sliders, [["row", "column"]], height=400)


def softened(image, image_embed, captions, text_embeds, factor: float, k: int = 8) -> Figure:
    """The k captions nearest to an image, and the softmax over all, cosines times a factor.

    image_embed [E] and text_embeds [M, E]: unit vectors; factor: 1 / temperature.
    """
    cosines, rows = nearest(image_embed, text_embeds, k)
    scale = torch.tensor(factor).log()
    shares = class_probabilities(image_embed[None], text_embeds, scale)[0, rows]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 4), width_ratios=[2, 5, 2.2])
    figures.show_image(left, image)
    found = [captions[i] for i in rows.tolist()], cosines.tolist()
    figures.text_bars(middle, *found, figures.TEXT, 60, ".2f", "cosines, as they are", "cosine")
    title, label = f"softmax of {factor:.3g} × cosine", f"probability among {len(captions)}"
    unnamed = [""] * len(rows), shares.tolist()
    figures.text_bars(right, *unnamed, figures.IMAGE, 1, ".1%", title, label)
    return figure


def temperature_slider(images, image_embeds, captions, text_embeds, factor: float = 14.3) -> Live:
    """A slider for the factor of `softened`, from 1 to 100, and one for the image."""

    def figure(number, factor):
        image, embed = images[number - 1], image_embeds[number - 1]
        return softened(image, embed, captions, text_embeds, factor)

    options = {"kind": FloatLogSlider, "step": 0.02, "readout_format": ".1f"}
    sliders = {
        "number": slider("Picture:", 1, len(images), 1),
        "factor": slider("Factor:", 0, 2, factor, **options),
    }
    return Live(figure, sliders, [["number", "factor"]], height=400)


def explained(model, file, captions, caption_embeds, names, name_embeds, drawn, caption=""):
    """An image file, `answers` on it, and where its cosine with a caption comes from: a Figure.

    file: a path, or what `uploaded` returns; drawn: says first that the model knows only drawings;
    caption: the one to explain, by default the nearest. OSError for a file that holds no image.
    """
    image = open_image(file)
    embed = model.encode_images([image])[0]
    found, classes = answers(model, embed, captions, caption_embeds, names, name_embeds)
    caption = caption.strip() or found[0][0]
    grids, words = explain(model, [image], [caption])
    figure = plt.figure(figsize=(10.6, 7))
    shape = {"width_ratios": [3, 3.6, 2.6], "height_ratios": [3, 1.7]}
    axes = figure.subplot_mosaic("imw;ccp", **shape)
    figures.show_image(axes["i"], image)
    heat = overlays.overlay(axes["m"], image, grids[0], visible=model.image_tower.visible)
    figure.colorbar(heat, label="relevance")
    overlays.word_bars(axes["w"], *words[0])
    show_answers(axes["c"], axes["p"], found, classes, width=90)
    cosine = float(model.encode_texts([caption])[0] @ embed)
    title = f"“{figures.wrap(caption, 84, 1)}”: cosine {cosine:.2f}"
    figure.suptitle(f"{DRAWN}\n{title}" if drawn else title, fontsize=12)
    return figure


def own_picture(model, captions, caption_embeds, names, name_embeds, drawn, start=None) -> Live:
    """A button to upload an image, and what `explained` makes of it; start: a first path."""

    def figure(file, caption):
        file = controls.uploaded(file) or start
        if file is None:
            raise ValueError("Upload a picture with the button above.")
        return explained(model, file, captions, caption_embeds, names, name_embeds, drawn, caption)

    box = textbox("Caption:", "", "type one and press Enter; empty: the nearest")
    fields = {"file": controls.upload("Upload a picture"), "caption": box}
    return Live(figure, fields, [["file"], ["caption"]], height=700)
