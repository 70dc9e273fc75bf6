"""How the tiny ViT in `assets/tiny-vit` was made: `python -m scripts.pretrain_vit`.

Labelled images of single objects, as ViT-B/16 learned from ImageNet's: what it is, what colour it
has, where it stands. No caption, no scene of MiniCOCO, none of the `UNSEEN` categories, none of the
drawings kept for the probes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from helpers.config import ROOT, machine, seed_everything
from helpers.minicoco.backgrounds import PLACES, SIZE, TIMES, VARIANTS
from helpers.minicoco.scenes import Scene, SceneObject, draw
from helpers.minicoco.sprites import CATEGORIES, COLOURS, FLYING, UNSEEN, colours, drawings

CLASSES = [c for c in CATEGORIES if c not in UNSEEN]
SHADES = ["own", *COLOURS]
SETTINGS = [(place, time) for place in PLACES for time in TIMES]
SIDE, SMALL = 96, 64  # pixels of a whole image and of a crop
BATCH = 128


def single_object(seed: int, i: int) -> tuple[np.ndarray, list[int], list[int]]:
    """Image i of a seed, uint8 [96, 96, 3]; its labels: what, colour, where; its object's box.

    A box is left, top, right, bottom.
    """
    rng = random.Random(f"pretrain/{seed}/{i}")
    category, setting = rng.choice(CLASSES), rng.randrange(len(SETTINGS))
    colour = rng.choice(colours(category))
    size = rng.uniform(0.22, 0.62)
    high = rng.uniform(0.1, 0.9) if category in FLYING else rng.uniform(0.35, 0.9)
    x, y = rng.uniform(size / 2, 1 - size / 2), min(max(high, size / 2), 1 - size / 2)
    single = SceneObject(category, rng.choice(drawings(category)), colour, 1, x, y, size)
    variant, flip = rng.randrange(VARIANTS), rng.random() < 0.5
    image, [(_, mask)] = draw(Scene(*SETTINGS[setting], variant, flip, [single]))
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.BILINEAR))
    rows, columns = (np.flatnonzero(mask.any(axis)) * SIDE // SIZE for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    return pixels, [CLASSES.index(category), SHADES.index(colour or "own"), setting], box


def single_objects(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `count` images of a seed, drawn on all cores.

    Pixels uint8 [count, 3, 96, 96], labels [count, 3], boxes [count, 4].
    """
    pixels = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    labels, boxes = torch.empty(count, 3, dtype=torch.long), torch.empty(count, 4, dtype=torch.long)
    pool = Parallel(n_jobs=-1, batch_size=250, return_as="generator")
    images = pool(delayed(single_object)(seed, i) for i in range(count))
    bar = tqdm(images, "drawing", count, unit="image", file=sys.stdout, mininterval=9)
    for i, (image, label, box) in enumerate(bar):
        pixels[i] = torch.tensor(image).permute(2, 0, 1)
        labels[i], boxes[i] = torch.tensor(label), torch.tensor(np.array(box))
    return pixels, labels, boxes


class Classifier(nn.Module):
    """The ViT with three linear heads on its CLS token; only the ViT is kept."""

    def __init__(self):
        super().__init__()
        width = {"hidden_size": 128, "intermediate_size": 512}
        depth = {"num_hidden_layers": 6, "num_attention_heads": 4}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = ViTConfig(image_size=SIDE, patch_size=8, **width, **depth, **dropout)
        self.vit = ViTModel(config, add_pooling_layer=False)
        classes = {"what": len(CLASSES), "colour": len(SHADES), "where": len(SETTINGS)}
        self.heads = nn.ModuleDict({name: nn.Linear(128, n) for name, n in classes.items()})

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        # Positions are interpolated, so that crops can be smaller.
        states = self.vit(pixels.float() / 127.5 - 1, interpolate_pos_encoding=True)
        cls = states.last_hidden_state[:, 0]  # [B, D]
        return [head(cls) for head in self.heads.values()]


