"""The `coco-val` profile where neither COCO nor the hub can be reached: the same cells, on photographs' own formats and
towers of the published shape with random weights. Only the sizes are other ones.
"""

import dataclasses

import numpy as np
import pytest
import torch

from helpers import load_or_build
from helpers.config import ROOT
from helpers.model import CLIP
from helpers.probes import load_probes
from tests.coco_val import NOTEBOOKS, coco_val, hub_cache, run_notebook, walk

SAMPLE = ROOT.parent / "shared" / "coco-sample"
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
SIZES = {
    "train_images": 48,
    "dev_images": 16,
    "val_images": 16,
    "head_epochs": 3,
    "tune_epochs": 2,
    "seeds": 2,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """ViT-B/16's 197 tokens and BERT's vocabulary, but two narrow layers each."""
    return hub_cache(tmp_path_factory.mktemp("hub"), **SMALL)


@pytest.fixture
def profile(coco, cache, tmp_path, monkeypatch):
    yield coco_val(coco, cache, tmp_path, monkeypatch, SIZES)
    load_or_build.towers.cache_clear()


def test_helpers_from_photographs_to_tuned_towers(profile):
    towers = load_or_build.towers(profile)
    assert [tower.model.config.num_hidden_layers for tower in towers] == [2, 2]
    assert (towers[0].size, towers[1].model.config.vocab_size) == (224, 30522)
    before = [p.clone() for tower in towers for p in tower.parameters()]
    pairs, model, recall, history = walk(profile)
    assert [len(part) for part in pairs.values()] == [32, 16] and isinstance(model, CLIP)
    assert not set(pairs["train"].image_ids) & set(pairs["dev"].image_ids)
    assert 0 <= recall["text_to_image/recall@1"] <= recall["text_to_image/recall@10"] <= 1
    assert len(history) == 2 and all(np.isfinite(row["dev_loss"]) for row in history)
    assert not all(
        torch.equal(p, q)
        for p, q in zip(before, (p for t in towers for p in t.parameters()), strict=True)
    )
    probes = load_probes(profile)["known"]
    assert len(probes) > 8 and all(
        probes.image(i).width == probes.image(i).height for i in range(len(probes))
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_coco_val(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, SIZES)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no coco-sample beside the repository")
def test_genuine_photographs(profile):
    sizes = {"train_images": 200, "dev_images": 50, "val_images": 100, "tune_epochs": 1}
    pairs, _, recall, history = walk(dataclasses.replace(profile, data=SAMPLE, **sizes))
    assert [len(part) for part in pairs.values()] == [150, 50] and len(history) == 1
    assert 0 < recall["text_to_image/recall@10"] <= 1
