"""What does a real GPU do with the real architectures? `python -m benchmarks.gpu`

ViT-B/16 and BERT-base with random weights, on random photographs written as JPEGs: features are extracted through the
course's own cache, then both towers are tuned for one epoch, in 32 bits, in bf16 and in fp16 with a scaled loss. Images
per second by the median step, the GPU's peak of memory, the rate of arithmetic, and how far the first loss is from that
in 32 bits. Written to data/results/gpu.json with the card's name; README shows it (`make readme`).
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

from helpers import training_context
from helpers.config import ROOT, machine, pick_device, seed_everything
from helpers.data import CaptionedImages, Examples
from helpers.encoders import ImageTower, TextTower
from helpers.features import extract_embeddings
from helpers.model import CLIP
from helpers.storage import hub
from helpers.storage.files import atomic_write
from helpers.training import fit
from helpers.training_context import some_patches
from scripts import memory

RESULT = ROOT / "data" / "results" / "gpu.json"
BATCH, STEPS, PATCHES = 128, 6, 0.5
RATES = {"lr": 3e-4, "image_lr": 4e-5, "text_lr": 1e-5}


def towers(image_config: ViTConfig, text_config: BertConfig) -> tuple[ImageTower, TextTower]:
    """Both towers of these shapes with random weights, and BERT's own vocabulary."""
    vit, bert = (
        ViTModel(image_config, add_pooling_layer=False),
        BertModel(text_config, add_pooling_layer=False),
    )
    tokenizer = BertTokenizerFast(vocab=str(hub.minilm() / "vocab.txt"))
    half = [0.5, 0.5, 0.5]
    return ImageTower(vit, image_config.image_size, half, half), TextTower(
        bert, tokenizer, max_length=64
    )


def photographs(root: Path, count: int) -> CaptionedImages:
    """Random pictures of 640 × 480 pixels with five captions each, in COCO's layout."""
    rng, words = (
        np.random.default_rng(0),
        "a the red dog bus on in near two street beach person with large small".split(),
    )
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for i in range(count):
        picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((640, 480))
        picture.save(root / "val2017" / f"{i:012d}.jpg")
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": 640, "height": 480})
        for k in range(5):
            told = " ".join(rng.choice(words, rng.integers(8, 16)))
            annotations.append({"id": 5 * i + k, "image_id": i, "caption": told})
    content = json.dumps({"images": images, "annotations": annotations})
    atomic_write(root / "annotations" / "captions_val2017.json", content)
    return CaptionedImages(root).check()


def extraction(pair, images: CaptionedImages, batch_size: int) -> dict:
    """Images and captions per second through the frozen towers, JPEG to the cache; the second of two runs."""
    for _ in range(2):  # the first one warms up
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            embeds = extract_embeddings(*pair, images, Path(cache), batch_size, progress=False)
            seconds = time.perf_counter() - began
    assert embeds.image_embeds.isfinite().all() and embeds.text_embeds.isfinite().all()
    return {"images": len(images), "captions": len(embeds.captions), "seconds": seconds}


def tuning(
    pair, images: CaptionedImages, precision: str, batch_size: int, embed_dim: int = 512
) -> dict:
    """One epoch with gradients into both towers, from the same start whatever the precision."""
    seed_everything(0)
    model = CLIP(pair[0].dim, pair[1].dim, embed_dim, *copy.deepcopy(pair))
    on_gpu = pick_device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    few = Examples(images.subset(images.image_ids[:8]))
    options = {
        "epochs": 1,
        "batch_size": batch_size,
        "patches": PATCHES,
        "precision": precision,
        **RATES,
    }
    AcceleratorState._reset_state(
        reset_partial_state=True
    )  # else a process keeps its first precision
    try:
        (row,) = fit(model, Examples(images), few, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.isfinite().all() for p in model.parameters())
    return {
        "images_per_second": row["images_per_second"],
        "losses": row["losses"],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def measure(pair, root: Path, count: int, batch_size: int, precisions) -> dict:
    """All of it, on the device at hand."""
    images = photographs(root, count)
    twin = memory.dual_encoder(pair[0].model.config, pair[1].model.config)
    with some_patches(twin.image_tower, PATCHES):
        work = memory.flops(twin, memory.batch_for(twin, 1))[1]  # of one pair
    result = {
        "batch_size": batch_size,
        "patches": PATCHES,
        "tflop_per_pair": work / 1e12,
        "fine_tuning": {},
    }
    result["extraction"] = extraction(pair, images, batch_size)
    for precision in precisions:
        row = result["fine_tuning"][precision] = tuning(pair, images, precision, batch_size)
        row["tflop_per_second"] = row["images_per_second"] * work / 1e12
        plain = result["fine_tuning"][precisions[0]]["losses"][0]
        row["first_loss_off"] = abs(row["losses"][0] - plain) / plain
        assert all(map(math.isfinite, row["losses"]))
        print(
            f"{precision:5}{row['images_per_second']:8.1f} images/s{row['tflop_per_second']:8.2f} TFLOP/s"
        )
    return result


def main() -> None:
    has = training_context.look()
    if has["gpu"] is None:
        print("benchmarks.gpu measures an NVIDIA GPU, and PyTorch finds none here.")
        return  # no error: `make bench` goes on
    print(f"{has['gpu']}, {has['memory'] / 1e9:.0f} GB")
    began = time.perf_counter()
    precisions = ["no", *(["bf16"] if has["bf16"] else []), "fp16"]
    with tempfile.TemporaryDirectory() as folder:
        pair = towers(ViTConfig(), BertConfig())
        found = measure(pair, Path(folder) / "coco", BATCH * STEPS, BATCH, precisions)
    about = {"machine": machine(), "memory_gb": has["memory"] / 1e9, "torch": torch.__version__}
    atomic_write(
        RESULT,
        json.dumps({**about, "seconds": time.perf_counter() - began, **found}, indent=1) + "\n",
    )
    print(f"Written to {RESULT.relative_to(ROOT)}; `make readme` shows it.")


if __name__ == "__main__":
    main()
