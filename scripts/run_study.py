"""The experiments too long for a notebook: `make study`, some ten hours on two cores.

A run is one job: train, average, measure, keep the row. The rows stand in `<results>/study.json`,
each with a fingerprint of its data and recipe; those whose fingerprint still holds are not run
again, so the study goes on where it was stopped. Every choice looks at dev alone.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import transformers

from helpers import evaluation, load_or_build
from helpers.config import Profile, get_profile, machine
from helpers.load_or_build import HEADS, HEADS_BATCH
from helpers.minicoco import render
from helpers.model import CLIP, average_weights, load_model, save_model
from helpers.probes import change, evaluate
from helpers.storage.checkpoints import weights_digest
from helpers.storage.files import atomic_write
from helpers.training import fit

# Tuned models: the heads they start from, whether image tower and text tower are tuned.
TUNED = {
    "finetuned": ("projection", True, True),
    "siglip-finetuned": ("siglip-projection", True, True),
    "finetuned-image": ("projection", True, False),
    "finetuned-text": ("projection", False, True),
}
# How many seeds of each; what matters most comes first.
SEEDS = {"projection": 5, "finetuned": 5, "siglip-projection": 5, "siglip-finetuned": 5}
SEEDS |= {"finetuned-image": 3, "finetuned-text": 3, "projection-10": 5}
SEEDS |= {"siglip-projection-14.3": 5}
# The same steps on a share of train's images: share, name, seeds.
GROWTH = [(1 / 15, "projection", 5), (1 / 15, "finetuned", 2)]
GROWTH += [(1 / 4, "projection", 5), (1 / 4, "finetuned", 2)]
ALPHAS = (0.0, 0.3, 0.5, 0.7, 1.0)  # shares of the tuned weights in an average
DECLARED = ("text_to_image/recall@1", "image_to_text/recall@1")


def jobs(profile: Profile) -> list[tuple[str, float, int]]:
    """Every run, in the order in which they are done: (setting, share of train's images, seed)."""
    most = 2 * profile.seeds - 1  # five where notebooks train three, one where they train one
    rows = [(name, 1, seed) for name in SEEDS for seed in range(min(SEEDS[name], most))]
    for share, name, seeds in GROWTH:
        rows += [(name, share, seed) for seed in range(min(seeds, most))]
    return rows


def recipe(profile: Profile, name: str, share: float = 1) -> dict:
    """The arguments with which `fit` trains a setting: as many steps, whatever the share."""
    if name in HEADS:
        settings = {"epochs": profile.head_epochs, "batch_size": HEADS_BATCH, "lr": HEADS[name][1]}
    else:
        settings = load_or_build.tuning(profile, *TUNED[name][1:])
    images = len(load_or_build.data(profile, "train"))
    whole, part = (n // min(n, settings["batch_size"]) for n in (images, round(share * images)))
    epochs = round(settings["epochs"] * whole / part)
    return settings | {"epochs": epochs} | ({"dev_per_epoch": 1} if share < 1 else {})


def fingerprint(profile: Profile, name: str, share: float = 1) -> str:
    """Changes with the captions, the pretrained towers and the recipe of a run and of its start."""
    towers = [weights_digest(tower) for tower in load_or_build.towers(profile)]
    splits = [load_or_build.data(profile, split) for split in ("train", "dev", "val")]
    data = [hashlib.sha256(split.annotation_file.read_bytes()).hexdigest() for split in splits]
    content = [towers, data, name, share, recipe(profile, name, share), ALPHAS, HEADS.get(name)]
    if name in TUNED:
        content.append(fingerprint(profile, TUNED[name][0], share))
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def trained(profile: Profile, name: str, seed: int, share: float = 1) -> tuple[CLIP, list[dict]]:
    """The model of a run and the history of its training, from the cache where it is there."""
    towers = load_or_build.towers(profile)
    folder = profile.cache / "study" / f"{name}-{seed}-{fingerprint(profile, name, share)}"
    if (folder / "heads.json").is_file():
        model, meta = load_model(folder, *towers)
        return model, meta["history"]
    train, dev = (load_or_build.examples(profile, split) for split in ("train", "dev"))
    if share < 1:
        train = load_or_build.first(train, round(share * len(train)))
    if name in HEADS:
        model = load_or_build.fresh_heads(profile, name, seed)
    else:
        model = copy.deepcopy(trained(profile, TUNED[name][0], seed, share)[0])
        model = load_or_build.for_batches_of(model, profile.batch_size)
        dev = load_or_build.first(dev, load_or_build.DEV_LOOKED_AT)
    checkpoints = folder.with_name(f"{folder.name}.checkpoints")
    settings = recipe(profile, name, share) | {"checkpoints": checkpoints, "save_every": 40}
    history = fit(model, train, dev, seed=seed, **settings)
    if history.interrupted:
        raise KeyboardInterrupt
    tuned = [side for side in ("image_tower", "text_tower") if settings.get(f"{side[:-6]}_lr")]
    save_model(model.cpu(), folder, {"seed": seed, "setting": name, "history": history}, tuned)
    shutil.rmtree(checkpoints)
    return model.eval(), history


def one_run(profile: Profile, name: str, seed: int, share: float) -> dict:
    """Train one setting with one seed, average, measure: a row of the study."""
    print(f"== {name}, seed {seed}, {share:.2g} of the images", flush=True)
    began = time.perf_counter()
    model, history = trained(profile, name, seed, share)
    averages = {1.0: model}
    if name in TUNED:
        before = trained(profile, TUNED[name][0], seed, share)[0]
        averages = {alpha: average_weights(before, model, alpha) for alpha in ALPHAS if alpha > 0}
    measured = {
        str(alpha): {split: evaluate(profile, average, split) for split in ("dev", "val")}
        for alpha, average in averages.items()
    }
    if name in HEADS:  # of runs so short nobody asks for single losses
        history = [{k: v for k, v in row.items() if k != "losses"} for row in history]
    return {
        "name": name,
        "seed": seed,
        "share": share,
        "fingerprint": fingerprint(profile, name, share),
        "machine": machine(),
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "history": history,
        "measured": measured,
    }


def tables_of(runs: list[dict], alpha: float, split: str) -> list[dict]:
    """What was measured of runs averaged with alpha, a table a seed."""
    return [row["measured"][str(float(alpha))][split] for row in runs]


def choose_alpha(dev: dict[float, list[dict]]) -> tuple[float, float]:
    """The share of the tuned weights, by a rule fixed before the runs: (alpha, its recall).

    dev: what was measured there, a table a seed, by alpha; 0 stands for what was not tuned. Of all
    alphas the one with the largest recall@1, mean of both ways and of all seeds, among those that
    lose at most one point on each probe.
    """
    means = {
        alpha: {name: np.mean([table[name]["value"] for table in tables]) for name in tables[0]}
        for alpha, tables in dev.items()
    }
    probes = [name for name in means[0.0] if name.endswith(("/top1", "/map"))]
    recalls = {
        alpha: float(np.mean([mean[name] for name in DECLARED]))
        for alpha, mean in means.items()
        if all(mean[name] >= means[0.0][name] - 0.01 for name in probes)
    }
    return max(recalls.items(), key=lambda item: item[1])


def summarise(profile: Profile, rows: list[dict]) -> tuple[dict, dict]:
    """What `<results>/study.json` says of the rows: (metrics by name, the alpha of each loss).

    A setting is reported when all its seeds are in: each metric on val with mean and deviation over
    seeds, chance, what is attainable, and, where hits are known, how it differs from the runs that
    were not tuned.
    """
    val = load_or_build.data(profile, "val")
    queries = {"text_to_image": val.all_captions()[1], "image_to_text": np.arange(len(val))}
    scenes_known = (profile.data / f"annotations/scenes_{profile.val_folder}.json").is_file()
    attainable = {}
    if scenes_known:
        attainable = render.attainable_recall(profile.data, profile.val_folder)["all"]
    alphas, metrics = {}, {}
    rows = sorted(rows, key=lambda row: row["seed"])
    for (name, share), seeds in Counter(job[:2] for job in jobs(profile)).items():
        runs = [row for row in rows if (row["name"], row["share"]) == (name, share)]
        if len(runs) < seeds:
            continue
        label = name if share == 1 else f"{name}@{round(share * profile.train_images)}"
        tables, before = {label: tables_of(runs, 1, "val")}, None
        if name in TUNED:
            start = TUNED[name][0]
            same = [row for row in rows if (row["name"], row["share"]) == (start, share)]
            same = same[: len(runs)]  # the same seeds
            before = tables_of(same, 1, "val")
            if name.endswith("finetuned") and share == 1:
                dev = {alpha: tables_of(runs, alpha, "dev") for alpha in ALPHAS if alpha}
                alphas[start], _ = choose_alpha(dev | {0.0: tables_of(same, 1, "dev")})
            alpha = alphas[start]
            tables[f"{label}-averaged"] = tables_of(runs, alpha, "val") if alpha else before
        for model, measured in tables.items():
            for metric in measured[0]:
                entry = over_runs([table[metric] for table in measured])
                if metric in attainable:
                    entry["attainable"] = attainable[metric]
                if before is not None and "hits" in measured[0][metric]:
                    images = queries.get(metric.split("/")[0], np.arange(entry.get("n", 0)))
                    entry["change"] = change(measured, before, metric, images)
                metrics[f"{model}/{metric}"] = entry
    return metrics, alphas


def over_runs(cells: list[dict]) -> dict:
    """One metric over seeds: mean, deviation, values, and what the cells say of chance and n."""
    values = [cell["value"] for cell in cells]
    entry = {"mean": float(np.mean(values))}
    entry["std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    entry |= {"seeds": len(values), "values": values}
    entry |= {key: cells[0][key] for key in ("chance", "n") if cells[0].get(key) is not None}
    if "n" in entry:
        entry["interval"] = evaluation.wilson(entry["mean"] * entry["n"], entry["n"])
    return entry


def study(profile: Profile) -> Path:
    """Run what is missing and write `<results>/study.json` after every run."""
    path = Path(profile.results, "study.json")
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    holding = {
        (name, share): fingerprint(profile, name, share)
        for name, share in dict.fromkeys(job[:2] for job in jobs(profile))
    }
    rows = [row for row in rows if holding.get((row["name"], row["share"])) == row["fingerprint"]]
    done = {(row["name"], row["share"], row["seed"]) for row in rows}
    for name, share, seed in jobs(profile):
        if (name, share, seed) not in done:
            rows.append(one_run(profile, name, seed, share))
            alphas = write_results(profile, rows)
            if (name, share) == ("finetuned", 1) and "projection" in alphas:
                keep_best(profile, rows, alphas["projection"])
    write_results(profile, rows)
    return path


def keep_best(profile: Profile, rows: list[dict], alpha: float) -> None:
    """Put the averaged model that is best on dev where `load_or_build.finetuned` looks.

    Where it lies there already nothing is done: its run may have been on another machine.
    """
    runs = [row for row in rows if (row["name"], row["share"]) == ("finetuned", 1)]
    if alpha == 0:
        return
    tables = tables_of(runs, alpha, "dev")
    recalls = [sum(table[name]["value"] for name in DECLARED) for table in tables]
    seed = runs[int(np.argmax(recalls))]["seed"]
    run_info = {"seed": seed, "alpha": alpha, "fingerprint": fingerprint(profile, "finetuned")}
    kept = Path(profile.trained, "finetuned", "heads.json")
    if kept.is_file() and run_info.items() <= json.loads(kept.read_text())["meta"].items():
        return
    pair = [trained(profile, name, seed)[0] for name in ("projection", "finetuned")]
    load_or_build.save_finetuned(profile, average_weights(*pair, alpha), run_info)


def write_results(profile: Profile, rows: list[dict]) -> dict[str, float]:
    """Write `<results>/study.json`; returns the alpha of each loss."""
    metrics, alphas = summarise(profile, rows)
    minutes = round(sum(row["minutes"] for row in rows), 1)
    versions = {package.__name__: package.__version__ for package in (torch, transformers)}
    versions["python"] = platform.python_version()
    content = {"notebook": "study", "profile": profile.name, "machine": machine()}
    content |= {"minutes": minutes, "seconds": round(60 * minutes), "versions": versions}
    content |= {"alphas": alphas, "metrics": metrics, "rows": rows}
    path = Path(profile.results, "study.json")
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    return alphas


if __name__ == "__main__":
    print(f"Written: {study(get_profile())}")
