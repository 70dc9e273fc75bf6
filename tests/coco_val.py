"""What tests of `coco-val` share: a hub cache of random weights, and the way to tuned towers."""

import json

import numpy as np
from huggingface_hub import constants

from helpers import load_or_build
from helpers.data import Examples, load_split
from helpers.evaluation import retrieval
from helpers.storage import hub
from helpers.training import fit
from scripts.run_notebooks import execute, problems
from tests.coco_files import elsewhere
from tests.fake_hub import published, write_cache
from tests.notebooks import copy_course

FEW = {"train_images": 16, "dev_images": 8, "val_images": 8, "batch_size": 8}
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
    return elsewhere("coco-val", tmp_path, data=data, **sizes)


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
    settings = load_or_build.tuning(profile) | {"dev_per_epoch": 1}
    history = fit(model, examples["train"], examples["dev"], seed=0, **settings)
    assert 0 <= recall["text_to_image/recall@1"] <= recall["text_to_image/recall@10"] <= 1
    assert all(np.isfinite(row["dev_loss"]) for row in history)
    assert not set(examples["train"].image_ids) & set(examples["dev"].image_ids)
    return before, examples, recall, history


def run_notebook(path, coco, cache, tmp_path, sizes, timeout=300):
    """In a copy of the repository without data/, with these sizes; timeout: seconds a cell."""
    (copy,) = copy_course(tmp_path, path)
    with open(tmp_path / "helpers/config.py", "a", encoding="utf-8") as table:
        table.write(SIZES_OF.format(sizes=sizes))
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
