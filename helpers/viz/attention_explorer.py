"""The explorer: where a model looks, for any image and caption, by any method.

`widgets.explorer` makes one. `python -m scripts.export_explorer` writes build/explorer.html, which
shows the same in a browser without Python, over maps computed beforehand.
"""

from __future__ import annotations

import html
import random

import ipywidgets as widgets
from matplotlib.figure import Figure
from PIL import Image

from helpers.attention import METHODS, compare, one_token, read_maps, whole_words
from helpers.minicoco import captions as sentences
from helpers.minicoco import sprites
from helpers.minicoco.scenes import draw
from helpers.storage.images import open_image
from helpers.viz import controls, overlays

GALLERY, SCENE, FILE = "the gallery", "a scene of yours", "a file of yours"
POOLING, PATCH, ALL_HEADS = "the pooling", "one patch", "mean of all"
# What a method does not read, by the names of the controls, and why.
SEVERAL, MEAN = "it goes through several", "it takes the mean of all"
UNREAD = {
    "raw": {"layers": "it looks at one"},
    "rollout": {"layer": SEVERAL, "head": MEAN},
    "flow": {"layer": SEVERAL, "head": MEAN},
    "relevance": {
        "tower": "it reads both at once",
        "head": "it weighs each by its gradient",
        "layer": SEVERAL,
        "source": "it starts where the cosine does, at the pooling",
    },
}


def limits(method: str) -> str:
    """What cannot change the maps of a method, in a sentence or two."""
    unread = ", ".join(f"{name} ({why})" for name, why in UNREAD[method].items())
    text = f"{method.capitalize()} does not read: {unread}."
    if method != "relevance":
        text += " The caption cannot change the map, nor the picture the bars:"
        text += " each tower is read by itself."
    return text


