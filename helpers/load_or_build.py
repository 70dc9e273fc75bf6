"""Load or build what a notebook needs from earlier ones: data, towers, embeddings, trained heads.

Every function says what it does when it takes longer than a moment, and does nothing twice.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.config import Profile, machine, pick_device
from helpers.data import CaptionedImages, load_split
from helpers.encoders import ImageTower, TextTower, load_towers, weights_digest
from helpers.features import Embeddings, extract_embeddings
from helpers.minicoco import render
from helpers.minicoco.scenes import draw
from helpers.model import CLIP, load_heads, load_model, save_heads
from helpers.storage.download import download
from helpers.storage.files import atomic_write
from helpers.training import fit

UNSTEADY = (
    "losses",
    "seconds",
    "images_per_second",
)  # not kept beside the heads: long, or other at every run


def data(profile: Profile, split: str) -> CaptionedImages:
    """Pictures and captions of a split ("train", "dev" or "val"); MiniCOCO is rendered, COCO fetched where missing."""
    if profile.rendered:
        render.render(profile)
    else:
        download(profile)
    return load_split(profile, split)


def gallery(profile: Profile, count: int) -> tuple[list[Image.Image], list[str]]:
    """The first pictures of val, each with its most detailed caption; drawn on the spot where there is no data yet."""
    if profile.rendered and not (profile.data / "annotations").is_dir():
        scenes = [render.scene_of("val2017", i, profile.seed) for i in range(count)]
        told = [
            render.five_captions("val2017", i, profile.seed, scene)
            for i, scene in enumerate(scenes)
        ]
        return [draw(scene)[0] for scene in scenes], [captions[0][0] for captions in told]
    images = data(profile, "val")
    rows = range(min(count, len(images)))
    return [images.image(i) for i in rows], [images.captions(i)[0] for i in rows]


@lru_cache(1)
def towers(profile: Profile) -> tuple[ImageTower, TextTower]:
    """The profile's two pretrained towers, frozen, loaded once."""
    pair = load_towers(profile)
    for tower in pair:
        tower.requires_grad_(False)
    return pair


def embeddings(profile: Profile, split: str) -> Embeddings:
    """The frozen features of a split, from the cache where they are there."""
    return extract_embeddings(
        *towers(profile), data(profile, split), profile.cache, profile.batch_size
    )


def heads(profile: Profile, seed: int | None = None, rebuild: bool = False) -> CLIP:
    """The towers with projection heads trained over them, in evaluation mode on the best device.

    Kept in `profile.trained`; trained (and said) where they are missing, were made for other towers, or with `rebuild`.
    """
    seed = profile.seed if seed is None else seed
    image_tower, text_tower = towers(profile)
    made_for = {
        "image_tower": weights_digest(image_tower),
        "text_tower": weights_digest(text_tower),
    }
    folder = Path(profile.trained, "heads", f"seed-{seed}")
    if not rebuild and (folder / "heads.json").is_file():
        model, meta = load_heads(folder, image_tower, text_tower)
        if {name: meta.get(name) for name in made_for} == made_for:
            return model.to(pick_device())
    print(f"Training projection heads, seed {seed}: once, then they are loaded.")
    train, dev = embeddings(profile, "train"), embeddings(profile, "dev")
    torch.manual_seed(seed)
    model = CLIP(image_tower.dim, text_tower.dim, profile.embed_dim, image_tower, text_tower)
    history = fit(model, train, dev, epochs=profile.head_epochs, patience=10, seed=seed)
    best = min(history, key=lambda row: row["dev_loss"])
    told = [{k: v for k, v in row.items() if k not in UNSTEADY} for row in history]
    about = {"profile": profile.name, "seed": seed, "epoch": best["epoch"], "history": told}
    save_heads(model, folder, made_for | about)
    return model.eval()


def finetuned(profile: Profile) -> CLIP | None:
    """The fine-tuned model that is kept in `profile.trained`, in evaluation mode on the best device; None without one.

    mini's has a tuned image tower under the text tower of the profile, so that it is small enough to be committed.
    """
    folder = Path(profile.trained, "finetuned")
    if not (folder / "heads.json").is_file():
        return None
    return load_model(folder, *towers(profile), profile.max_length)[0].to(pick_device())


def models(profile: Profile) -> dict[str, list[CLIP]]:
    """What there is to evaluate, by name as in the results, one model a seed."""
    found = {"projection": [heads(profile, profile.seed + k) for k in range(profile.seeds)]}
    tuned = finetuned(profile)
    return found if tuned is None else {**found, "finetuned-image": [tuned]}


def save_results(profile: Profile, notebook: str, metrics: dict, seconds: float) -> Path:
    """Writes what a notebook measured to `profile.results / <notebook>.json`, atomically; returns the path."""
    path = Path(profile.results, f"{notebook}.json")
    content = {
        "notebook": notebook,
        "profile": profile.name,
        "machine": machine(),
        "seconds": round(seconds, 1),
    }
    atomic_write(path, json.dumps({**content, "metrics": metrics}, indent=1) + "\n")
    return path


def over_seeds(
    runs: list[dict], ceiling: dict | None = None, chance: dict | None = None, prefix: str = ""
) -> dict:
    """Mean and standard deviation of each metric over runs (one dict a seed), with chance and ceiling beside them."""
    result = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs], float)
        row = {
            "mean": values.mean(),
            "std": values.std(ddof=1) if len(values) > 1 else 0.0,
            "seeds": len(values),
        }
        row |= {"chance": chance[name]} if chance and name in chance else {}
        row |= {"ceiling": ceiling[name]} if ceiling and name in ceiling else {}
        result[prefix + name] = row
    rounded = {
        name: {key: round(float(value), 5) for key, value in row.items()}
        for name, row in result.items()
    }
    return {name: {**row, "seeds": len(runs)} for name, row in rounded.items()}
