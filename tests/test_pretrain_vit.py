"""Pretraining of the tiny ViT: what it sees, its two augmentations, and the card beside it."""

import json

import numpy as np
import torch

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


def test_a_crop_holds_its_whole_object():
    boxes = [[0, 0, 20, 30], [70, 60, 96, 96], [20, 10, 80, 70], [40, 40, 50, 50]] * 20
    marked = torch.zeros(len(boxes), 3, 96, 96, dtype=torch.uint8)
    for image, (left, top, right, bottom) in zip(marked, boxes):
        image[:, top:bottom, left:right] = 1
    crops = pretrain_vit.crop(marked, torch.tensor(boxes), np.random.default_rng(0))
    assert crops.shape == (len(boxes), 3, 64, 64)
    assert (crops.flatten(1).sum(1) == marked.flatten(1).sum(1)).all()


def test_copy_paste_brings_the_other_object_and_changes_nothing_else():
    pixels = torch.stack([torch.full((3, 96, 96), k, dtype=torch.uint8) for k in range(2)])
    boxes = torch.tensor([[0, 0, 10, 20], [50, 50, 60, 90]])
    mixed = pretrain_vit.copy_paste(pixels, boxes, torch.tensor([1, 0]))
    assert (mixed[0, :, 50:90, 50:60] == 1).all() and mixed[0].sum() == 3 * 40 * 10
    assert (mixed[1, :, 0:20, 0:10] == 0).all() and (pixels[0] == 0).all()


def test_the_loss_of_a_pasted_pair_is_the_mean_over_both():
    torch.manual_seed(0)
    logits = [torch.randn(4, n) for n in (5, 3, 2)]
    labels, pasted = torch.zeros(4, 3, dtype=torch.long), torch.ones(4, 3, dtype=torch.long)
    # The place stays that of the first.
    both = torch.stack([pasted[:, 0], pasted[:, 1], labels[:, 2]], 1)
    expected = (pretrain_vit.loss_of(logits, labels) + pretrain_vit.loss_of(logits, both)) / 2
    assert torch.isclose(pretrain_vit.loss_of(logits, labels, pasted), expected)


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
