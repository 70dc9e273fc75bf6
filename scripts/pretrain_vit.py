"""How the tiny ViT in `assets/tiny-vit` was made: `python -m scripts.pretrain_vit`.

Labelled pictures of single objects, as ViT-B/16 learned from ImageNet's: what it is, what colour it has, where it
stands. No caption, no scene of MiniCOCO, none of the `UNSEEN` categories, none of the drawings kept for the probes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from helpers.config import ROOT, machine, seed_everything
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES, VARIANTS
from helpers.minicoco.scenes import Scene, Thing, draw
from helpers.minicoco.sprites import CATEGORIES, COLOURS, FLYING, UNSEEN, colours, drawings

CLASSES = [c for c in CATEGORIES if c not in UNSEEN]
SHADES = ["own", *COLOURS]
SETTINGS = [(place, hour) for place in PLACES for hour in TIMES]
SIDE, SMALL = 96, 64  # pixels of a whole picture and of a crop


def single_object(seed: int, i: int) -> tuple[np.ndarray, list[int], list[int]]:
    """Picture i of a seed, uint8 [96, 96, 3]; its labels: what, colour, where; its box: left, top, right, bottom."""
    rng = random.Random(f"pretrain/{seed}/{i}")
    category, setting = rng.choice(CLASSES), rng.randrange(len(SETTINGS))
    colour = rng.choice(colours(category))
    size = rng.uniform(0.22, 0.62)
    high = rng.uniform(0.1, 0.9) if category in FLYING else rng.uniform(0.35, 0.9)
    spot = {
        "x": rng.uniform(size / 2, 1 - size / 2),
        "y": min(max(high, size / 2), 1 - size / 2),
        "size": size,
    }
    thing = Thing(category, rng.choice(drawings(category)), colour, **spot)
    place, hour = SETTINGS[setting]
    picture, [(_, cover)] = draw(
        Scene(place, hour, rng.randrange(VARIANTS), rng.random() < 0.5, [thing]), masks=True
    )
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.BILINEAR, reducing_gap=2.0))
    rows, columns = (
        np.flatnonzero(cover.any(1)) * SIDE // SIZE,
        np.flatnonzero(cover.any(0)) * SIDE // SIZE,
    )
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return pixels, [CLASSES.index(category), SHADES.index(colour or "own"), setting], box


def single_objects(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `count` pictures of a seed: pixels uint8 [count, 3, 96, 96], labels [count, 3], boxes [count, 4]."""
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    labels, boxes = torch.empty(count, 3, dtype=torch.long), torch.empty(count, 4, dtype=torch.long)
    bar = {"desc": "drawing", "total": count, "unit": "image", "file": sys.stdout, "mininterval": 9}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        drawn = pool.map(partial(single_object, seed), range(count), chunksize=250)
        for i, (picture, label, box) in enumerate(tqdm(drawn, **bar)):
            pixels[i] = torch.from_numpy(picture).permute(2, 0, 1)
            labels[i], boxes[i] = torch.tensor(label), torch.tensor(np.array(box))
    return pixels, labels, boxes


class Classifier(nn.Module):
    """The ViT with three linear heads on its CLS token; only the ViT is kept."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        widths = {"what": len(CLASSES), "colour": len(SHADES), "where": len(SETTINGS)}
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, n) for name, n in widths.items()}
        )

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        cls = self.vit(pixels.float() / 127.5 - 1, interpolate_pos_encoding=True).last_hidden_state[
            :, 0
        ]  # [B, D]
        return [head(cls) for head in self.heads.values()]


def crop(pixels: torch.Tensor, boxes: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random window of 64 px around each object, [B, 3, 64, 64]: the object at full size in half the tokens."""
    low, high = (
        (boxes[:, 2:] - SMALL).clamp(min=0).numpy(),
        boxes[:, :2].clamp(max=SIDE - SMALL).numpy(),
    )
    corners = np.round(np.minimum(low, high) + rng.random(low.shape) * np.abs(high - low)).astype(
        int
    )
    return torch.stack([p[:, y : y + SMALL, x : x + SMALL] for p, (x, y) in zip(pixels, corners)])


