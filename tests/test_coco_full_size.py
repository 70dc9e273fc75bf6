"""`coco-val` with the very towers that a reader of it gets, ViTConfig() and BertConfig().

The notebooks with them take a quarter of an hour and more: tests/full_size.py, which
`make full-size` runs.
"""

import torch

from helpers import load_or_build
from tests.coco_val import FEW, coco_val, walk


def test_helpers_from_photographs_to_tuned_towers(coco, full_cache, tmp_path, monkeypatch):
    profile = coco_val(coco, full_cache, tmp_path, monkeypatch, FEW)
    try:
        towers = load_or_build.towers(profile)
        assert (towers[0].size, towers[1].model.config.vocab_size) == (224, 30522)
        for config in (tower.model.config for tower in towers):
            assert (config.num_hidden_layers, config.hidden_size) == (12, 768)
        before, examples, _, history = walk(profile)
        assert [len(part) for part in examples.values()] == [16, 8] and len(history) == 1
        for tower, weights in zip(towers, before):
            # The first weights of a BERT are its word vectors, which stay as they are.
            assert not torch.equal(weights[-1], list(tower.parameters())[-1])
    finally:
        load_or_build.towers.cache_clear()
