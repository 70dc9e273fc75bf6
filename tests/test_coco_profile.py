"""The `coco-val` profile where neither COCO nor the hub can be reached: the same cells, on
photographs' own formats and towers of the published shape with random weights, at other sizes.
"""

import dataclasses

import pytest

from helpers import load_or_build
from helpers.config import ROOT
from tests.coco_val import coco_val, hub_cache, run_notebook, walk
from tests.notebooks import NOTEBOOKS

SAMPLE = ROOT.parent / "shared" / "coco-sample"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {"train_images": 32, "dev_images": 16, "val_images": 16}
SIZES |= {"head_epochs": 3, "tune_epochs": 2, "seeds": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """ViT-B/16's 197 tokens and BERT's vocabulary, but two narrow layers each."""
    return hub_cache(tmp_path_factory.mktemp("hub"), **SMALL, intermediate_size=128)


@pytest.fixture
def profile(coco, cache, tmp_path, monkeypatch):
    yield coco_val(coco, cache, tmp_path, monkeypatch, SIZES)
    load_or_build.towers.cache_clear()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_coco_val(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, SIZES)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no coco-sample beside the repository")
def test_genuine_photographs(profile):
    sizes = {"train_images": 150, "dev_images": 50, "val_images": 100, "tune_epochs": 1}
    _, examples, recall, history = walk(dataclasses.replace(profile, data=SAMPLE, **sizes))
    assert [len(part) for part in examples.values()] == [150, 50] and len(history) == 1
    assert recall["text_to_image/recall@10"] > 0