class Explorer(controls.Live):
    """Controls for all that `attention.read_maps` takes; what a method does not read is disabled.

    `note` says what cannot change the map, and where map and bars are highest.
    """

    def __init__(self, model, images, captions=None, start: int = 0):
        self.model, self.state, self.file = model, {}, (None, None)
        self.image_at = images.image if hasattr(images, "image") else images.__getitem__
        self.captions_at = getattr(images, "captions", lambda i: [])  # a list has none
        if captions is not None:
            self.captions_at = captions.__getitem__
        self.towers = {"image": model.image_tower.model, "text": model.text_tower.model}
        scene = {"first": "car", "colour": "red", "second": "dog"}
        self.scene = controls.SceneControls(list(sprites.CATEGORIES), scene)
        layers = self.towers["image"].config.num_hidden_layers
        self.side = model.image_tower.size // self.towers["image"].config.patch_size
        middle = (self.side + 1) // 2
        parts = {
            "origin": controls.dropdown("Picture from:", [GALLERY, SCENE, FILE]),
            "number": controls.slider("Picture:", 1, len(images), 1 + start),
            "file": controls.upload("Upload a picture"),
            **self.scene.controls,
            "choice": controls.dropdown("Captions:", [""], width=controls.WIDE),
            "caption": controls.textbox("Caption:", "", "choose one above or type one, then Enter"),
            "method": controls.dropdown("Method:", METHODS, "relevance"),
            "tower": controls.dropdown("Tower:", self.towers),
            "head": controls.dropdown("Head:", [ALL_HEADS]),
            "layer": controls.slider("Layer:", 1, layers, layers),
            "layers": controls.slider("Layers:", 1, layers, (1, layers), widgets.IntRangeSlider),
            "source": controls.dropdown("Seen from:", [POOLING]),
            "row": controls.slider("Row:", 1, self.side, middle),
            "column": controls.slider("Column:", 1, self.side, middle),
            "strength": controls.slider("Overlay:", 0, 1, 0.85, widgets.FloatSlider, step=0.05),
        }
        lines = [["origin", "number", "file"], *self.scene.rows, ["choice"], ["caption"]]
        lines += [["method", "tower", "head"], ["layer", "layers"], ["source", "row", "column"]]
        self.note = widgets.HTML()
        super().__init__(self.drawn, parts, [*lines, ["strength"]], height=440)
        self.children = [*self.lines, self.note, self.message, self.image]

    def value(self, name: str):
        return self.controls[name].value

    def follow(self, owner) -> None:
        """After `owner` has changed: what other controls offer, and which are of use."""
        c, origin, tower = self.controls, self.value("origin"), self.value("tower")
        self.scene.follow(owner)
        of_image = (None, c["origin"], c["number"], *self.scene.controls.values())
        if owner in of_image:
            captions = self.captions()  # none of a file, nor of images that came without
            c["choice"].options = captions or ["none: type one below"]
            c["choice"].disabled = not captions
        if owner in (*of_image, c["choice"]) and not c["choice"].disabled:
            c["caption"].value = c["choice"].value
        parts = {c["number"]: GALLERY, c["file"]: FILE} | dict.fromkeys(self.lines[1:5], SCENE)
        for part, its_origin in parts.items():
            part.layout.display = None if origin == its_origin else "none"
        config = self.towers[tower].config
        c["layer"].max = c["layers"].max = config.num_hidden_layers
        heads = [ALL_HEADS, *range(1, config.num_attention_heads + 1)]
        for control, options in ((c["head"], heads), (c["source"], self.sources(tower))):
            if list(control.options) != options:
                value = control.value if control.value in options else options[0]
                control.options, control.value = options, value
        for name in ("tower", "head", "layer", "layers", "source"):
            c[name].disabled = name in UNREAD[self.value("method")]
        for name in ("row", "column"):
            c[name].disabled = c["source"].disabled or self.value("source") != PATCH

    def composed(self):
        return controls.compose(**{name: self.value(name) for name in self.scene.controls})

    def captions(self) -> list[str]:
        """The captions on offer for the image that is chosen; none for an uploaded one."""
        captions = []
        if self.value("origin") == SCENE:
            scene, rng = self.composed(), random.Random(0)
            captions = [sentences.caption(rng, scene, detail)[0] for detail in range(5)]
        elif self.value("origin") == GALLERY:
            captions = self.captions_at(self.value("number") - 1)
        return [captions] if isinstance(captions, str) else list(dict.fromkeys(captions))

    def words(self) -> list[tuple[str, list[int]]]:
        return whole_words(self.model.text_tower, self.value("caption"))

    def sources(self, tower: str) -> list[str]:
        """Where a reading can start: the pooling, then a patch, or each of the caption's words."""
        if tower == "image":
            return [POOLING, PATCH]
        return [POOLING, *(f"word {i}: {word}" for i, (word, _) in enumerate(self.words(), 1))]

    def chosen_image(self) -> Image.Image:
        """The image that is chosen. ValueError where none is uploaded, OSError for a bad file."""
        if self.value("origin") == SCENE:
            return draw(self.composed())[0]
        if self.value("origin") == GALLERY:
            return self.image_at(self.value("number") - 1)
        file = controls.uploaded(self.value("file"))
        if file is None:
            raise ValueError("Upload a picture with the button above.")
        key = file.name, file.getvalue()
        if self.file[0] != key:  # decoded once, not at every move of a slider
            self.file = key, open_image(file)
        return self.file[1]

    def start(self) -> tuple[list[int] | None, dict]:
        """The tokens that a reading starts from, None for the pooling; and what marks them."""
        source = self.controls["source"]
        if source.disabled or source.value == POOLING:
            return None, {}
        if source.value == PATCH:
            row, column = self.value("row") - 1, self.value("column") - 1
            first = self.model.image_tower.prefix
            return [first + row * self.side + column], {"marked": (row, column)}
        number = source.index - 1
        return self.words()[number][1], {"word": number}

    def read(self, image, caption: str, start: list[int] | None):
        """Map, words and cosine; what the last redraw has computed is not computed again."""
        method, tower, head, layer = map(self.value, ("method", "tower", "head", "layer"))
        first, last = self.value("layers")
        pair, reading = (image, caption), (method, tower, head, layer, first, last, start)
        if self.state.get("pair") != pair:
            self.state = {"pair": pair, "comparison": compare(self.model, [image], [caption])}
        comparison = self.state["comparison"]
        if self.state.get("reading") != reading:
            options = {"layer": layer - 1, "layers": slice(first - 1, last), "tower": tower}
            options["head"] = None if head == ALL_HEADS else head - 1
            if start is not None:
                tokens = comparison.sides[tower][1].shape[1]
                options["source"] = sum(one_token(k, 1, tokens) for k in start) / len(start)
            options = {name: x for name, x in options.items() if name not in UNREAD[method]}
            (grid,), (words,) = read_maps(comparison, method, **options)
            self.state |= {"reading": reading, "maps": (grid, words)}
        return *self.state["maps"], comparison.similarity.item()

    def drawn(self, caption, method, strength, **_) -> Figure:
        """The figure of the controls' values; sets `note`."""
        image = self.chosen_image()
        if not caption.strip():
            raise ValueError("Type a caption, then press Enter.")
        start, marks = self.start()
        grid, words, cosine = self.read(image, caption, start)
        row, column = divmod(int(grid.argmax()), self.side)
        word = words.words[int(words.scores.argmax())] if words.words else "none"
        highest = f"Highest: the patch in row {row + 1}, column {column + 1}; the word “{word}”."
        note = html.escape(f"{highest} {limits(method)}")
        self.note.value = f'<span role="status">{note}</span>'
        title = f"{method}   ·   cosine of picture and caption {cosine:.2f}"
        look = {"title": title, "strength": strength, **marks}
        look["visible"] = self.model.image_tower.visible
        return overlays.map_and_words(image, grid, words, **look)
