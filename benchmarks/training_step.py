"""Does our trainer cost speed? `python -m benchmarks.training_step`

Images per second of a fine-tuning step with gradients into both towers (tiny-vit and MiniLM), JPEGs
and captions to weights: `helpers.training.fit` against (a) a plain PyTorch loop without any
feature, over the same model, and (b) transformers' VisionTextDualEncoderModel under its Trainer,
over the same towers. Same batches, float32, fused AdamW; five interleaved rounds, each the median
of its steps; what counts is the median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
import tempfile
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    TrainingArguments,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTModel,
)
from transformers.utils import logging

from helpers import load_or_build
from helpers.config import ROOT, get_profile, machine
from helpers.data import Examples, draw_captions, visiting_order
from helpers.losses import clip_loss
from helpers.model import CLIP
from helpers.storage.files import atomic_write
from helpers.training import fit

RESULT = ROOT / "data" / "results" / "bench_training_step.json"
TARGET, ROUNDS, STEPS, BATCH = 0.95, 5, 6, 64
RATES = {"lr": 5e-4, "image_lr": 3e-4, "text_lr": 1e-4}


def speed(times):
    """Images per second of the median step; the first one warms up."""
    return BATCH / float(np.median(np.diff(times)[1:]))


def ours(model, images):
    few = Examples(images.subset(images.image_ids[:4]))
    with contextlib.redirect_stdout(io.StringIO()):
        history = fit(model, Examples(images), few, epochs=1, batch_size=BATCH, **RATES)
    return history[0]["images_per_second"]


class Items(Dataset):
    """What `fit` reads in its first epoch, without crops: item k is the k-th image it visits."""

    def __init__(self, model, images):
        self.model, self.images = model, images
        self.order = visiting_order(0, 1, images.image_ids)
        self.picks = draw_captions(0, 1, images.image_ids, images.counts)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, k):
        i, tower = self.order[k], self.model.image_tower
        image = tower.preprocess(self.images.image(i))
        return image, self.images.captions(i)[self.picks[i]]

    def collate(self, items):
        images, captions = zip(*items)
        return {"pixel_values": torch.stack(images), **self.model.text_tower.tokenize(captions)}


def plain(model, images):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    times = [time.perf_counter()]
    items = Items(model, images)
    for batch in DataLoader(items, batch_size=BATCH, collate_fn=items.collate):
        loss = clip_loss(**model(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return speed(times)


class Stopwatch(TrainerCallback):
    """The times at which steps end, the first step's data included."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def transformers_trainer(model, images):
    vit, bert = model.image_tower.model, model.text_tower.model
    with_pooler = ViTModel(vit.config)  # it reads the pooler's output, which ours has not
    with_pooler.load_state_dict(vit.state_dict(), strict=False)
    text = type(bert)(bert.config)
    text.load_state_dict(bert.state_dict(), strict=False)
    shapes = vit.config, bert.config
    config = VisionTextDualEncoderConfig.from_vision_text_configs(*shapes, projection_dim=256)
    dual = VisionTextDualEncoderModel(config, vision_model=with_pooler, text_model=text)
    source, watch = Items(model, images), Stopwatch()

    def collate(items):
        batch = source.collate(items)
        batch["pixel_values"] = model.image_tower.normalise(batch["pixel_values"])
        return {**batch, "return_loss": True}

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
        )
        data = {"train_dataset": source, "data_collator": collate}
        Trainer(dual, arguments, callbacks=[watch], **data).train()
    return speed(watch.times)


def main():
    logging.set_verbosity_error()
    start, profile = time.perf_counter(), get_profile("mini")
    images = load_or_build.data(profile, "train")
    images = images.subset(images.image_ids[: BATCH * STEPS])
    runs = {"ours": ours, "plain": plain, "trainer": transformers_trainer}
    speeds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            torch.manual_seed(0)
            towers = copy.deepcopy(load_or_build.towers(profile))
            model = CLIP(towers[0].dim, towers[1].dim, profile.embed_dim, *towers)
            speeds[name].append(run(model.requires_grad_(True), images))
    for name, values in speeds.items():
        rounds = ", ".join(f"{value:.1f}" for value in values)
        print(f"{name:10} {np.median(values):7.1f} images/s   ({rounds})")
    ratios = {}
    for name in ("plain", "trainer"):
        ratio = float(np.median(np.array(speeds["ours"]) / speeds[name]))
        ratios[f"ours / {name}"] = ratio
        print(f"ours / {name:8} {ratio:5.2f}")
    record = {"machine": machine(), "seconds": round(time.perf_counter() - start, 1)}
    record |= {"rounds": ROUNDS, "batch_size": BATCH, "target": TARGET}
    record |= {"images_per_second": speeds, "ratios": ratios}
    atomic_write(RESULT, json.dumps(record, indent=2) + "\n")
    short = [name for name, ratio in ratios.items() if ratio < TARGET]
    print(f"below {TARGET}: {', '.join(short)}" if short else f"all at least {TARGET}")
    return bool(short)


if __name__ == "__main__":
    sys.exit(main())
