"""The course's widgets: controls around pure functions `…(…) -> Figure`, in core ipywidgets (7.7 and 8).

A figure is shown as the PNG bytes of a `widgets.Image`, so that nothing flickers and a test can compare bytes.
"""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers import drawings, plots
from helpers.evaluation import class_embeds, class_probabilities, nearest
from helpers.places import PLACES, TIMES
from helpers.scenes import Scene, Thing, draw, place_by_relation

AS_DRAWN, NOTHING = "as drawn", "nothing"
RELATIONS = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}


class Live(widgets.VBox):
    """Controls above a picture that is drawn anew when one of them changes.

    figure: called with the value of every control, by name. `controls` {name: widget}, `picture` and `message` are
    there to be read and set from code. What `figure` raises is shown in `message`; the picture before it stays.
    """

    def __init__(self, figure: Callable[..., Figure], controls: dict, rows: list[list[str]], height: int):
        self.figure, self.controls, self.paused = figure, controls, False
        self.message = widgets.HTML(layout=widgets.Layout(min_height="28px"))
        # A fixed height: the page below does not jump while a new picture is on its way.
        whole = {"width": "100%", "height": f"{height}px", "object_fit": "contain", "object_position": "left top"}
        self.picture = widgets.Image(format="png", layout=widgets.Layout(**whole))
        wrapping = widgets.Layout(flex_flow="row wrap")
        lines = [widgets.HBox([controls[name] for name in row], layout=wrapping) for row in rows]
        super().__init__([*lines, self.message, self.picture])
        for control in controls.values():
            control.observe(self.redraw, "value")
        self.redraw()

    def redraw(self, _change=None) -> None:
        """Sets the picture from the controls, or the message if that fails."""
        if self.paused:
            return
        before = set(plt.get_fignums())
        try:
            values = {name: control.value for name, control in self.controls.items()}
            self.picture.value = plots.png(self.figure(**values))
            self.message.value = ""
        except Exception as error:  # in a notebook it would go to a log that nobody reads
            text = html.escape(str(error) or repr(error))
            self.message.value = f'<span role="alert" style="color: {plots.WRONG}">{text}</span>'
        finally:
            for number in set(plt.get_fignums()) - before:  # a figure begun, not finished
                plt.close(number)


def dropdown(description: str, options, value=None) -> widgets.Dropdown:
    style, layout = {"description_width": "96px"}, widgets.Layout(width="250px")
    options = list(options)
    value = options[0] if value not in options else value
    return widgets.Dropdown(options=options, value=value, description=description, style=style, layout=layout)


def retrieved(model, images, image_embeds, sentence: str, k: int = 5) -> Figure:
    """The k pictures nearest to a sentence; images [N] with their unit vectors image_embeds [N, E]."""
    if not sentence.strip():
        raise ValueError("Type a sentence, then press Enter.")
    cosines, rows = nearest(model.encode_texts([sentence])[0], image_embeds, k)
    return plots.found_images(sentence, [images[i] for i in rows.tolist()], cosines.tolist())


def retrieval_box(model, images, image_embeds, start: str = "a red car next to a dog") -> Live:
    """A text box that shows the five pictures nearest to what is typed, on Enter; arguments as in `retrieved`."""
    box = widgets.Text(
        value=start,
        description="Sentence:",
        placeholder="type a sentence, then press Enter",
        continuous_update=False,
        layout=widgets.Layout(width="100%", max_width="640px"),
    )
    return Live(
        lambda sentence: retrieved(model, images, image_embeds, sentence), {"sentence": box}, [["sentence"]], height=270
    )


def compose(place, time, first, colour, count, relation, second, second_colour) -> Scene:
    """The scene that the composer's controls describe; relation: one of `RELATIONS`; the second may be "nothing"."""
    asked = [(first, colour, count), (second, second_colour, 1)]
    things = [
        Thing(name, drawings.drawings(name)[0], None if paint == AS_DRAWN else paint, number)
        for name, paint, number in asked
        if name != NOTHING
    ]
    if len(things) == 2:
        place_by_relation(things, RELATIONS[relation])
    return Scene(place, time, things=things)


