"""Load or build what a notebook needs from earlier ones: data, towers, embeddings, trained heads.

Every function says what it does when it takes longer than a moment, and does nothing twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save

from helpers.config import HEADS_BATCH, ROOT, Profile, machine, pick_device
from helpers.data import CaptionedImages, Examples, load_split
from helpers.encoders import ImageTower, TextTower, load_towers
from helpers.features import Embeddings, embed_images, embed_texts, extract_embeddings
from helpers.minicoco import render
from helpers.minicoco.scenes import draw
from helpers.model import CLIP, load_heads, save_heads

# Handed on: notebooks find it here.
from helpers.published_clip import published_clip as published_clip
from helpers.storage import own_data
from helpers.storage.checkpoints import weights_digest
from helpers.storage.download import download
from helpers.storage.files import atomic_write
from helpers.training import History, fit

# Not kept beside the heads: long, or different at every run.
UNSTEADY = ("losses", "seconds", "images_per_second")
# At step 0 this bias neither pulls nor pushes: notebook 05.
CALM = {"logit_bias": -math.log(HEADS_BATCH - 1)}
TEN = {"logit_scale": math.log(10)}  # where the SigLIP paper starts; CLIP starts at 14.3
# Heads by their name in the results: where factor and bias start, and the peak rate. Each loss from
# both factors, so that they are compared on equal terms.
HEADS = {
    "projection": ({}, 1e-3),
    "siglip-projection": (CALM | TEN, 1e-3),
    "projection-10": (TEN, 1e-3),
    "siglip-projection-14.3": (CALM, 1e-3),
}
# The share of the tuned weights in an average with these heads: `choose_alpha` of the study.
ALPHA = {"projection": 0.3, "siglip-projection": 0.7}
# Images of dev while towers are tuned: several looks an epoch at all would take as long as it.
DEV_LOOKED_AT = 500


def data(profile: Profile, split: str) -> CaptionedImages:
    """Images and captions of a split ("train", "dev" or "val"), rendered or downloaded first."""
    bring(profile)
    return load_split(profile, split)


def bring(profile: Profile) -> None:
    """Renders, checks or downloads the data of a profile, unless they are there."""
    if profile.rendered:
        if not (profile.data / "annotations").is_dir():
            print("First the images are drawn, then their features are extracted, where they are "
                  "needed: once,\nwith profile mini about seven minutes on two cores.")  # fmt: skip
        render.render(profile)
    elif profile.source:
        if own_data.prepare(profile, lambda: towers(profile)[1]):
            announce(profile)
    else:
        download(profile)


def announce(profile: Profile) -> None:
    """Says how a reader's pictures are split, and how long their features will take."""
    splits = {split: load_split(profile, split) for split in ("train", "dev", "val")}
    sizes = ", ".join(f"{len(images)} {split}" for split, images in splits.items())
    print(f"{profile.source.name}: {sizes}.")
    if profile.shared_captions:
        print("Most captions belong to several pictures. In training, equal ones are positives of "
              "each other;\nin dev and val no two pictures share one.")  # fmt: skip
    if profile.image_model == "assets/tiny-vit":
        print("tiny-vit has seen drawings and nothing else. For photographs choose the profile "
              "coco-val,\nwhose towers are a ViT-B/16 and BERT-base.")  # fmt: skip
    few = splits["train"].subset(splits["train"].image_ids[:32])
    began = time.perf_counter()
    embed_images(towers(profile)[0], few)
    embed_texts(towers(profile)[1], few.all_captions()[0])
    count = sum(map(len, splits.values()))
    minutes = (time.perf_counter() - began) / len(few) * count / 60
    print(f"By one timed batch, extracting their features takes {minutes:.1f} minutes here, once.")


def gallery(profile: Profile, count: int) -> tuple[list[Image.Image], list[str]]:
    """The first images of val, each with its most detailed caption.

    Where MiniCOCO is not on disk yet, they are drawn on the spot.
    """
    if profile.rendered and not (profile.data / "annotations").is_dir():
        count = min(count, profile.val_images)
        scenes = [render.scene_of("val2017", i, profile.seed) for i in range(count)]
        captions = [
            render.captions_of("val2017", i, profile.seed, scene)[0][0]
            for i, scene in enumerate(scenes)
        ]
        return [draw(scene)[0] for scene in scenes], captions
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
    images = data(profile, split)
    return extract_embeddings(*towers(profile), images, profile.cache, profile.batch_size)


