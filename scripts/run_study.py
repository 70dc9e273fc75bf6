"""The experiments too long for a notebook, run once: `make study`. It goes on where it was killed.

Four settings of fine-tuning (nothing, either tower or both unlocked) and SigLIP against InfoNCE on
both towers: the same data order, pooling, batch size and seeds for all. Everything is measured on
val once, when a run has ended.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from helpers import evaluation, load_or_build
from helpers.config import Profile, get_profile, machine
from helpers.features import embed_images, embed_texts
from helpers.minicoco import render
from helpers.minicoco.sprites import COLOURS
from helpers.model import CLIP, SIGLIP_START, load_model, save_model
from helpers.probes import Instances, load_compositional, load_probes
from helpers.storage.files import atomic_write, replace_when_complete
from helpers.training import fit

# Name in the results: (where it starts, is the image tower tuned, is the text tower tuned).
SETTINGS = {
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
    "novel_combinations": "zero_shot_pairs",
}


def classes(probe):
    """The classes of a probe's images and each image's own among them: (names [C], labels [n])."""
    own, labels = np.unique(probe.labels, return_inverse=True)
    names = [probe.names[c] for c in own]
    if probe.colours is None:
        return names, labels
    # Every colour with each category: both must be right.
    colours = list(COLOURS)
    colour_labels = np.array([colours.index(colour) for colour in probe.colours])
    names = [f"{colour} {name}" for name in names for colour in colours]
    return names, labels * len(colours) + colour_labels


@torch.no_grad()
def evaluate(profile: Profile, model: CLIP) -> dict[str, dict]:
    """All that the course reports of a model: {"text_to_image/recall@1": {"value", "chance"}, …}.

    Where a value is a share of n trials, "n" stands beside it.
    """
    val = load_or_build.data(profile, "val")
    device, batch_size = model.logit_scale.device, profile.batch_size

    def images(those):
        features = embed_images(model.image_tower, those, batch_size)
        return model.project_image(features.to(device)).cpu()

    def texts(those):
        features = embed_texts(model.text_tower, those, batch_size)
        return model.project_text(features.to(device)).cpu()

    captions, owner = val.all_captions()
    image_embeds, chance = images(val), evaluation.retrieval_chance(owner)
    recalls = evaluation.retrieval(image_embeds, texts(captions), owner)
    metrics = {name: {"value": v, "chance": chance.get(name)} for name, v in recalls.items()}
    for name, probe in load_probes(profile).items():
        names, labels = classes(probe)
        result = evaluation.classify(images(probe), evaluation.class_embeds(texts, names), labels)
        for top in ("top1", "top5"):
            row = {"value": result[top], "chance": result[f"{top}_chance"], "n": result["n"]}
            metrics[f"{TASKS[name]}/{top}"] = row
    instances = Instances(profile.data, f"instances_{profile.val_folder}.json")
    labels = instances.labels(val.image_ids)
    scores = image_embeds @ evaluation.class_embeds(texts, instances.names).T
    prevalence = float(labels[:, labels.any(axis=0)].mean())
    precision = evaluation.mean_average_precision(scores, labels)
    metrics["classification/map"] = {"value": precision, "chance": prevalence}
    triples = load_compositional(profile).values()
    if triples:
        embeds = [(images(probe), texts(true), texts(foils)) for probe, true, foils in triples]
        result = evaluation.compositional(*(torch.cat(parts) for parts in zip(*embeds)))
        row = {"value": result["accuracy"], "chance": result["chance"], "n": result["n"]}
        metrics["compositional/accuracy"] = row
    return metrics


def start_of(profile: Profile, name: str, seed: int, folder: Path) -> tuple[CLIP, dict]:
    """The model with which a setting starts, and the arguments with which `fit` trains it."""
    start, *tuned = SETTINGS[name]
    towers = load_or_build.towers(profile)
    if start is not None:
        # Copied, since its towers are shared with other models.
        model = copy.deepcopy(load_model(folder / f"{start}-{seed}", *towers)[0])
        return model, load_or_build.tuning(profile, *tuned)
    torch.manual_seed(seed)
    batch_size = min(512, profile.train_images or 512)
    # Step 0 of SigLIP neither pulls nor pushes: notebook 05, "Where bias and factor start".
    calm = SIGLIP_START | {"logit_bias": -math.log(batch_size - 1)}
    dims = towers[0].dim, towers[1].dim, profile.embed_dim
    model = CLIP(*dims, *towers, **(calm if name.startswith("siglip") else {}))
    return model, {"epochs": profile.head_epochs, "batch_size": batch_size, "patience": 10}


def one_run(profile: Profile, name: str, seed: int, folder: Path) -> dict:
    """Train one setting with one seed, keep the model in `folder`, measure it."""
    print(f"== {name}, seed {seed}", flush=True)
    model, settings = start_of(profile, name, seed, folder)
    train, dev = (load_or_build.examples(profile, split) for split in ("train", "dev"))
    checkpoints = folder / f"{name}-{seed}.checkpoints"
    settings |= {"seed": seed, "checkpoints": checkpoints, "save_every": 20}
    history = fit(model, train, dev, **settings)
    if history.interrupted:
        raise KeyboardInterrupt
    towers = zip(("image_tower", "text_tower"), SETTINGS[name][1:], strict=True)
    meta = {"profile": profile.name, "setting": name, "seed": seed}
    tuned = [tower for tower, yes in towers if yes]
    save_model(model.cpu(), folder / f"{name}-{seed}", meta, tuned)
    began = time.perf_counter()
    row = {"seed": seed, "metrics": evaluate(profile, model.eval()), "history": history}
    # By the speed of the median step, so that a machine that was busy for a while counts nothing.
    row["seconds"] = round(sum(len(train) / epoch["images_per_second"] for epoch in history), 1)
    seconds = sum(epoch["seconds"] for epoch in history) + time.perf_counter() - began
    row["minutes"] = round(seconds / 60, 2)
    shutil.rmtree(checkpoints)
    return row


def summarise(profile: Profile, runs: dict[str, list[dict]]) -> dict:
    """Mean and deviation over seeds of every metric, beside its chance, ceiling and interval."""
    scenes_known = (profile.data / f"annotations/scenes_{profile.val_folder}.json").is_file()
    ceiling = render.ceilings(profile.data, profile.val_folder)["all"] if scenes_known else {}
    metrics = {}
    for name, rows in runs.items():
        for metric, first in rows[0]["metrics"].items() if rows else ():
            values = [row["metrics"][metric]["value"] for row in rows]
            entry = {"mean": float(np.mean(values))}
            entry["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            entry |= {"seeds": len(values), "values": values}
            entry |= {key: first[key] for key in ("chance", "n") if first.get(key) is not None}
            if metric in ceiling:
                entry["ceiling"] = ceiling[metric]
            if "n" in first:
                entry["interval"] = evaluation.wilson(entry["mean"] * first["n"], first["n"])
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
    """Put the run of `name` that is best on dev where `load_or_build.finetuned` looks."""
    paths = sorted((profile.cache / "study").glob(f"{name}-*.json"))
    rows = [json.loads(path.read_text()) for path in paths]
    best = max(rows, key=lambda row: max(epoch["dev_recall@1"] for epoch in row["history"]))
    destination = profile.trained / "finetuned"
    with replace_when_complete(destination) as partial:
        shutil.copytree(profile.cache / "study" / f"{name}-{best['seed']}", partial)
    return destination


def write_results(profile: Profile, runs: dict) -> Path:
    """Write `<results>/study.json`."""
    minutes = round(sum(row["minutes"] for rows in runs.values() for row in rows), 1)
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    versions["python"] = platform.python_version()
    content = {"notebook": "study", "profile": profile.name, "machine": machine()}
    content |= {"minutes": minutes, "seconds": round(60 * minutes), "versions": versions}
    content |= {"metrics": summarise(profile, runs), "runs": runs}
    path = Path(profile.results, "study.json")
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(f"Written: {study(get_profile())}")
