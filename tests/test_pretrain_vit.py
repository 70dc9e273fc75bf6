"""Pretraining of the tiny ViT: what it sees, and the card beside it."""

import json

import numpy as np

from helpers.config import ROOT
from helpers.minicoco.sprites import UNSEEN, drawings
from scripts import pretrain_vit


def test_images_are_a_pure_function_of_seed_and_index():
    first, again = pretrain_vit.single_object(3, 7), pretrain_vit.single_object(3, 7)
    assert (first[0] == again[0]).all() and first[1:] == again[1:]
    assert (first[0] != pretrain_vit.single_object(4, 7)[0]).any()


def test_what_is_drawn_and_how_it_is_labelled(monkeypatch):
    scenes, draw = [], pretrain_vit.draw
    monkeypatch.setattr(pretrain_vit, "draw", lambda scene: scenes.append(scene) or draw(scene))
    for i in range(150):
        pixels, (what, colour, where), (left, top, right, bottom) = pretrain_vit.single_object(1, i)
        assert pixels.shape == (96, 96, 3) and pixels.dtype == np.uint8
        assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
        [drawn] = scenes.pop().objects
        assert drawn.category == pretrain_vit.CLASSES[what] and drawn.category not in UNSEEN
        assert (drawn.colour or "own") == pretrain_vit.SHADES[colour]
        assert drawn.glyph in drawings(drawn.category), "none that is kept for the probes"
        assert where < len(pretrain_vit.SETTINGS)


def test_the_card_beside_the_model_gives_what_was_measured():
    folder = ROOT / "assets/tiny-vit"
    training = json.loads((folder / "training.json").read_text())
    accuracy, machine = training["accuracy"], training["machine"]
    assert training["minutes"] <= 45 and accuracy["what"] >= 0.90
    card = " ".join((folder / "README.md").read_text().split())
    for words in (
        f"seed {training['seed']}, in {training['minutes']} minutes",
        f"{machine['cores']} cores ({machine['cpu']})",
        f"{training['images']:,} pictures of one object each",
        f"category ({len(pretrain_vit.CLASSES)}), colour ({len(pretrain_vit.SHADES)})",
        f"setting ({len(pretrain_vit.SETTINGS)}: place and time of day)",
        "{} epochs of 64 px crops around the object, then {} of whole".format(*training["epochs"]),
        f"the categories {', '.join(UNSEEN)};",
        "category {what:.3f}, colour {colour:.3f}, setting {where:.3f} top-1".format(**accuracy),
    ):
        assert words in card
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
