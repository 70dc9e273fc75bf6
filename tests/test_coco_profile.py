"""The `coco-val` profile where neither COCO nor the hub can be reached: the same cells, on
photographs' own formats and towers of the published shape with random weights, at other sizes.
"""

import pytest
from huggingface_hub import constants

from helpers import load_or_build
from helpers.evaluation import retrieval
from tests.coco_files import SAMPLE, elsewhere
from tests.coco_val import hub_cache, run_notebook
from tests.notebooks import NOTEBOOKS

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = {"train_images": 32, "dev_images": 16, "val_images": 16}
SIZES |= {"head_epochs": 3, "tune_epochs": 2, "seeds": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """ViT-B/16's 197 tokens and BERT's vocabulary, but two narrow layers each."""
    return hub_cache(tmp_path_factory.mktemp("hub"), **SMALL, intermediate_size=128)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_coco_val(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, SIZES)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no coco-sample beside the repository")
def test_genuine_photographs(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sizes = {"train_images": 150, "dev_images": 50, "val_images": 100, "seeds": 1}
    profile = elsewhere("coco-val", tmp_path, data=SAMPLE, **sizes)
    splits = [load_or_build.embeddings(profile, split) for split in ("train", "dev", "val")]
    assert [len(split.image_ids) for split in splits] == [150, 50, 100]
    model, val = load_or_build.heads(profile), splits[-1]
    images, texts = model.project_image(val.image_embeds), model.project_text(val.text_embeds)
    assert retrieval(images, texts, val.owner)["text_to_image/recall@10"] > 0
