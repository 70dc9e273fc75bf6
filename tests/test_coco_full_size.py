"""`coco-val` with the very towers that a reader of it gets, ViTConfig() and BertConfig(), on few pictures.

The notebooks with them take a quarter of an hour and more: tests/full_size.py, which `make full-size` runs.
"""

import numpy as np
import torch

from helpers import load_or_build
from tests.coco_val import FEW, coco_val, walk


def test_helpers_from_photographs_to_tuned_towers(coco, full_cache, tmp_path, monkeypatch):
    profile = coco_val(coco, full_cache, tmp_path, monkeypatch, FEW)
    try:
        towers = load_or_build.towers(profile)
        shapes = [
            (config.num_hidden_layers, config.hidden_size)
            for config in (t.model.config for t in towers)
        ]
        assert shapes == [(12, 768), (12, 768)]
        before = [next(tower.parameters()).clone() for tower in towers]
        pairs, _, recall, history = walk(profile)
        assert [len(part) for part in pairs.values()] == [16, 8] and len(history) == 1
        assert np.isfinite(history[0]["dev_loss"]) and 0 <= recall["text_to_image/recall@1"] <= 1
        assert not any(
            torch.equal(p, next(t.parameters())) for p, t in zip(before, towers, strict=True)
        )
    finally:
        load_or_build.towers.cache_clear()
