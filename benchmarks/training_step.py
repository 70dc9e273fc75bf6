"""Does our trainer cost speed? `python -m benchmarks.training_step`

Images per second of a fine-tuning step with gradients into both towers (tiny-vit and MiniLM), JPEGs and captions to
weights: `helpers.training.fit` against (a) a plain PyTorch loop without any feature, over the same model, and (b)
transformers' VisionTextDualEncoderModel under its Trainer, over the same towers. Same batches, float32, fused AdamW;
five interleaved rounds, each the median of its steps; what counts is the median of the rounds' ratios.
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


class Stopwatch(TrainerCallback):
    """The times at which steps end, the first step's data included."""

    def __init__(self):
        self.times = [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter())


def speed(times) -> float:
    """Images per second of the median step; the first one warms up."""
    return BATCH / float(np.median(np.diff(times)[1:]))


def ours(model, images) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        few = Examples(images.subset(images.image_ids[:4]))
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
        image = tower.preprocess(self.images.image(i, tower.size))
        return image, self.images.captions(i)[self.picks[i]], int(self.images.image_ids[i])

    def collate(self, items):
        images, captions, ids = zip(*items)
        tokens = self.model.text_tower.tokenize(captions)
        return {"pixel_values": torch.stack(images), "image_ids": torch.tensor(ids), **tokens}


def loader(model, images):
    """The images' batches in the order that `fit` visits them, without crops."""
    items = Items(model, images)
    return DataLoader(items, batch_size=BATCH, collate_fn=items.collate)


def plain(model, images) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()
    times = [time.perf_counter()]
    for batch in loader(model, images):
        loss = clip_loss(**model(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return speed(times)


def transformers_trainer(model, images) -> float:
    towers = model.image_tower.model, model.text_tower.model
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        towers[0].config, towers[1].config, projection_dim=256
    )
    with_pooler = ViTModel(towers[0].config)  # it reads the pooler's output, which ours has not
    with_pooler.load_state_dict(towers[0].state_dict(), strict=False)
    text = type(towers[1])(towers[1].config)
    text.load_state_dict(towers[1].state_dict(), strict=False)
    dual = VisionTextDualEncoderModel(config, vision_model=with_pooler, text_model=text)
    source = loader(model, images)

    def collate(items):
        batch = source.collate_fn(items)
        del batch["image_ids"]
        return {
            **batch,
            "pixel_values": model.image_tower.normalise(batch["pixel_values"]),
            "return_loss": True,
        }

    watch = Stopwatch()
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
            dataloader_num_workers=0,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(
            dual, arguments, data_collator=collate, train_dataset=source.dataset, callbacks=[watch]
        ).train()
    return speed(watch.times)


def main() -> int:
    logging.set_verbosity_error()
    start, profile = time.perf_counter(), get_profile("mini")
    images = load_or_build.data(profile, "train")
    images = images.subset(images.image_ids[: BATCH * STEPS])
    runs = {"ours": ours, "plain": plain, "trainer": transformers_trainer}
    found = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            torch.manual_seed(0)
            towers = [copy.deepcopy(tower) for tower in load_or_build.towers(profile)]
            model = CLIP(towers[0].dim, towers[1].dim, profile.embed_dim, *towers).requires_grad_(
                True
            )
            found[name].append(run(model, images))
    ratios = {
        f"ours / {name}": np.array(found["ours"]) / np.array(found[name])
        for name in ("plain", "trainer")
    }
    for name, values in found.items():
        print(
            f"{name:10} {np.median(values):7.1f} images/s   ({', '.join(f'{v:.1f}' for v in values)})"
        )
    for name, values in ratios.items():
        print(f"{name:15} {np.median(values):5.2f}")
    medians = {name: float(np.median(values)) for name, values in ratios.items()}
    record = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "rounds": ROUNDS,
        "batch_size": BATCH,
        "target": TARGET,
        "images_per_second": found,
        "ratios": medians,
    }
    atomic_write(RESULT, json.dumps(record, indent=2) + "\n")
    short = [name for name, value in medians.items() if value < TARGET]
    print(f"below {TARGET}: {', '.join(short)}" if short else f"all at least {TARGET}")
    return bool(short)


if __name__ == "__main__":
    sys.exit(main())
