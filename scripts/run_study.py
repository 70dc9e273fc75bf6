"""The experiments too long for a notebook, run once: `make study`, or python -m scripts.run_study. It goes on if killed.

Four settings of fine-tuning (nothing, either tower or both unlocked) and SigLIP against InfoNCE on both towers: the
same data order, pooling, batch size and seeds for all. Everything is measured on val once, when a run has ended.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import shutil
import time
from pathlib import Path

import accelerate
import numpy as np
import torch
import transformers

from helpers import load_or_build
from helpers.config import Profile, get_profile, machine
from helpers.evaluation import (
    class_embeds,
    classify,
    compositional,
    mean_average_precision,
    retrieval,
    retrieval_chance,
    wilson,
)
from helpers.features import embed_images, embed_texts
from helpers.minicoco import render
from helpers.minicoco.sprites import COLOURS
from helpers.model import CLIP, SIGLIP_START, load_model, save_model
from helpers.probes import Instances, load_compositional, load_probes
from helpers.storage.files import atomic_write, replace_when_complete
from helpers.training import Examples, fit, tuning

SETTINGS = {  # name in the results: (where it starts, is the image tower tuned, is the text tower tuned)
    "projection": (None, False, False),
    "finetuned-image": ("projection", True, False),
    "finetuned-text": ("projection", False, True),
    "finetuned": ("projection", True, True),
    "siglip-projection": (None, False, False),
    "siglip": ("siglip-projection", True, True),
}
TASKS = {
    "known": "classification",
    "unseen_drawing": "classification_unseen_drawing",
    "uncaptioned": "zero_shot",
    "unseen": "zero_shot_unseen",
    "pairs": "zero_shot_pairs",
}


def classes(probe):
    """What a probe's pictures are classified among, and the position of the right one: (names [C], labels [n])."""
    own = np.unique(probe.labels)
    labels = np.searchsorted(own, probe.labels)
    if probe.colours is None:
        return [probe.names[c] for c in own], labels
    colours = list(COLOURS)  # every colour with each category: both must be right
    names = [f"{colour} {probe.names[c]}" for c in own for colour in colours]
    return names, labels * len(colours) + np.array(
        [colours.index(colour) for colour in probe.colours]
    )


def evaluate(profile: Profile, model: CLIP) -> dict[str, dict]:
    """Everything that the course reports of a model: {"text_to_image/recall@1": {"value", "chance", "n"}, …}."""
    device, val = model.logit_scale.device, load_or_build.data(profile, "val")

    @torch.no_grad()
    def images(pictures):
        return model.project_image(
            embed_images(model.image_tower, pictures, profile.batch_size).to(device)
        ).cpu()

    @torch.no_grad()
    def texts(sentences):
        return model.project_text(
            embed_texts(model.text_tower, sentences, profile.batch_size).to(device)
        ).cpu()

    captions, owner = val.all_captions()
    image_embeds, text_embeds, chance = images(val), texts(captions), retrieval_chance(owner)
    found = {}
    for name, value in retrieval(image_embeds, text_embeds, owner).items():
        found[name] = {"value": value, "chance": chance.get(name)}
    for name, probe in load_probes(profile).items():
        names, labels = classes(probe)
        result = classify(images(probe), class_embeds(texts, names), labels)
        found[f"{TASKS[name]}/top1"] = {
            "value": result["top1"],
            "chance": result["chance"],
            "n": result["n"],
        }
        found[f"{TASKS[name]}/top5"] = {
            "value": result["top5"],
            "chance": result["top5_chance"],
            "n": result["n"],
        }
    instances = Instances(profile.data, f"instances_{profile.val_folder}.json")
    shown = instances.labels(val.image_ids)
    scores = image_embeds @ class_embeds(texts, instances.names).T
    chance_map = shown[:, shown.any(axis=0)].mean()
    found["classification/map"] = {
        "value": mean_average_precision(scores, shown),
        "chance": float(chance_map),
    }
    triples = [row for rows in load_compositional(profile).values() for row in rows]
    if triples:
        paths, true, foil = zip(*triples, strict=True)
        result = compositional(images(list(paths)), texts(list(true)), texts(list(foil)))
        found["compositional/accuracy"] = {
            "value": result["accuracy"],
            "chance": 0.5,
            "n": result["n"],
        }
    return found


