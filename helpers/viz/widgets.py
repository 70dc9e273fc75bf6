"""The course's widgets, each a function that returns controls around a pure `…(…) -> Figure`."""

from functools import partial

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.attention import explain
from helpers.evaluation import class_probabilities, nearest
from helpers.minicoco import sprites
from helpers.minicoco.scenes import Scene, draw
from helpers.storage.images import open_image
from helpers.viz import controls, figures, overlays
from helpers.viz.attention_explorer import Explorer
from helpers.viz.controls import Live, compose, textbox

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
    title = f"“{sentence}”: the {len(rows)} nearest of {len(image_embeds):,} pictures"
    found = [images[i] for i in rows.tolist()]
    return figures.found_images(found, cosines.tolist(), title=title)


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
    figure = plt.figure(figsize=(10.6, 6.6))
    shape = {"width_ratios": [3, 3, 0.12, 2.4], "height_ratios": [3, 1.9]}
    axes = figure.subplot_mosaic("imbw;cccp", **shape)
    figures.show_image(axes["i"], image)
    heat = overlays.overlay(axes["m"], image, grids[0], visible=model.image_tower.visible)
    figure.colorbar(heat, cax=axes["b"], label="relevance", format=overlays.SHORT)
    overlays.word_bars(axes["w"], *words[0])
    show_answers(axes["c"], axes["p"], found, classes, width=78)
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