def examples(profile: Profile, split: str) -> Examples:
    """The images of a split with their captions and frozen features, to train on."""
    return Examples(data(profile, split), embeddings(profile, split))


def first(part: Examples, count: int) -> Examples:
    """The first `count` images of a split, with their captions and frozen features."""
    images, known = part.images.subset(part.image_ids[:count]), part.embeds
    rows = (known.owner < count).nonzero().flatten()
    captions = [known.captions[row] for row in rows.tolist()]
    features = known.image_embeds[:count], known.text_embeds[rows], known.owner[rows]
    features = *features, images.image_ids, captions, known.shared_captions
    return Examples(images, Embeddings(*features))


def fresh_heads(profile: Profile, name: str, seed: int) -> CLIP:
    """A model of HEADS as it starts."""
    torch.manual_seed(seed)
    pair = towers(profile)
    return CLIP(pair[0].dim, pair[1].dim, profile.embed_dim, *pair, **HEADS[name][0])


def for_batches_of(model: CLIP, batch_size: int) -> CLIP:
    """Trained heads for smaller batches: with fewer pairs to say no to, a bias is higher."""
    if model.logit_bias is not None:
        model.logit_bias.data += math.log((HEADS_BATCH - 1) / (batch_size - 1))
    return model


def heads(profile: Profile, seed: int | None = None, rebuild: bool = False) -> CLIP:
    """The towers with projection heads trained over them, in evaluation mode on the best device.

    They are kept in `profile.trained`, and trained where they are missing, were made of something
    else, or with `rebuild`. `.history` holds the rows of their training. Heads whose training was
    interrupted are not kept: `rebuild` returns them as they are, else it is a KeyboardInterrupt.
    """
    seed = profile.seed if seed is None else seed
    made = made_of(profile)
    folder = beside(profile, Path("heads", f"seed-{seed}"), made)
    if not rebuild and (folder / "heads.json").is_file():
        model, meta = load_heads(folder, *towers(profile))
        model.history = History(meta["history"])
        return model.to(pick_device())
    print(f"Training projection heads, seed {seed}: once, then they are loaded.")
    train, dev = embeddings(profile, "train"), embeddings(profile, "dev")
    model = fresh_heads(profile, "projection", seed)
    history = fit(model, train, dev, seed=seed, **heads_training(profile, "projection"))
    model.history = history
    if history.interrupted:
        print(f"The training of seed {seed} was interrupted: its heads are not kept.")
        # Whoever needs finished heads cannot go on with these.
        if not rebuild:
            raise KeyboardInterrupt
        return model.eval()
    best = min(history, key=lambda row: row["dev_loss"])
    rows = [{k: v for k, v in row.items() if k not in UNSTEADY} for row in history]
    run_info = {"profile": profile.name, "seed": seed, "epoch": best["epoch"], "history": rows}
    save_heads(model, folder, made | run_info)
    return model.eval()


def made_of(profile: Profile, tuned: bool = False) -> dict[str, str]:
    """Digests of all that a profile's heads, or its tuned model, come from, besides the seed."""
    source = [profile.train_images, profile.dev_images]
    if profile.rendered:
        source = [render.edition(profile)]
    else:
        bring(profile)
        folders = profile.train_folder, profile.dev_folder
        names = [f"annotations/captions_{folder}.json" for folder in folders]
        for name in ["stamp"] if profile.source else names:
            source.append(hashlib.sha256(Path(profile.data, name).read_bytes()).hexdigest())
    recipe = [profile.embed_dim, profile.max_length, profile.head_epochs, HEADS_BATCH]
    recipe += [HEADS["projection"], tuning(profile) if tuned else None]
    made = dict(zip(("image_tower", "text_tower"), map(weights_digest, towers(profile))))
    return made | {"data": digest_of(source), "recipe": digest_of(recipe)}


def digest_of(content) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def beside(profile: Profile, name: Path, made: dict) -> Path:
    """Where the model of this name is kept that is made of this; what is there stays there."""
    folder = Path(profile.trained, name)
    if (folder / "heads.json").is_file() and not made.items() <= load_heads(folder)[1].items():
        return Path(profile.cache, f"made-of-{digest_of(made)[:12]}", name)
    return folder


