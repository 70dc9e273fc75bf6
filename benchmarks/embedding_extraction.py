"""How much of the towers' speed does extraction keep? `python -m benchmarks.embedding_extraction`

The baseline is the bare forward pass on normalised tensors that lie ready in memory. Against it
stands `extract_embeddings` on JPEG files and captions that its cache does not have: decoding,
resizing, tokenising and writing shards included. Same batches, same process, interleaved rounds;
what counts is the median of their ratios. Hashing weights and tokenizer is paid once a call however
much data there is, so it has its own column, outside the ratio.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from helpers.config import ROOT, get_profile, machine, pick_device
from helpers.data import CaptionedImages
from helpers.encoders import ImageTower, TextTower, load_text_tower, settings
from helpers.features import extract_embeddings
from helpers.storage.checkpoints import weights_digest

RESULT = ROOT / "data" / "results" / "bench_embedding_extraction.json"
TARGET = 0.9
ROUNDS = 5
WORDS = "a the two man woman dog cat horse skateboarder riding holding next to on in front of"
WORDS = (WORDS + " street beach").split()
TINY = {"image_size": 96, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
TINY |= {"num_hidden_layers": 6, "num_attention_heads": 4}
# Architecture, size of the JPEGs, number of images, of captions, batch size.
CASES = {
    "mini": (ViTConfig(**TINY), (192, 192), 1536, 1536, 64),
    "coco": (ViTConfig(), (640, 480), 32, 96, 8),
}


def write_photos(root: Path, size: tuple[int, int], images: int, captions: int) -> CaptionedImages:
    """COCO's layout: colourful noise as detailed as a photograph, captions of 6 to 20 words."""
    rng = np.random.default_rng(0)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    rows, annotations = [], []
    for i in range(images):
        coarse = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth) + rng.integers(-12, 13, (*size[::-1], 3))
        rows.append({"id": i, "file_name": f"{i:012d}.jpg"})
        path = root / "val2017" / rows[-1]["file_name"]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    for i in range(captions):
        text = " ".join(rng.choice(WORDS, rng.integers(6, 21)))
        annotations.append({"id": i, "image_id": i % images, "caption": text})
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": rows, "annotations": annotations}))
    return CaptionedImages(root, "val2017")


def make_towers(case: str, config: ViTConfig) -> dict:
    """Random weights but for MiniLM; BERT-base has the same vocabulary."""
    torch.manual_seed(0)
    text = load_text_tower(get_profile("mini"))
    if case == "coco":
        text = TextTower(BertModel(BertConfig(), False), text.tokenizer, 64)
    image = ImageTower(ViTModel(config, False), config.image_size, [0.5] * 3, [0.5] * 3)
    return {"images": image.to(pick_device()).eval(), "captions": text.to(pick_device()).eval()}


def hash_towers(towers: dict) -> None:
    """What `extract_embeddings` pays before it knows which cache to look into."""
    for tower in towers.values():
        weights_digest(tower)
        settings(tower)


def measure(case: str, folder: Path) -> dict:
    """Seconds of each round: bare passes, extraction and hashing, for images and captions."""
    config, size, images, captions, batch_size = CASES[case]
    towers = make_towers(case, config)
    dataset, cache = write_photos(folder, size, images, captions), folder / "cache"
    batches = {kind: [] for kind in towers}

    def extract() -> None:
        extract_embeddings(*towers.values(), dataset, cache, batch_size, progress=False)

    @torch.inference_mode()
    def bare(kind: str) -> None:
        cuda = pick_device().type == "cuda"
        with torch.autocast(pick_device().type, dtype=torch.float16, enabled=cuda):
            for inputs in batches[kind]:
                towers[kind](**inputs)

    def note(kind):
        return lambda tower, args, inputs: batches[kind].append(inputs)

    # Fills the cache, warms up, and notes which batches the bare passes shall see.
    hooks = [
        tower.register_forward_pre_hook(note(kind), with_kwargs=True)
        for kind, tower in towers.items()
    ]
    extract()
    for hook in hooks:
        hook.remove()
    for inputs in batches["images"]:
        inputs["pixel_values"] = towers["images"].normalise(inputs["pixel_values"])
    rows = {"images": len(dataset), "captions": len(set(dataset.all_captions()[0]))}
    seconds = {
        kind: {"rows": rows[kind], "bare": [], "extraction": [], "hashing": []} for kind in towers
    }
    for _ in range(ROUNDS):
        for kind, row in seconds.items():
            # The other tower's shards stay.
            shutil.rmtree(next(cache.glob(f"{kind}-*")))
            row["extraction"].append(timed(extract))
            row["bare"].append(timed(bare, kind))
            row["hashing"].append(timed(hash_towers, towers))
    return seconds


def timed(function, *args) -> float:
    """Seconds that a call takes, a GPU's work included."""
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    start, results = time.perf_counter(), {}
    print(f"{'':16}{'rows':>6}{'bare':>10}{'extraction':>12}{'hashing':>10}{'ratio':>8}")
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(case, Path(folder))
        for kind, row in measured.items():
            columns = [np.array(row[name]) for name in ("bare", "extraction", "hashing")]
            bare, extraction, hashing = columns
            row["ratio"] = float(np.median(bare / (extraction - hashing)))
            results[f"{case}/{kind}"] = row
            times = "".join(f"{np.median(x):{w}.2f} s" for x, w in zip(columns, (8, 10, 8)))
            print(f"{case + ' ' + kind:16}{row['rows']:6}{times}{row['ratio']:8.2f}")
    seconds = round(time.perf_counter() - start, 1)
    record = {"machine": machine(), "seconds": seconds, "rounds": ROUNDS, "target": TARGET}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**record, "results": results}, indent=2) + "\n")
    slow = [name for name, row in results.items() if row["ratio"] < TARGET]
    all_fast = f"all keep at least {TARGET:.0%} of the bare speed"
    print(f"below {TARGET}: {', '.join(slow)}" if slow else all_fast)
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
