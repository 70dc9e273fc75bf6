"""The scene composer: a scene put together from dropdowns, and what the model makes of it."""

from __future__ import annotations

import ipywidgets as widgets
from matplotlib.figure import Figure

from helpers import drawings, plots
from helpers.evaluation import class_embeds, class_probabilities, nearest
from helpers.live import Live, dropdown
from helpers.places import PLACES, TIMES
from helpers.scenes import Scene, Thing, draw, place_by_relation

AS_DRAWN, NOTHING = "as drawn", "nothing"
RELATIONS = {"to the left of": "left", "to the right of": "right", "above": "above", "below": "below"}


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


class SceneControls:
    """Dropdowns for a scene, by name as `compose` takes them; each object's colours are those it can be painted in."""

    rows = [["place", "time"], ["first", "colour", "count"], ["relation"], ["second", "second_colour"]]

    def __init__(self, objects: list[str], start: dict):
        self.controls = {
            "place": dropdown("Place:", PLACES),
            "time": dropdown("Time:", TIMES),
            "first": dropdown("Object:", objects, start.get("first")),
            "colour": dropdown("Colour:", [AS_DRAWN]),
            "count": dropdown("How many:", [1, 2, 3]),
            "relation": dropdown("Relation:", RELATIONS),
            "second": dropdown("2nd object:", [NOTHING, *objects], start.get("second")),
            "second_colour": dropdown("2nd colour:", [AS_DRAWN]),
        }
        self.paints = {"first": self.controls["colour"], "second": self.controls["second_colour"]}
        for name in self.paints:
            self.follow(self.controls[name])
        for name, value in start.items():
            self.controls[name].value = value

    def follow(self, owner: widgets.Widget | None) -> None:
        """After `owner` has changed: the colours that a new object can be painted in, and whether two are related."""
        for name, paint in self.paints.items():
            if owner is self.controls[name]:
                colours = (None,) if owner.value == NOTHING else drawings.colours(owner.value)
                options = [colour or AS_DRAWN for colour in colours]
                kept = paint.value if paint.value in options else options[0]
                paint.options = options
                paint.value, paint.disabled = kept, len(options) == 1
        self.controls["relation"].disabled = self.controls["second"].value == NOTHING


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
