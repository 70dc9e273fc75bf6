"""Controls above a picture: the base of the course's widgets, in core ipywidgets (7.7 and 8).

A figure is shown as the PNG bytes of a `widgets.Image`, so that nothing flickers and a test can compare bytes.
"""

from __future__ import annotations

import html
import io
import warnings
from collections.abc import Callable

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from helpers.minicoco import sprites
from helpers.minicoco.backgrounds import PLACES, TIMES
from helpers.minicoco.scenes import Scene, Thing, place_by_relation
from helpers.storage.images import open_image
from helpers.viz import figures

WIDE, NARROW = "860px", "250px"
LARGEST = 800  # pixels of the longer side of a picture that is shown


class Live(widgets.VBox):
    """Controls above a picture that is drawn anew when one of them changes.

    figure: called with the value of every control, by name. `controls` {name: widget}, `picture` and `message` are
    there to be read and set from code. What `figure` raises is shown in `message`; the picture before it stays.
    """

    def __init__(
        self, figure: Callable[..., Figure], controls: dict, rows: list[list[str]], height: int
    ):
        self.figure, self.controls, self.paused = figure, controls, False
        self.message = widgets.HTML(layout=widgets.Layout(min_height="28px"))
        # A fixed height: the page below does not jump while a new picture is on its way.
        whole = {
            "width": "100%",
            "height": f"{height}px",
            "object_fit": "contain",
            "object_position": "left top",
        }
        self.picture = widgets.Image(format="png", layout=widgets.Layout(**whole))
        self.lines = [
            widgets.HBox(
                [controls[name] for name in row], layout=widgets.Layout(flex_flow="row wrap")
            )
            for row in rows
        ]
        super().__init__([*self.lines, self.message, self.picture])
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
            with (
                warnings.catch_warnings()
            ):  # a letter that the font lacks is a box, and no reason to write below it
                warnings.simplefilter("ignore")
                self.picture.value = png(self.figure(**values))
            self.message.value = ""
        except Exception as error:  # in a notebook it would go to a log that nobody reads
            text = html.escape(str(error) or repr(error))
            self.message.value = f'<span role="alert" style="color: {figures.WRONG}">{text}</span>'
        finally:
            for number in set(plt.get_fignums()) - before:  # a figure begun, not finished
                plt.close(number)


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes, and closed: fast rather than small. One laid out by hand is not cropped."""
    buffer, crop = io.BytesIO(), "tight" if figure.get_layout_engine() else None
    figure.savefig(buffer, format="png", bbox_inches=crop, pil_kwargs={"compress_level": 1})
    plt.close(figure)
    return buffer.getvalue()


def dropdown(description: str, options, value=None, width: str = NARROW) -> widgets.Dropdown:
    style, layout = {"description_width": "96px"}, widgets.Layout(width=width, max_width="100%")
    options = list(options)
    value = options[0] if value not in options else value
    return widgets.Dropdown(
        options=options, value=value, description=description, style=style, layout=layout
    )


def slider(description: str, low, high, value, kind=widgets.IntSlider, **options):
    """A slider of some kind that tells its value when it is let go."""
    look = {
        "style": {"description_width": "96px"},
        "layout": widgets.Layout(width="320px", max_width="100%"),
    }
    return kind(
        min=low,
        max=high,
        value=value,
        description=description,
        continuous_update=False,
        **options,
        **look,
    )


def textbox(description: str, value: str, placeholder: str) -> widgets.Text:
    """A line of text that is handed over on Enter, or when the cursor leaves it."""
    look = {
        "style": {"description_width": "96px"},
        "layout": widgets.Layout(width="100%", max_width=WIDE),
    }
    return widgets.Text(
        value=value,
        description=description,
        placeholder=placeholder,
        continuous_update=False,
        **look,
    )


def upload(description: str) -> widgets.FileUpload:
    return widgets.FileUpload(
        description=description, accept="image/*", layout=widgets.Layout(width=NARROW)
    )


def uploaded(value) -> io.BytesIO | None:
    """The last file of a FileUpload, by name, from its value in ipywidgets 7 or 8; None before there is one.

    7 has {name: {"content": bytes}}, 8 a tuple of {"name": …, "content": memoryview}.
    """
    if not value:
        return None
    name, told = (
        list(value.items())[-1] if isinstance(value, dict) else (value[-1]["name"], value[-1])
    )
    file = io.BytesIO(bytes(told["content"]))
    file.name = name
    return file


def opened(file) -> Image.Image:
    """The picture in a file (a path, or what `uploaded` gives), small enough to be shown; OSError for a bad one."""
    image = open_image(file, LARGEST)
    image.thumbnail((LARGEST, LARGEST))
    return image


AS_DRAWN, NOTHING = "as drawn", "nothing"
RELATIONS = {
    "to the left of": "left",
    "to the right of": "right",
    "above": "above",
    "below": "below",
}


def compose(place, time, first, colour, count, relation, second, second_colour) -> Scene:
    """The scene that the composer's controls describe; relation: one of `RELATIONS`; the second may be "nothing"."""
    asked = [(first, colour, count), (second, second_colour, 1)]
    things = [
        Thing(name, sprites.drawings(name)[0], None if paint == AS_DRAWN else paint, number)
        for name, paint, number in asked
        if name != NOTHING
    ]
    if len(things) == 2:
        place_by_relation(things, RELATIONS[relation])
    return Scene(place, time, things=things)


class SceneControls:
    """Dropdowns for a scene, by name as `compose` takes them; each object's colours are those it can be painted in."""

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
        self.paints = {"first": self.controls["colour"], "second": self.controls["second_colour"]}
        for name in self.paints:
            self.follow(self.controls[name])
        for name, value in start.items():
            self.controls[name].value = value

    def follow(self, owner: widgets.Widget | None) -> None:
        """After `owner` has changed: the colours that a new object can be painted in, and whether two are related."""
        for name, paint in self.paints.items():
            if owner is self.controls[name]:
                colours = (None,) if owner.value == NOTHING else sprites.colours(owner.value)
                options = [colour or AS_DRAWN for colour in colours]
                kept = paint.value if paint.value in options else options[0]
                paint.options = options
                paint.value, paint.disabled = kept, len(options) == 1
        self.controls["relation"].disabled = self.controls["second"].value == NOTHING