def described(model, scene: Scene, captions, caption_embeds, names, name_embeds, k: int = 5) -> Figure:
    """A scene drawn, its k nearest captions and its k most probable classes.

    captions [M] and names [C] with their unit vectors [M, E] and [C, E].
    """
    picture = draw(scene)[0]
    image_embed = model.encode_images([picture])  # [1, E]
    cosines, rows = nearest(image_embed[0], caption_embeds, k)
    chances = class_probabilities(image_embed, name_embeds, model.logit_scale.detach().cpu())[0]
    best, classes = chances.topk(min(k, len(names)))
    found = [captions[i] for i in rows.tolist()], cosines.tolist()
    return plots.scene_report(picture, *found, [names[c] for c in classes.tolist()], best.tolist())


class SceneComposer(Live):
    """Dropdowns for a scene; each object's colours are those that it can be painted in."""

    def __init__(self, figure: Callable[..., Figure], objects: list[str], start: dict):
        controls = {
            "place": dropdown("Place:", PLACES),
            "time": dropdown("Time:", TIMES),
            "first": dropdown("Object:", objects, start.get("first")),
            "colour": dropdown("Colour:", [AS_DRAWN]),
            "count": dropdown("How many:", [1, 2, 3]),
            "relation": dropdown("Relation:", RELATIONS),
            "second": dropdown("2nd object:", [NOTHING, *objects], start.get("second")),
            "second_colour": dropdown("2nd colour:", [AS_DRAWN]),
        }
        self.paints = {"first": controls["colour"], "second": controls["second_colour"]}
        for name, paint in self.paints.items():
            self.repaint(controls[name].value, paint)
        for name, value in start.items():
            controls[name].value = value
        rows = [["place", "time"], ["first", "colour", "count"], ["relation"], ["second", "second_colour"]]
        super().__init__(figure, controls, rows, height=300)

    def redraw(self, change=None) -> None:
        """First the colours that a new object can be painted in, then the picture, once."""
        owner = change and change["owner"]
        for name, paint in self.paints.items():
            if owner is self.controls[name]:
                self.paused = True
                self.repaint(owner.value, paint)
                self.paused = False
        self.controls["relation"].disabled = self.controls["second"].value == NOTHING
        super().redraw(change)

    @staticmethod
    def repaint(name: str, paint: widgets.Dropdown) -> None:
        options = [colour or AS_DRAWN for colour in drawings.colours(name)] if name != NOTHING else [AS_DRAWN]
        kept = paint.value if paint.value in options else options[0]
        paint.options = options
        paint.value, paint.disabled = kept, len(options) == 1


def scene_composer(
    model, captions, caption_embeds, names, name_embeds=None, start: dict | None = None
) -> SceneComposer:
    """A scene put together from dropdowns: its picture, its nearest captions, its class probabilities.

    captions [M] with their unit vectors caption_embeds [M, E]; names [C]: the classes, of which those that can be drawn
    are offered as objects; name_embeds [C, E] by default from `class_embeds`; start: values for the controls, by name,
    by default a red car beside a dog.
    Raises ValueError when none of the names can be drawn.
    """
    objects = [name for name in names if name in drawings.CATEGORIES]
    if not objects:
        raise ValueError(f"None of these {len(names)} names can be drawn; drawings.CATEGORIES lists what can.")
    if name_embeds is None:
        name_embeds = class_embeds(model.encode_texts, names)
    if start is None:
        start = {"first": "car", "colour": "red", "second": "dog"} if {"car", "dog"} <= set(objects) else {}
    return SceneComposer(
        lambda **values: described(model, compose(**values), captions, caption_embeds, names, name_embeds),
        objects,
        start,
    )