def one_run(profile: Profile, name: str, seed: int, folder: Path, on_epoch=None) -> dict:
    """Train one setting with one seed, keep the model in `folder`, measure it: the row of the results."""
    start, tune_image, tune_text = SETTINGS[name]
    towers = load_or_build.towers(profile)
    if start is None:
        torch.manual_seed(seed)
        dims = towers[0].dim, towers[1].dim, profile.embed_dim
        batch_size = min(512, profile.train_images or 512)
        calm = SIGLIP_START | {
            "logit_bias": -math.log(batch_size - 1)
        }  # step 0 neither pulls nor pushes: notebook 05
        model = CLIP(*dims, *towers, **(calm if name.startswith("siglip") else {}))
        settings = {
            "epochs": profile.head_epochs,
            "batch_size": batch_size,
            "patience": 10,
        }  # as load_or_build.heads
    else:
        model = copy.deepcopy(
            load_model(folder / f"{start}-{seed}", *towers)[0]
        )  # its towers are others' too
        settings = tuning(profile, tune_image, tune_text)
    splits = [
        Examples(load_or_build.data(profile, s), load_or_build.embeddings(profile, s))
        for s in ("train", "dev")
    ]
    settings |= {
        "seed": seed,
        "about": {"profile": profile.name, "setting": name},
        "on_epoch": on_epoch,
    }
    checkpoints = folder / f"{name}-{seed}.checkpoints"
    print(f"== {name}, seed {seed}", flush=True)
    history = fit(model, *splits, checkpoints=checkpoints, every=20, **settings)
    tuned = [
        tower for tower, yes in (("image_tower", tune_image), ("text_tower", tune_text)) if yes
    ]
    save_model(model.cpu(), folder / f"{name}-{seed}", settings["about"] | {"seed": seed}, tuned)
    began = time.perf_counter()
    row = {"seed": seed, "metrics": evaluate(profile, model.eval()), "history": history}
    # Training by the speed of the median step, so that a machine that was busy or asleep for a while counts nothing.
    row["seconds"] = round(sum(len(splits[0]) / epoch["images_per_second"] for epoch in history), 1)
    row["minutes"] = round(
        (sum(epoch["seconds"] for epoch in history) + time.perf_counter() - began) / 60, 2
    )
    shutil.rmtree(checkpoints)
    return row


def summarise(profile: Profile, runs: dict[str, list[dict]]) -> dict:
    """Mean and standard deviation over seeds of every metric, with chance, ceiling and interval beside them."""
    known = (profile.data / f"annotations/scenes_{profile.val_folder}.json").is_file()
    ceiling = render.ceilings(profile.data, profile.val_folder)["all"] if known else {}
    metrics = {}
    for name, rows in runs.items():
        for metric, first in rows[0]["metrics"].items() if rows else ():
            values = [row["metrics"][metric]["value"] for row in rows]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            entry = {
                "mean": float(np.mean(values)),
                "std": float(spread),
                "seeds": len(values),
                "values": values,
            }
            entry |= {key: first[key] for key in ("chance", "n") if first.get(key) is not None}
            if metric in ceiling:
                entry["ceiling"] = ceiling[metric]
            if "n" in first:
                entry["interval"] = wilson(entry["mean"] * first["n"], first["n"])
            metrics[f"{name}/{metric}"] = entry
    return metrics


def study(profile: Profile) -> Path:
    """Run what is missing and write `<results>/study.json` after every run."""
    folder, runs = profile.cache / "study", {name: [] for name in SETTINGS}
    for seed in range(profile.seed, profile.seed + profile.seeds):
        for name in SETTINGS:
            path = folder / f"{name}-{seed}.json"
            if not path.is_file():
                atomic_write(path, json.dumps(one_run(profile, name, seed, folder), indent=1))
            runs[name].append(json.loads(path.read_text()))
            write_results(profile, runs)
    keep_best(profile)
    return write_results(profile, runs)


def keep_best(profile: Profile, name: str = "finetuned-image") -> Path:
    """Put the run of `name` that is best on dev where `load_or_build.finetuned` looks: in assets/ for mini."""
    rows = [
        json.loads(path.read_text())
        for path in sorted((profile.cache / "study").glob(f"{name}-*.json"))
    ]
    best = max(rows, key=lambda row: max(epoch["dev_recall@1"] for epoch in row["history"]))
    kept = profile.trained / "finetuned"
    with replace_when_complete(kept) as partial:
        shutil.copytree(profile.cache / "study" / f"{name}-{best['seed']}", partial)
    return kept


def write_results(profile: Profile, runs: dict) -> Path:
    minutes = round(
        sum(row["minutes"] for rows in runs.values() for row in rows), 1
    )  # all included
    versions = {
        package.__name__: package.__version__ for package in (torch, transformers, accelerate, np)
    }
    content = {
        "notebook": "study",
        "profile": profile.name,
        "machine": machine(),
        "minutes": minutes,
        "seconds": round(60 * minutes),
        "versions": {"python": platform.python_version(), **versions},
        "metrics": summarise(profile, runs),
        "runs": runs,
    }
    path = Path(profile.results, "study.json")
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(f"Written: {study(get_profile())}")
