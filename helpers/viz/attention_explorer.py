"""The explorer: where a model looks, for any picture and caption, by any method. `widgets.explorer` makes one.

`python -m scripts.export_explorer` writes build/explorer.html: the same in a browser alone, over maps computed beforehand.
"""

from __future__ import annotations

import html
import random

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image

from helpers.attention import METHODS, UNREAD, Maps, Seen, depth, limits, patches, words_of
from helpers.minicoco import captions, sprites
from helpers.minicoco.scenes import draw
from helpers.viz import overlays
from helpers.viz.controls import (
    WIDE,
    Live,
    SceneControls,
    compose,
    dropdown,
    opened,
    slider,
    textbox,
    upload,
    uploaded,
)

GALLERY, SCENE, FILE = "the gallery", "a scene of yours", "a file of yours"
POOLING, PATCH, ALL_HEADS = "the pooling", "one patch", "mean of all"


def seen_figure(
    image,
    seen: Seen,
    title: str = "",
    tower: str = "image",
    source=None,
    strength: float = 0.85,
    top: float | None = None,
) -> Figure:
    """What `Maps.see` found, drawn: the map over the patches, bars over the words.

    tower, source: where the reading started, to be marked; strength: of the overlay, 0 to 1; top: the end of the map's
    colour scale, by default its largest value.
    """
    mark = {"marked" if tower == "image" else "word": source}
    return overlays.pair(
        image, seen.grid, *seen.words, title=title, strength=strength, top=top, **mark
    )


