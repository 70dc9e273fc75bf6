"""Controls above an image: the base of the course's widgets, in core ipywidgets (7.7 and 8)."""

import html
import io
import warnings
from collections.abc import Callable

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.minicoco import sprites
from helpers.minicoco.backgrounds import PLACES, TIMES
from helpers.minicoco.scenes import Scene, SceneObject, place_by_relation
from helpers.viz import figures

WIDE, NARROW = "860px", "250px"


class Live(widgets.VBox):
    """Controls above an image that is drawn again when one of them changes.

    `figure` is called with the value of every control, by name, and returns a Figure. The image
    holds it as PNG bytes: nothing flickers, and a test can compare bytes. `controls`, `image` and
    `message` can be read and set from code. An error of `figure` is shown in `message`; the image
    stays as it was. rows: names of controls, line by line; height: of the image, in pixels;
    follow: in place of the method.
    """

    def __init__(self, figure: Callable[..., Figure], controls: dict, rows, height, follow=None):
        self.figure, self.controls, self.paused = figure, controls, False
        self.follow = follow or self.follow
        self.message = widgets.HTML(layout=widgets.Layout(min_height="28px"))
        # A fixed height: the page below does not jump while a new image is on its way.
        layout = {"width": "100%", "height": f"{height}px"}
        layout |= {"object_fit": "contain", "object_position": "left top"}
        self.image = widgets.Image(format="png", layout=widgets.Layout(**layout))
        self.lines = [widgets.HBox([controls[name] for name in row]) for row in rows]
        for line in self.lines:
            line.layout.flex_flow = "row wrap"
        super().__init__([*self.lines, self.message, self.image])
        for control in controls.values():
            control.observe(self.redraw, "value")
        self.redraw()

    def follow(self, owner: widgets.Widget | None) -> None:
        """Sets the controls that depend on `owner`, which has changed (None: at the start)."""

    def redraw(self, change: dict | None = None) -> None:
        """Sets the controls that follow from others, then the image, once, or the message."""
        if self.paused:
            return
        self.paused = True
        before = set(plt.get_fignums())
        try:
            self.follow(change and change["owner"])
            values = {name: control.value for name, control in self.controls.items()}
            with warnings.catch_warnings():
                # A letter that the font lacks is drawn as a box: no reason for a warning.
                warnings.simplefilter("ignore")
                self.image.value = figures.png(self.figure(**values))
            self.message.value = ""
        except Exception as error:
            # In a notebook it would go to a log that nobody reads.
            text = html.escape(str(error) or repr(error))
            self.message.value = f'<span role="alert" style="color: {figures.WRONG}">{text}</span>'
        finally:
            self.paused = False
            for unfinished in set(plt.get_fignums()) - before:
                plt.close(unfinished)


def look(description: str, width: str) -> dict:
    """What all controls have in common."""
    layout = widgets.Layout(width=width, max_width="100%")
    style = {"description_width": "96px"}
    return {"description": description, "style": style, "layout": layout}


def dropdown(description: str, options, value=None, width: str = NARROW) -> widgets.Dropdown:
    """A choice of `options`; the first of them where `value` is none of them."""
    options = list(options)
    value = value if value in options else options[0]
    return widgets.Dropdown(options=options, value=value, **look(description, width))


def slider(description: str, low, high, value, kind=widgets.IntSlider, **options):
    """A slider of some kind that hands over its value when it is let go."""
    limits = {"min": low, "max": high, "value": value, "continuous_update": False}
    return kind(**limits, **options, **look(description, "320px"))


def textbox(description: str, value: str, placeholder: str) -> widgets.Text:
    """A line of text that is handed over on Enter, or when the cursor leaves it."""
    options = {"value": value, "placeholder": placeholder, "continuous_update": False}
    return widgets.Text(**options, **look(description, WIDE))


def upload(description: str) -> widgets.FileUpload:
    """A button that takes an image file."""
    layout = widgets.Layout(width=NARROW)
    return widgets.FileUpload(description=description, accept="image/*", layout=layout)


def uploaded(value) -> io.BytesIO | None:
    """The last file of a FileUpload, with its name, or None before there is one.

    value: {name: {"content": bytes}} in ipywidgets 7, a tuple of {"name", "content"} in 8.
    """
    if not value:
        return None
    if isinstance(value, dict):
        value = [{**file, "name": name} for name, file in value.items()]
    file = io.BytesIO(bytes(value[-1]["content"]))
    file.name = value[-1]["name"]
    return file


AS_DRAWN, NOTHING = "as drawn", "nothing"
RELATIONS = {"to the left of": "left", "to the right of": "right"}
RELATIONS |= {"above": "above", "below": "below"}


def compose(place, time, first, colour, count, relation, second, second_colour) -> Scene:
    """The scene that the composer's controls describe.

    relation: a key of `RELATIONS`; colours may be "as drawn", the second object "nothing".
    """
    rows = [(first, colour, count), (second, second_colour, 1)]
    objects = [
        SceneObject(name, sprites.drawings(name)[0], None if paint == AS_DRAWN else paint, number)
        for name, paint, number in rows
        if name != NOTHING
    ]
    if len(objects) == 2:
        place_by_relation(objects, RELATIONS[relation])
    return Scene(place, time, objects=objects)


class SceneControls:
    """Dropdowns for a scene, by name as `compose` takes them.

    An object's colours are those that it can be painted in.
    """

    rows = [
        ["place", "time"],
        ["first", "colour", "count"],
        ["relation"],
        ["second", "second_colour"],
    ]

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
        for name in ("first", "second"):
            self.follow(self.controls[name])
        for name, value in start.items():
            self.controls[name].value = value

    def follow(self, owner: widgets.Widget | None) -> None:
        """After `owner` has changed: the colours of a new object, and whether two are related."""
        for name, paint in (("first", "colour"), ("second", "second_colour")):
            if owner is not self.controls[name]:
                continue
            paint = self.controls[paint]
            colours = [None] if owner.value == NOTHING else sprites.colours(owner.value)
            options, before = [colour or AS_DRAWN for colour in colours], paint.value
            paint.options = options
            paint.value = before if before in options else options[0]
            paint.disabled = len(options) == 1
        self.controls["relation"].disabled = self.controls["second"].value == NOTHING