def save_finetuned(profile: Profile, model: CLIP, run_info: dict) -> Path:
    """Keep a fine-tuned model where `finetuned` finds it, small enough to be committed.

    Beside the heads only the weights that differ from the pretrained towers', in half precision.
    """
    before = dict(zip(("image_tower", "text_tower"), towers(profile), strict=True))
    changed = {}
    for side, tower in before.items():
        for name, weight in getattr(model, side).state_dict().items():
            if not weight.cpu().equal(tower.state_dict()[name].cpu()):
                changed[f"{side}.{name}"] = weight.cpu().half()
    made = made_of(profile, tuned=True)
    folder = beside(profile, Path("finetuned"), made)
    atomic_write(folder / "towers.safetensors", save(changed))
    save_heads(model, folder, made | run_info)
    return folder


def finetuned(profile: Profile) -> CLIP | None:
    """The fine-tuned model in `profile.trained`, evaluating on the best device; None without one.

    None, too, where it was made of other data, towers or settings than the profile's.
    """
    made = made_of(profile, tuned=True)
    folder = beside(profile, Path("finetuned"), made)
    if not (folder / "heads.json").is_file():
        if Path(profile.trained, "finetuned").is_dir():
            print("The tuned model that is there was made of other data, towers or settings: left "
                  "aside.\npython -m scripts.train makes one.")  # fmt: skip
        return None
    model, _ = load_heads(folder, *copy.deepcopy(towers(profile)))
    model.load_state_dict(load_file(folder / "towers.safetensors"), strict=False)
    return model.to(pick_device())


def models(profile: Profile) -> dict[str, list[CLIP]]:
    """What there is to evaluate, by name as in the results, one model a seed."""
    seeds = range(profile.seed, profile.seed + profile.seeds)
    by_name = {"projection": [heads(profile, seed) for seed in seeds]}
    tuned = finetuned(profile)
    return by_name if tuned is None else {**by_name, "finetuned-averaged": [tuned]}


def save_results(
    profile: Profile, notebook: str, metrics: dict, seconds: float, histories=()
) -> Path | None:
    """Write what a notebook measured to `profile.results / <notebook>.json`; returns the path.

    histories: those of the trainings that the metrics depend on. Where one was interrupted, nothing
    is written, and None returned.
    """
    if any(history.interrupted for history in histories):
        print(
            f"Nothing written to {notebook}.json: a training was interrupted. Run its cell again."
        )
        return None
    content = {"notebook": notebook, "profile": profile.name, "machine": machine()}
    content |= {"seconds": round(seconds, 1), "metrics": metrics}
    path = Path(profile.results, f"{notebook}.json")
    atomic_write(path, json.dumps(content, indent=1) + "\n")
    return path


def study(profile: Profile) -> dict:
    """What `make study` has measured of a profile, without rows where it never ran."""
    for folder in (profile.results, ROOT / "data" / "results"):
        path = Path(folder, "study.json")
        content = json.loads(path.read_text()) if path.is_file() else {}
        if content.get("profile") == profile.name:
            return content
    return {"metrics": {}, "rows": [], "alphas": {}}


def over_seeds(
    runs: list[dict], attainable: dict | None = None, chance: dict | None = None, prefix: str = ""
) -> dict:
    """Mean and standard deviation of each metric over runs (one dict a seed).

    Chance, and what is attainable, stand beside those that have them.
    """
    result = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs], float)
        row = {"mean": values.mean(), "std": values.std(ddof=1) if len(values) > 1 else 0.0}
        row = {key: round(float(value), 5) for key, value in row.items()} | {"seeds": len(values)}
        for key, known in (("chance", chance), ("attainable", attainable)):
            if known and name in known:
                row[key] = round(float(known[name]), 5)
        result[prefix + name] = row
    return result


def heads_training(profile: Profile, name: str) -> dict:
    """The settings with which `fit` trains heads of HEADS until dev no longer gets better."""
    patience = max(10, profile.head_epochs // 10)
    return {"epochs": profile.head_epochs, "lr": HEADS[name][1], "patience": patience}


def tuning(profile, image=True, text=True):
    """The settings with which `fit` tunes one or both towers of a profile, from trained heads."""
    rates = {"lr": 3e-4, "image_lr": profile.image_lr * image, "text_lr": profile.text_lr * text}
    sizes = {"epochs": profile.tune_epochs, "batch_size": profile.batch_size}
    if image:
        sizes |= {"patch_keep_ratio": 0.5, "unmasked": 0.2}
    return {**rates, **sizes, "dev_per_epoch": 4, "select": "dev_recall@1"}
