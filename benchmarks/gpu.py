"""What does a real GPU do with the real architectures? `python -m benchmarks.gpu`

ViT-B/16 and BERT-base with random weights, on random photographs written as JPEGs: features are
extracted through the course's own cache. Then both towers are tuned for one epoch, in 32 bits, in
bf16 and in fp16 with a scaled loss. Images per second by the median step, the GPU's peak of memory,
the rate of arithmetic, and how far the first loss is from that in 32 bits. Written to
data/results/gpu.json with the card's name; README shows it (`make readme`).
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
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel
from transformers.initialization import no_init_weights

from helpers.config import ROOT, machine, pick_device, seed_everything
from helpers.data import CaptionedImages, Examples
from helpers.encoders import ImageTower, TextTower
from helpers.features import extract_embeddings
from helpers.model import CLIP
from helpers.storage import hub
from helpers.storage.files import atomic_write
from helpers.training import fit
from helpers.training_context import some_patches

RESULT = ROOT / "data" / "results" / "gpu.json"
BATCH, STEPS, PATCHES, EMBED_DIM = 128, 6, 0.5, 512
RATES = {"lr": 3e-4, "image_lr": 4e-5, "text_lr": 1e-5}
WORDS = "a the red dog bus on in near two street beach person with large small".split()


def random_towers(image_config, text_config):
    """Both towers of these shapes with random weights, and BERT's own vocabulary."""
    vit = ViTModel(image_config, add_pooling_layer=False)
    bert = BertModel(text_config, add_pooling_layer=False)
    tokenizer = BertTokenizerFast(vocab=str(hub.minilm() / "vocab.txt"))
    half = [0.5, 0.5, 0.5]
    image_tower = ImageTower(vit, image_config.image_size, half, half)
    return image_tower, TextTower(bert, tokenizer, max_length=64)


def photographs(root, count):
    """Random images of 640 × 480 pixels with five captions each, in COCO's layout."""
    rng = np.random.default_rng(0)
    (root / "val2017").mkdir(parents=True)
    images, annotations = [], []
    for i in range(count):
        pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
        name = f"{i:012d}.jpg"
        Image.fromarray(pixels).resize((640, 480)).save(root / "val2017" / name)
        images.append({"id": i, "file_name": name, "width": 640, "height": 480})
        for k in range(5):
            caption = " ".join(rng.choice(WORDS, rng.integers(8, 16)))
            annotations.append({"id": 5 * i + k, "image_id": i, "caption": caption})
    content = json.dumps({"images": images, "annotations": annotations})
    atomic_write(root / "annotations" / "captions_val2017.json", content)
    return CaptionedImages(root).check()


def extraction(towers, images, batch_size):
    """Images and captions a second, JPEG to the cache; the second of two runs."""
    for _ in range(2):  # the first one warms up
        with tempfile.TemporaryDirectory() as cache:
            began = time.perf_counter()
            embeds = extract_embeddings(*towers, images, cache, batch_size, progress=False)
            seconds = time.perf_counter() - began
    assert embeds.image_embeds.isfinite().all() and embeds.text_embeds.isfinite().all()
    return {"images": len(images), "captions": len(embeds.captions), "seconds": seconds}


def one_epoch(towers, images, precision, batch_size):
    """With gradients into both towers, from the same start whatever the precision."""
    seed_everything(0)
    image_tower, text_tower = copy.deepcopy(towers)
    model = CLIP(image_tower.dim, text_tower.dim, EMBED_DIM, image_tower, text_tower)
    on_gpu = pick_device().type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    few = Examples(images.subset(images.image_ids[:8]))
    settings = {"epochs": 1, "batch_size": batch_size, "patch_keep_ratio": PATCHES, **RATES}
    (row,) = fit(model, Examples(images), few, precision=precision, **settings)
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(map(math.isfinite, row["losses"]))
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
    return {"images_per_second": row["images_per_second"], "losses": row["losses"], "peak_gb": peak}


def work_of_a_pair(image_config, text_config):
    """Floating-point operations of a step, an image and a caption of 20 tokens."""
    # As in notebook 04; fused attention on a CPU would not be counted.
    ids = {"size": (1, 20), "dtype": torch.long}
    with FakeTensorMode(), no_init_weights(), sdpa_kernel(SDPBackend.MATH):
        image_tower, text_tower = random_towers(image_config, text_config)
        text_tower.forward = text_tower.pooled
        twin = CLIP(image_tower.dim, text_tower.dim, EMBED_DIM, image_tower, text_tower)
        batch = {"pixel_values": torch.zeros(1, 3, image_tower.size, image_tower.size)}
        batch |= {"input_ids": torch.zeros(**ids), "attention_mask": torch.ones(**ids)}
        with some_patches(image_tower, PATCHES), FlopCounterMode(display=False) as counter:
            outputs = twin(batch)
            (outputs["image_embeds"].sum() + outputs["text_embeds"].sum()).backward()
            return counter.get_total_flops()


def measure(towers, root, count, batch_size, precisions):
    """All of it, on the device at hand."""
    images, rows = photographs(root, count), {}
    work = work_of_a_pair(towers[0].model.config, towers[1].model.config) / 1e12
    result = {"batch_size": batch_size, "patches": PATCHES, "tflop_per_pair": work}
    result |= {"extraction": extraction(towers, images, batch_size), "fine_tuning": rows}
    for precision in precisions:
        row = rows[precision] = one_epoch(towers, images, precision, batch_size)
        row["tflop_per_second"] = row["images_per_second"] * work
        plain = rows[precisions[0]]["losses"][0]
        row["first_loss_off"] = abs(row["losses"][0] - plain) / plain
        speed = f"{row['images_per_second']:8.1f} images/s{row['tflop_per_second']:8.2f} TFLOP/s"
        print(f"{precision:5}{speed}", flush=True)
    return result


def main():
    if pick_device().type != "cuda":
        print("benchmarks.gpu measures an NVIDIA GPU, and PyTorch finds none here.")
        return  # no error: `make bench` goes on
    began, card = time.perf_counter(), torch.cuda.get_device_properties(0)
    print(f"{card.name}, {card.total_memory / 1e9:.0f} GB")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precisions = ["no", "bf16", "fp16"] if has_bf16 else ["no", "fp16"]
    with tempfile.TemporaryDirectory() as folder:
        towers = random_towers(ViTConfig(), BertConfig())
        result = measure(towers, Path(folder, "coco"), BATCH * STEPS, BATCH, precisions)
    head = {"machine": machine(), "memory_gb": card.total_memory / 1e9, "torch": torch.__version__}
    head["seconds"] = time.perf_counter() - began
    atomic_write(RESULT, json.dumps({**head, **result}, indent=1) + "\n")
    print(f"Written to {RESULT.relative_to(ROOT)}; `make readme` shows it.")


if __name__ == "__main__":
    main()
