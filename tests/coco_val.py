"""What the tests of `coco-val` share: a hub cache of random weights, and the way from photographs to tuned towers."""

import dataclasses
import json
import shutil

import numpy as np
from huggingface_hub import constants
from transformers import BertConfig, ViTConfig

from helpers import load_or_build
from helpers.config import ROOT, get_profile
from helpers.data import Examples, load_split
from helpers.evaluation import retrieval
from helpers.storage import hub
from helpers.training import fit, tuning
from scripts.run_notebooks import execute, problems
from tests.fake_hub import BERT, VIT, bert_files, vit_files, write_cache

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FEW = {
    "train_images": 24,
    "dev_images": 8,
    "val_images": 8,
    "head_epochs": 2,
    "tune_epochs": 1,
    "seeds": 1,
    "batch_size": 8,
}


def hub_cache(folder, **shape):
    """The hub's cache after a download: random weights under the published files' names, of the published shape."""
    vocabulary = (hub.minilm() / "vocab.txt").read_bytes()
    write_cache(
        folder,
        {VIT: vit_files(ViTConfig(**shape)), BERT: bert_files(BertConfig(**shape), vocabulary)},
    )
    return folder


def coco_val(data, cache, tmp_path, monkeypatch, sizes):
    """The profile at these sizes, with folders of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    class Elsewhere(type(get_profile("coco-val"))):
        cache = trained = tmp_path / "cache"
        results = tmp_path / "results"

    genuine = get_profile("coco-val")
    values = {field.name: getattr(genuine, field.name) for field in dataclasses.fields(genuine)}
    return Elsewhere(**{**values, **sizes, "data": data})


def walk(profile):
    """From a folder of photographs to trained heads, a search, and tuned towers: (pairs, model, recall, history)."""
    pairs = {
        split: Examples(load_split(profile, split), load_or_build.embeddings(profile, split))
        for split in ("train", "dev")
    }
    val = load_or_build.embeddings(profile, "val")
    model = load_or_build.heads(profile)
    recall = retrieval(
        model.project_image(val.image_embeds), model.project_text(val.text_embeds), val.owner
    )
    history = fit(model, pairs["train"], pairs["dev"], seed=profile.seed, **tuning(profile))
    return pairs, model, recall, history


def run_notebook(path, coco, cache, tmp_path, sizes, timeout=300):
    """In a copy of the repository without data/, whose table of profiles has these sizes; timeout: seconds a cell."""
    for folder in ("helpers", "assets", "scripts"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    with open(tmp_path / "helpers/config.py", "a", encoding="utf-8") as table:
        print("\n\nfrom dataclasses import replace\n\ngenuine = all_profiles", file=table)
        print(
            f"all_profiles = lambda: {{k: replace(row, **{sizes}) for k, row in genuine().items()}}",
            file=table,
        )
    (tmp_path / "notebooks").mkdir()
    copy = shutil.copy(path, tmp_path / "notebooks")
    env = {
        "CLIP_PROFILE": "coco-val",
        "CLIP_COCO_DIR": str(coco),
        "CLIP_RESULTS": str(tmp_path / "results"),
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
    }
    executed = execute(copy, cwd=tmp_path / "notebooks", env=env, timeout=timeout)
    noise = [problem for problem in problems(executed) if " bytes, over " not in problem]
    assert noise == [], (
        "photographs may weigh more, since these outputs are committed nowhere; nothing else is allowed"
    )
    said = executed.cells[[cell.cell_type for cell in executed.cells].index("code")].outputs[0].text
    assert said.startswith("profile coco-val")
    for file in (tmp_path / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert (file.stem, result["profile"]) == (path.name[:2], "coco-val")
        assert all(np.isfinite(metric["mean"]) for metric in result["metrics"].values())
