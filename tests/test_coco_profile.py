"""The `coco-val` profile where neither COCO nor the hub can be reached: the same cells, on photographs' own formats and
towers of the published shape with random weights. Only the sizes are other ones.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from transformers import BertConfig, ViTConfig

from helpers import artifacts, hub
from helpers.coco import load_split
from helpers.evaluation import retrieval
from helpers.instances import load_probes
from helpers.model import CLIP
from helpers.pairs import Pairs
from helpers.profiles import ROOT, get_profile
from helpers.training import fit, tuning
from tests.coco_folder import write_coco
from tests.fake_hub import BERT, VIT, bert_files, vit_files, write_cache
from tools.run_notebooks import execute, problems

SAMPLE = ROOT.parent / "shared" / "coco-sample"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
SIZES = {"train_images": 48, "dev_images": 16, "val_images": 16, "head_epochs": 3, "tune_epochs": 2, "seeds": 2}
FEW = {"train_images": 24, "dev_images": 8, "val_images": 8, "head_epochs": 2, "tune_epochs": 1, "seeds": 1,
       "batch_size": 8}  # fmt: skip
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """64 photographs in COCO's layout."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=64)
    return root


def hub_cache(folder, **shape):
    """The hub's cache after a download: random weights under the published files' names, of the published shape."""
    vocabulary = (hub.minilm() / "vocab.txt").read_bytes()
    write_cache(folder, {VIT: vit_files(ViTConfig(**shape)), BERT: bert_files(BertConfig(**shape), vocabulary)})
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """ViT-B/16's 197 tokens and BERT's vocabulary, but two narrow layers each."""
    return hub_cache(tmp_path_factory.mktemp("hub"), **SMALL)


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory):
    """ViTConfig() and BertConfig(): 86 and 110 million weights."""
    return hub_cache(tmp_path_factory.mktemp("full-hub"))


@pytest.fixture
def profile(coco, cache, tmp_path, monkeypatch):
    """coco-val at these sizes, with folders of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    class Elsewhere(type(get_profile("coco-val"))):
        cache = trained = tmp_path / "cache"
        results = tmp_path / "results"

    genuine = get_profile("coco-val")
    values = {field.name: getattr(genuine, field.name) for field in dataclasses.fields(genuine)}
    yield Elsewhere(**{**values, **SIZES, "data": coco})
    artifacts.towers.cache_clear()


def walk(profile):
    """From a folder of photographs to trained heads, a search, and tuned towers: (pairs, model, recall, history)."""
    pairs = {
        split: Pairs(load_split(profile, split), artifacts.embeddings(profile, split)) for split in ("train", "dev")
    }
    val = artifacts.embeddings(profile, "val")
    model = artifacts.heads(profile)
    recall = retrieval(model.project_image(val.image_embeds), model.project_text(val.text_embeds), val.owner)
    history = fit(model, pairs["train"], pairs["dev"], seed=profile.seed, **tuning(profile))
    return pairs, model, recall, history


def test_helpers_from_photographs_to_tuned_towers(profile):
    towers = artifacts.towers(profile)
    assert [tower.model.config.num_hidden_layers for tower in towers] == [2, 2]
    assert (towers[0].size, towers[1].model.config.vocab_size) == (224, 30522)
    before = [p.clone() for tower in towers for p in tower.parameters()]
    pairs, model, recall, history = walk(profile)
    assert [len(part) for part in pairs.values()] == [32, 16] and isinstance(model, CLIP)
    assert not set(pairs["train"].image_ids) & set(pairs["dev"].image_ids)
    assert 0 <= recall["text_to_image/recall@1"] <= recall["text_to_image/recall@10"] <= 1
    assert len(history) == 2 and all(np.isfinite(row["dev_loss"]) for row in history)
    assert not all(torch.equal(p, q) for p, q in zip(before, (p for t in towers for p in t.parameters()), strict=True))
    probes = load_probes(profile)["known"]
    assert len(probes) > 8 and all(probes.image(i).width == probes.image(i).height for i in range(len(probes)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_coco_val(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, SIZES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_towers_of_full_size(path, coco, full_cache, tmp_path):
    run_notebook(path, coco, full_cache, tmp_path, FEW)


def run_notebook(path, coco, cache, tmp_path, sizes):
    """In a copy of the repository without data/, whose table of profiles has these sizes."""
    for folder in ("helpers", "assets", "tools"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "helpers/profiles.py", "a", encoding="utf-8") as table:
        print("\n\nfrom dataclasses import replace\n\ngenuine = all_profiles", file=table)
        print(f"all_profiles = lambda: {{k: replace(row, **{sizes}) for k, row in genuine().items()}}", file=table)
    (tmp_path / "notebooks").mkdir()
    copy = shutil.copy(path, tmp_path / "notebooks")
    env = {"CLIP_PROFILE": "coco-val", "CLIP_COCO_DIR": str(coco), "CLIP_RESULTS": str(tmp_path / "results"),
           "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}  # fmt: skip
    executed = execute(copy, cwd=tmp_path / "notebooks", env=env, timeout=900)
    noise = [problem for problem in problems(executed) if " bytes, over " not in problem]
    assert noise == [], "photographs may weigh more, since these outputs are committed nowhere; nothing else is allowed"
    said = executed.cells[[cell.cell_type for cell in executed.cells].index("code")].outputs[0].text
    assert said.startswith("profile coco-val")
    for file in (tmp_path / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert (file.stem, result["profile"]) == (path.name[:2], "coco-val")
        assert all(np.isfinite(metric["mean"]) for metric in result["metrics"].values())


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no coco-sample beside the repository")
def test_genuine_photographs(profile):
    sizes = {"train_images": 200, "dev_images": 50, "val_images": 100, "tune_epochs": 1}
    pairs, _, recall, history = walk(dataclasses.replace(profile, data=SAMPLE, **sizes))
    assert [len(part) for part in pairs.values()] == [150, 50] and len(history) == 1
    assert 0 < recall["text_to_image/recall@10"] <= 1