def copy_paste(pixels: torch.Tensor, boxes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The box of another picture's object pasted into each picture, so that CLS learns to hold two (2012.07177)."""
    mixed = pixels.clone()
    for picture, source, (left, top, right, bottom) in zip(
        mixed, pixels[other], boxes[other].tolist()
    ):
        picture[:, top:bottom, left:right] = source[:, top:bottom, left:right]
    return mixed


def loss_of(
    logits: list[torch.Tensor], labels: torch.Tensor, pasted: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy of what, colour and where; of a pasted object's what and colour in equal parts."""
    what, colour, where = (partial(F.cross_entropy, x, label_smoothing=0.05) for x in logits)
    objects = [labels] if pasted is None else [labels, pasted]
    return sum(what(y[:, 0]) + 0.5 * colour(y[:, 1]) for y in objects) / len(
        objects
    ) + 0.25 * where(labels[:, 2])


@torch.inference_mode()
def accuracy(model: Classifier, seed: int, count: int = 3_000) -> dict[str, float]:
    """Top-1 of each head on fresh pictures of another seed: unseen combinations of place, size, colour and position."""
    model.eval()
    pixels, labels, _ = single_objects(seed, count)
    logits = [torch.cat(parts) for parts in zip(*(model(part) for part in pixels.split(128)))]
    return {
        name: (x.argmax(-1) == y).float().mean().item()
        for name, x, y in zip(model.heads, logits, labels.T)
    }


def pretrain(folder: Path, count: int = 60_000, epochs: tuple = (4.5, 1), seed: int = 0) -> dict:
    """Trains on `count` pictures, `epochs` = (crops of 64 px, then whole), and writes an HF folder with its model card.

    AdamW, batch 128, warm-up over 3 % of the steps to 1e-3, then linear to 0; every other whole batch has a second
    object pasted in. Returns the model card's numbers.
    """
    start, rng = time.time(), np.random.default_rng(seed)
    seed_everything(seed)
    pixels, labels, boxes = single_objects(seed, count)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = Classifier(config)
    decayed, rest = (
        [p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False)
    )
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    crop_steps, whole_steps = (round(e * count / 128) for e in epochs)
    steps = crop_steps + whole_steps
    warm_up = max(1, round(0.03 * steps))
    factor = lambda t: min((t + 1) / warm_up, (steps - t) / (steps - warm_up))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    bar = tqdm(total=steps, desc="pretraining", unit="step", file=sys.stdout, mininterval=20)
    step = 0
    while step < steps:
        for rows in torch.randperm(count).split(128)[: steps - step]:
            x, y, box = pixels[rows], labels[rows], boxes[rows]  # [B, 3, S, S], [B, 3], [B, 4]
            pasted = None
            if step < crop_steps:
                x = crop(x, box, rng)
            elif step % 2:
                other = torch.randperm(len(rows))
                x, pasted = copy_paste(x, box, other), y[other]
            loss = loss_of(model(x), y, pasted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            bar.update()
            bar.set_postfix(px=x.shape[-1], loss=f"{loss.item():.2f}", refresh=False)
    bar.close()
    minutes = (time.time() - start) / 60
    folder.mkdir(parents=True, exist_ok=True)
    model.vit.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    card = {
        "command": "python -m scripts.pretrain_vit",
        "seed": seed,
        "minutes": round(minutes, 1),
        "images": count,
        "epochs": epochs,
        "machine": machine(),
        "accuracy": {k: round(v, 4) for k, v in accuracy(model, seed + 1_000).items()},
    }
    (folder / "training.json").write_text(json.dumps(card, indent=1))
    (folder / "README.md").write_text(model_card(card))
    return card


def model_card(card: dict) -> str:
    """The README beside the checkpoint, from what was measured."""
    a = card["accuracy"]
    return f"""# tiny-vit

A `ViTModel` (96 px, patches of 8 px, so a grid of 12 x 12; width 128, 6 layers, 4 heads) for the `mini` profile.

- **Made by** `{card["command"]}`, seed {card["seed"]}, in {card["minutes"]} minutes on
  {card["machine"]["cores"]} cores ({card["machine"]["cpu"]}).
- **Seen**: {card["images"]:,} pictures of one object each, rendered from OpenMoji, labelled with
  category ({len(CLASSES)}), colour ({len(SHADES)}) and setting ({len(SETTINGS)}: place and time of day);
  {card["epochs"][0]} epochs of 64 px crops around the object, then {card["epochs"][1]} of whole pictures,
  half of them with a second object pasted in.
- **Never seen**: a caption; a scene of MiniCOCO; the categories {", ".join(UNSEEN)};
  the drawings kept back for the probes (the last of every category that has three or more).
- **Held-out accuracy** (3,000 fresh pictures: unseen combinations of place, size, colour and position):
  category {a["what"]:.3f}, colour {a["colour"]:.3f}, setting {a["where"]:.3f} top-1.
- **Preprocessing**: resize to 96 x 96, scale to [-1, 1].
- **Licence**: weights MIT; the drawings it learned from are OpenMoji's, CC BY-SA 4.0.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=int, default=60_000, help="pictures to draw and learn from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/tiny-vit")
    arguments = parser.parse_args()
    print(pretrain(arguments.out, arguments.images, seed=arguments.seed))
