"""What tests of `coco-val` share: a hub cache of random weights, and the way to tuned towers."""

import dataclasses
import json
import shutil

import numpy as np
from huggingface_hub import constants

from helpers import load_or_build
from helpers.config import ROOT, get_profile
from helpers.data import Examples, load_split
from helpers.evaluation import retrieval
from helpers.storage import hub
from helpers.training import fit
from scripts.run_notebooks import execute, problems
from tests.fake_hub import published, write_cache

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FEW = {"train_images": 24, "dev_images": 8, "val_images": 8, "batch_size": 8}
FEW |= {"head_epochs": 2, "tune_epochs": 1, "seeds": 1}
SIZES_OF = """

from dataclasses import replace

genuine = all_profiles
all_profiles = lambda: {{name: replace(row, **{sizes}) for name, row in genuine().items()}}
"""


def hub_cache(folder, **shape):
    """The hub's cache after a download: the published files' names, random weights."""
    write_cache(folder, published((hub.minilm() / "vocab.txt").read_bytes(), **shape))
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
    """From photographs to trained heads, a search, and tuned towers.

    Returns the towers before tuning, the examples by split, the recall and fit's history.
    """
    before = [[p.clone() for p in t.parameters()] for t in load_or_build.towers(profile)]
    examples = {
        split: Examples(load_split(profile, split), load_or_build.embeddings(profile, split))
        for split in ("train", "dev")
    }
    val = load_or_build.embeddings(profile, "val")
    model = load_or_build.heads(profile)
    images, texts = model.project_image(val.image_embeds), model.project_text(val.text_embeds)
    recall = retrieval(images, texts, val.owner)
    settings = load_or_build.tuning(profile)
    history = fit(model, examples["train"], examples["dev"], seed=0, **settings)
    assert 0 <= recall["text_to_image/recall@1"] <= recall["text_to_image/recall@10"] <= 1
    assert all(np.isfinite(row["dev_loss"]) for row in history)
    assert not set(examples["train"].image_ids) & set(examples["dev"].image_ids)
    return before, examples, recall, history


def run_notebook(path, coco, cache, tmp_path, sizes, timeout=300):
    """In a copy of the repository without data/, with these sizes; timeout: seconds a cell."""
    without = shutil.ignore_patterns("__pycache__")
    for folder in ("helpers", "assets", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=without)
    with open(tmp_path / "helpers/config.py", "a", encoding="utf-8") as table:
        table.write(SIZES_OF.format(sizes=sizes))
    (tmp_path / "notebooks").mkdir()
    copy = shutil.copy(path, tmp_path / "notebooks")
    results = tmp_path / "results"
    env = {"CLIP_PROFILE": "coco-val", "CLIP_COCO_DIR": str(coco), "CLIP_RESULTS": str(results)}
    env |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    executed = execute(copy, cwd=tmp_path / "notebooks", env=env, timeout=timeout)
    # Photographs may weigh more, since these outputs are committed nowhere.
    assert [problem for problem in problems(executed) if " bytes, over " not in problem] == []
    first = next(cell for cell in executed.cells if cell.cell_type == "code")
    assert first.outputs[0].text.startswith("profile coco-val")
    for file in results.glob("*.json"):
        result = json.loads(file.read_text())
        assert (file.stem, result["profile"]) == (path.name[:2], "coco-val")
        assert all(np.isfinite(metric["mean"]) for metric in result["metrics"].values())
