"""Pretraining of the tiny ViT: what it sees, its two augmentations, and the committed checkpoint's card."""

import json

import numpy as np
import torch

from helpers.config import ROOT
from helpers.minicoco.sprites import UNSEEN, drawings
from scripts import pretrain_vit


def test_pictures_are_a_pure_function_of_seed_and_index():
    for i in (0, 7):
        first, again = pretrain_vit.single_object(3, i), pretrain_vit.single_object(3, i)
        assert (first[0] == again[0]).all() and first[1:] == again[1:]
    assert (pretrain_vit.single_object(3, 0)[0] != pretrain_vit.single_object(4, 0)[0]).any()


def test_boxes_lie_in_the_picture_and_labels_in_their_ranges():
    for i in range(60):
        pixels, (what, colour, where), (left, top, right, bottom) = pretrain_vit.single_object(0, i)
        assert pixels.shape == (96, 96, 3) and pixels.dtype == np.uint8
        assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
        assert (
            what < len(pretrain_vit.CLASSES)
            and colour < len(pretrain_vit.SHADES)
            and where < len(pretrain_vit.SETTINGS)
        )


def test_unseen_categories_and_kept_drawings_are_never_drawn(monkeypatch):
    drawn = []
    keep = pretrain_vit.draw
    monkeypatch.setattr(
        pretrain_vit, "draw", lambda scene, masks: drawn.extend(scene.things) or keep(scene, masks)
    )
    for i in range(150):
        pretrain_vit.single_object(1, i)
    assert not {t.category for t in drawn} & set(UNSEEN)
    assert all(
        t.glyph in drawings(t.category) and t.glyph not in drawings(t.category, probe=True)
        for t in drawn
    )


def test_a_crop_holds_its_whole_object():
    rng = np.random.default_rng(0)
    boxes = torch.tensor(
        [[0, 0, 20, 30], [70, 60, 96, 96], [20, 10, 80, 70], [40, 40, 50, 50]] * 20
    )
    marked = torch.zeros(len(boxes), 3, 96, 96, dtype=torch.uint8)
    for picture, (left, top, right, bottom) in zip(marked, boxes.tolist()):
        picture[:, top:bottom, left:right] = 1
    crops = pretrain_vit.crop(marked, boxes, rng)
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
    both = torch.stack(
        [pasted[:, 0], pasted[:, 1], labels[:, 2]], 1
    )  # the place stays that of the first
    expected = (pretrain_vit.loss_of(logits, labels) + pretrain_vit.loss_of(logits, both)) / 2
    assert torch.isclose(pretrain_vit.loss_of(logits, labels, pasted), expected)


def test_the_committed_card_says_what_was_measured():
    folder = ROOT / "assets/tiny-vit"
    card = json.loads((folder / "training.json").read_text())
    assert card["minutes"] <= 45 and card["accuracy"]["what"] >= 0.90
    assert (folder / "README.md").read_text() == pretrain_vit.model_card(card)
    assert (folder / "model.safetensors").stat().st_size < 8_000_000
