"""How the tiny ViT in `assets/tiny-vit` was made: `python -m helpers.pretrain`.

Labelled pictures of single objects, as ViT-B/16 learned from ImageNet's: what it is, what colour it has, where it
stands. No caption, no scene of MiniCOCO, none of the `UNSEEN` categories, none of the drawings kept for the probes.
"""

from __future__ import annotations

import argparse
import json
import math
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

from helpers.drawings import CATEGORIES, COLOURS, FLYING, UNSEEN, colours, drawings
from helpers.places import PLACES, TIMES, VARIANTS
from helpers.profiles import ROOT, machine, seed_everything
from helpers.scenes import Scene, Thing, draw

CLASSES = [c for c in CATEGORIES if c not in UNSEEN]
SHADES = ["own", *COLOURS]
SETTINGS = [(place, hour) for place in PLACES for hour in TIMES]
SIDE = 96  # pixels


def single_object(seed: int, i: int) -> tuple[np.ndarray, list[int]]:
    """Picture i of a seed, uint8 [96, 96, 3], and its labels: what, colour, where."""
    rng = random.Random(f"pretrain/{seed}/{i}")
    category, setting = rng.choice(CLASSES), rng.randrange(len(SETTINGS))
    colour = rng.choice(colours(category))
    size = rng.uniform(0.2, 0.62)
    high = rng.uniform(0.1, 0.9) if category in FLYING else rng.uniform(0.35, 0.9)
    spot = {"x": rng.uniform(size / 2, 1 - size / 2), "y": min(max(high, size / 2), 1 - size / 2), "size": size}
    thing = Thing(category, rng.choice(drawings(category)), colour, **spot)
    place, hour = SETTINGS[setting]
    picture, _ = draw(Scene(place, hour, rng.randrange(VARIANTS), rng.random() < 0.5, [thing]))
    pixels = np.asarray(picture.resize((SIDE, SIDE), Image.BILINEAR, reducing_gap=2.0))
    return pixels, [CLASSES.index(category), SHADES.index(colour or "own"), setting]