def crop(pixels: torch.Tensor, boxes: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random window of 64 px around each object, [B, 3, 64, 64]: half the tokens."""
    low = (boxes[:, 2:] - SMALL).clamp(min=0).numpy()
    high = boxes[:, :2].clamp(max=SIDE - SMALL).numpy()
    corners = np.minimum(low, high) + rng.random(low.shape) * np.abs(high - low)
    corners = np.round(corners).astype(int)
    return torch.stack([p[:, y : y + SMALL, x : x + SMALL] for p, (x, y) in zip(pixels, corners)])


def copy_paste(pixels: torch.Tensor, boxes: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The box of another image's object pasted into each image, so that CLS learns to hold two.

    Ghiasi et al. 2020 (2012.07177).
    """
    mixed = pixels.clone()
    for image, source, box in zip(mixed, pixels[other], boxes[other].tolist()):
        left, top, right, bottom = box
        image[:, top:bottom, left:right] = source[:, top:bottom, left:right]
    return mixed


def loss_of(logits: list[torch.Tensor], labels: torch.Tensor, pasted=None) -> torch.Tensor:
    """Cross-entropy of what, colour and where; of a pasted object's what and colour equally."""
    what, colour, where = (partial(F.cross_entropy, x, label_smoothing=0.05) for x in logits)
    objects = [labels] if pasted is None else [labels, pasted]
    losses = [what(y[:, 0]) + 0.5 * colour(y[:, 1]) for y in objects]
    return sum(losses) / len(losses) + 0.25 * where(labels[:, 2])


@torch.inference_mode()
def accuracy(model: Classifier, seed: int, count: int = 3_000) -> dict[str, float]:
    """Top-1 of each head on fresh images: new combinations of place, size, colour and position."""
    model.eval()
    pixels, labels, _ = single_objects(seed, count)
    logits = [torch.cat(parts) for parts in zip(*(model(part) for part in pixels.split(BATCH)))]
    hits = [(x.argmax(-1) == y).float().mean().item() for x, y in zip(logits, labels.T)]
    return {name: round(share, 4) for name, share in zip(model.heads, hits)}


def pretrain(folder: Path, count: int = 60_000, epochs: tuple = (4.5, 1), seed: int = 0) -> dict:
    """Trains on `count` images and writes a model in Hugging Face format; returns its numbers.

    epochs: of crops of 64 px, then of whole images; every other batch of these has a second object
    pasted in. AdamW, warm-up over 3 % of the steps to 1e-3, then linear to 0.
    """
    start, rng = time.time(), np.random.default_rng(seed)
    seed_everything(seed)
    pixels, labels, boxes = single_objects(seed, count)
    model = Classifier()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    crop_steps, whole_steps = (round(e * count / BATCH) for e in epochs)
    steps = crop_steps + whole_steps
    warm_up = max(1, round(0.03 * steps))

    def factor(step):
        return min((step + 1) / warm_up, (steps - step) / (steps - warm_up))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    bar = tqdm(range(steps), "pretraining", unit="step", file=sys.stdout, mininterval=20)
    batches = []
    for step in bar:
        if not batches:
            batches = list(torch.randperm(count).split(BATCH))
        rows = batches.pop(0)
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
        bar.set_postfix(px=x.shape[-1], loss=f"{loss.item():.2f}", refresh=False)
    card = {"seed": seed, "minutes": round((time.time() - start) / 60, 1), "images": count}
    card |= {"epochs": epochs, "machine": machine(), "accuracy": accuracy(model, seed + 1_000)}
    folder.mkdir(parents=True, exist_ok=True)
    model.vit.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(card, indent=1))
    return card


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=60_000, help="to draw and learn from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "assets/tiny-vit")
    options = parser.parse_args()
    print(pretrain(options.out, options.images, seed=options.seed))
