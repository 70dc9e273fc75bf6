"""`coco-val` with the very towers that a reader of it gets, ViTConfig() and BertConfig(), on few pictures."""

import numpy as np
import pytest
import torch

from helpers import artifacts
from tests.coco_folder import write_coco
from tests.coco_val import NOTEBOOKS, coco_val, hub_cache, run_notebook, walk

FEW = {"train_images": 24, "dev_images": 8, "val_images": 8, "head_epochs": 2, "tune_epochs": 1, "seeds": 1,
       "batch_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=64)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """86 and 110 million weights."""
    return hub_cache(tmp_path_factory.mktemp("hub"))


def test_helpers_from_photographs_to_tuned_towers(coco, cache, tmp_path, monkeypatch):
    profile = coco_val(coco, cache, tmp_path, monkeypatch, FEW)
    try:
        towers = artifacts.towers(profile)
        shapes = [(config.num_hidden_layers, config.hidden_size) for config in (t.model.config for t in towers)]
        assert shapes == [(12, 768), (12, 768)]
        before = [next(tower.parameters()).clone() for tower in towers]
        pairs, _, recall, history = walk(profile)
        assert [len(part) for part in pairs.values()] == [16, 8] and len(history) == 1
        assert np.isfinite(history[0]["dev_loss"]) and 0 <= recall["text_to_image/recall@1"] <= 1
        assert not any(torch.equal(p, next(t.parameters())) for p, t in zip(before, towers, strict=True))
    finally:
        artifacts.towers.cache_clear()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, FEW)