class Explorer(Live):
    """Controls for all that `Maps.see` can be asked. What a method does not read is disabled, with the reason.

    `note` tells what cannot change the map, and in words where map and bars are highest.
    """

    def __init__(self, model, images, captions=None, start: int = 0):
        self.maps, self.images, self.told, self.kept = Maps(model), images, captions, (None, None)
        self.scene = SceneControls(
            list(sprites.CATEGORIES), {"first": "car", "colour": "red", "second": "dog"}
        )
        (rows, columns), (layers, _) = patches(model.image_tower), depth(model.image_tower)
        controls = {
            "origin": dropdown("Picture from:", [GALLERY, SCENE, FILE]),
            "number": slider("Picture:", 1, len(images), 1 + start),
            "file": upload("Upload a picture"),
            **self.scene.controls,
            "choice": dropdown("Captions:", [""], width=WIDE),
            "caption": textbox("Caption:", "", "choose one above, or type one and press Enter"),
            "method": dropdown("Method:", METHODS, "relevance"),
            "tower": dropdown("Tower:", ["image", "text"]),
            "head": dropdown("Head:", [ALL_HEADS]),
            "layer": slider("Layer:", 1, layers, layers),
            "layers": slider("Layers:", 1, layers, (1, layers), widgets.IntRangeSlider),
            "source": dropdown("Seen from:", [POOLING]),
            "row": slider("Row:", 1, rows, (rows + 1) // 2),
            "column": slider("Column:", 1, columns, (columns + 1) // 2),
            "strength": slider("Overlay:", 0, 1, 0.85, widgets.FloatSlider, step=0.05),
            "top": widgets.BoundedFloatText(
                value=0,
                min=0,
                max=1000,
                description="Scale ends at (0: its highest):",
                continuous_update=False,
                style={"description_width": "initial"},
                layout=widgets.Layout(width="320px"),
            ),
        }
        lines = [
            ["origin", "number", "file"],
            *self.scene.rows,
            ["choice"],
            ["caption"],
            ["method", "tower", "head"],
            ["layer", "layers"],
            ["source", "row", "column"],
            ["strength", "top"],
        ]
        self.note = widgets.HTML()
        super().__init__(self.drawn, controls, lines, height=440)
        self.children = [*self.lines, self.note, self.message, self.picture]

    def redraw(self, change=None) -> None:
        """First the controls that follow from others, then the picture, once."""
        if self.paused:
            return
        self.paused = True
        try:
            self.follow(change and change["owner"])
        finally:
            self.paused = False
        super().redraw(change)

    def follow(self, owner) -> None:
        """After `owner` has changed (None: at the start): what the other controls offer, and which are of use."""
        c, origin = self.controls, self.controls["origin"].value
        self.scene.follow(owner)
        chosen = (None, c["origin"], c["number"], *self.scene.controls.values())
        if owner in chosen:
            c["choice"].options = self.captions() or ["none: type one below"]
            c["choice"].disabled = origin == FILE
        if owner in (*chosen, c["choice"]) and origin != FILE:
            c["caption"].value = c["choice"].value
        for part, its in (
            (c["number"], GALLERY),
            (c["file"], FILE),
            *((line, SCENE) for line in self.lines[1:5]),
        ):
            part.layout.display = None if origin == its else "none"
        unread, tower = UNREAD[c["method"].value], c["tower"].value
        layers, heads = depth(self.maps.towers[tower])
        c["layer"].max = c["layers"].max = layers
        for control, options in (
            (c["head"], [ALL_HEADS, *range(1, heads + 1)]),
            (c["source"], self.sources(tower)),
        ):
            if list(control.options) != options:
                kept = control.value if control.value in options else options[0]
                control.options, control.value = options, kept
        for name in ("tower", "head", "layer", "layers", "source"):
            c[name].disabled = name in unread
        for name in ("row", "column"):
            c[name].disabled = c["source"].disabled or c["source"].value != PATCH

    def composed(self):
        return compose(**{name: control.value for name, control in self.scene.controls.items()})

    def captions(self) -> list[str]:
        """The captions on offer for the picture that is chosen; none for an uploaded one."""
        i = self.controls["number"].value - 1
        if self.controls["origin"].value == SCENE:
            scene, rng = self.composed(), random.Random(0)
            told = [captions.caption(rng, scene, detail)[0] for detail in range(5)]
        elif self.controls["origin"].value == GALLERY:
            told = self.images.captions(i) if self.told is None else self.told[i]
        else:
            told = []
        return [told] if isinstance(told, str) else list(dict.fromkeys(told))

    def sources(self, tower: str) -> list[str]:
        """Where a reading of a tower can start: its pooling, then a patch, or each of the caption's words."""
        if tower == "image":
            return [POOLING, PATCH]
        words = words_of(self.maps.model.text_tower, self.controls["caption"].value)
        return [POOLING, *(f"word {i}: {word}" for i, (word, _) in enumerate(words, 1))]

    def image(self, origin, number, file) -> Image.Image:
        """The picture that is chosen. Raises ValueError where none is uploaded yet, OSError for a bad file."""
        if origin == SCENE:
            return draw(self.composed())[0]
        if origin == GALLERY:
            return (
                self.images.image(number - 1)
                if hasattr(self.images, "image")
                else self.images[number - 1]
            )
        file = uploaded(file)
        if file is None:
            raise ValueError("Upload a picture with the button above.")
        key = file.name, file.getvalue()
        if self.kept[0] != key:  # decoded once, not at every move of a slider
            self.kept = key, opened(file)
        return self.kept[1]

    def drawn(
        self,
        origin,
        number,
        file,
        caption,
        method,
        tower,
        head,
        layer,
        layers,
        source,
        row,
        column,
        strength,
        top,
        **_,
    ) -> Figure:
        """The figure of the controls' values; sets `note`."""
        image = self.image(origin, number, file)
        if self.controls["source"].disabled or source == POOLING:
            start = None
        elif source == PATCH:
            start = row - 1, column - 1
        else:
            start = self.controls["source"].options.index(source) - 1
        which = None if head == ALL_HEADS else head - 1
        seen = self.maps.see(
            image, caption, method, tower, layer - 1, (layers[0] - 1, layers[1]), which, start
        )
        peak = divmod(int(seen.grid.argmax()), seen.grid.shape[1])
        word = seen.words.words[int(seen.words.scores.argmax())] if seen.words.words else "none"
        told = f"Highest: the patch in row {peak[0] + 1}, column {peak[1] + 1}; the word “{word}”. {limits(method)}"
        self.note.value = f'<span role="status">{html.escape(told)}</span>'
        title = f"{method}   ·   cosine of picture and caption {seen.cosine:.2f}"
        return seen_figure(image, seen, title, tower, start, strength, top or None)