def single_objects(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` pictures of a seed: pixels uint8 [count, 3, 96, 96] and labels [count, 3]."""
    pixels, labels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8), torch.empty(count, 3, dtype=torch.long)
    bar = {"desc": "drawing", "total": count, "unit": "image", "file": sys.stdout, "mininterval": 9}
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8), mp_context=get_context("spawn")) as pool:
        drawn = pool.map(partial(single_object, seed), range(count), chunksize=250)
        for i, (picture, label) in enumerate(tqdm(drawn, **bar)):
            pixels[i], labels[i] = torch.from_numpy(picture).permute(2, 0, 1), torch.tensor(label)
    return pixels, labels


class Classifier(nn.Module):
    """The ViT with three linear heads on its CLS token; only the ViT is kept."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.vit = ViTModel(config, add_pooling_layer=False)
        widths = {"what": len(CLASSES), "colour": len(SHADES), "where": len(SETTINGS)}
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, n) for name, n in widths.items()})

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        cls = self.vit(pixels.float() / 127.5 - 1, interpolate_pos_encoding=True).last_hidden_state[:, 0]  # [B, D]
        return [head(cls) for head in self.heads.values()]


def cutmix(pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, float]:
    """CutMix (arXiv 1905.04899): a vertical or horizontal slab of each picture comes from another one of the batch."""
    other = torch.randperm(len(pixels), generator=generator)
    side, share = pixels.shape[-1], 0.3 + 0.4 * torch.rand(1, generator=generator).item()
    cut, mixed = round(side * share), pixels.clone()
    if torch.rand(1, generator=generator) < 0.5:
        mixed[:, :, :cut] = pixels[other, :, :cut]
    else:
        mixed[..., :cut] = pixels[other][..., :cut]
    return mixed, other, cut / side


def loss_of(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    weights = (1.0, 0.5, 0.5)
    return sum(w * F.cross_entropy(x, y, label_smoothing=0.05) for w, x, y in zip(weights, logits, labels.T))


@torch.inference_mode()
def accuracy(model: Classifier, seed: int, count: int = 3_000) -> dict[str, float]:
    """Top-1 of each head on fresh pictures of another seed: unseen combinations of place, size, colour and position."""
    model.eval()
    pixels, labels = single_objects(seed, count)
    logits = [torch.cat(parts) for parts in zip(*(model(part) for part in pixels.split(128)))]
    return {name: (x.argmax(-1) == y).float().mean().item() for name, x, y in zip(model.heads, logits, labels.T)}


def pretrain(folder: Path, count: int = 60_000, epochs: tuple = (3, 1.5), seed: int = 0) -> dict:
    """Trains on `count` pictures, `epochs` = (at 64 px, then at 96 px), and writes an HF folder with its model card.

    AdamW, batch 128, warm-up over 3 % of the steps to 1e-3, then cosine; a third of the batches mixed with CutMix.
    Returns the model card's numbers.
    """
    start = time.time()
    seed_everything(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = single_objects(seed, count)
    config = ViTConfig(image_size=SIDE, patch_size=8, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
                       intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip
    model = Classifier(config)
    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    small_steps, full_steps = (round(e * count / 128) for e in epochs)
    steps = small_steps + full_steps
    warm_up = max(1, round(0.03 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1, (t + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    bar = tqdm(total=steps, desc="pretraining", unit="step", file=sys.stdout, mininterval=20)
    small = torch.cat([F.interpolate(p.float(), size=64, mode="area").byte() for p in pixels.split(1024)])
    step = 0
    while step < steps:
        for rows in torch.randperm(count, generator=generator).split(128)[: steps - step]:
            x, y = (small if step < small_steps else pixels)[rows], labels[rows]  # [B, 3, S, S], [B, 3]
            if torch.rand(1, generator=generator) < 1 / 3:
                x, other, share = cutmix(x, generator)
                logits = model(x)
                loss = (1 - share) * loss_of(logits, y) + share * loss_of(logits, y[other])
            else:
                loss = loss_of(model(x), y)
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
    card = {"command": "python -m helpers.pretrain", "seed": seed, "minutes": round(minutes, 1), "images": count,
            "epochs": epochs, "machine": machine(),
            "accuracy": {k: round(v, 4) for k, v in accuracy(model, seed + 1_000).items()}}  # fmt: skip
    (folder / "training.json").write_text(json.dumps(card, indent=1))
    (folder / "README.md").write_text(model_card(card))
    return card


def model_card(card: dict) -> str:
    """The README beside the checkpoint, from what was measured."""
    a = card["accuracy"]
    return f"""# tiny-vit

A `ViTModel` (96 px, patches of 8 px, so a grid of 12 x 12; width 128, 6 layers, 4 heads) for the `mini` profile.

- **Made by** `{card["command"]}`, seed {card["seed"]}, in {card["minutes"]} minutes
  on {card["machine"]["cores"]} cores ({card["machine"]["cpu"]}).
- **Seen**: {card["images"]:,} pictures of one object each, rendered from OpenMoji, labelled with category ({len(CLASSES)}),
  colour ({len(SHADES)}) and setting ({len(SETTINGS)}: place and time of day); {card["epochs"][0]} epochs at 64 px, then
  {card["epochs"][1]} at 96 px, a third of the batches mixed with CutMix.
- **Never seen**: a caption; a scene of MiniCOCO; the categories {", ".join(UNSEEN)};
  the drawings kept back for the probes (the last of every category that has three or more).
- **Held-out accuracy** (3,000 fresh pictures: unseen combinations of place, size, colour and position):
  category {a["what"]:.3f}, colour {a["colour"]:.3f}, setting {a["where"]:.3f} top-1.
- **Preprocessing**: resize to 96 x 96, scale to [-1, 1].
- **Licence**: weights MIT; the drawings it learned from are OpenMoji's, CC BY-SA 4.0.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60_000, help="pictures to draw and learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/tiny-vit")
    arguments = parser.parse_args()
    print(pretrain(arguments.out, arguments.images, seed=arguments.seed))
