"""How much of the towers' speed does embedding extraction keep? `python -m benchmarks.embedding_extraction`

The baseline is the bare forward pass on normalised tensors that lie ready in memory. Against it stands
`extract_embeddings` on JPEG files and captions that its cache does not have: decoding, resizing, tokenising and writing
shards included. Same batches, same process, interleaved rounds; what counts is the median of their ratios. Hashing
weights and tokenizer is paid once a call however much data there is, so it has its own column, outside the ratio.
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
from helpers.encoders import ImageTower, TextTower, load_text_tower, weights_digest
from helpers.features import extract_embeddings

RESULT = ROOT / "data" / "results" / "bench_embedding_extraction.json"
TARGET = 0.9
ROUNDS = 5
WORDS = "a the two man woman dog cat horse skateboarder riding holding next to on in front of street beach".split()
TINY = {
    "image_size": 96,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
}
CASES = {  # architecture, size of the JPEGs, number of images, of captions, batch size
    "mini": (ViTConfig(**TINY, intermediate_size=512), (192, 192), 1536, 1536, 64),
    "coco": (ViTConfig(), (640, 480), 32, 96, 8),
}


def write_photos(root: Path, size: tuple[int, int], images: int, captions: int) -> CaptionedImages:
    """A data set in COCO's layout: colourful noise as detailed as a photograph, captions of 6 to 20 words."""
    rng = np.random.default_rng(0)
    (root / "val2017").mkdir()
    (root / "annotations").mkdir()
    listed, annotations = [], []
    for i in range(images):
        coarse = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(
            int
        )
        pixels = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        listed.append({"id": i, "file_name": f"{i:012d}.jpg"})
        Image.fromarray(pixels).save(root / "val2017" / listed[-1]["file_name"], quality=90)
    for i in range(captions):
        text = " ".join(rng.choice(WORDS, rng.integers(6, 21)))
        annotations.append({"id": i, "image_id": i % images, "caption": text})
    path = root / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations}))
    return CaptionedImages(root, "val2017")


def hash_towers(*towers) -> None:
    """What `extract_embeddings` pays before it knows which cache to look into."""
    for tower in towers:
        weights_digest(tower)
        tower.settings()


def measure(case: str, folder: Path) -> dict:
    """Seconds of each round: the bare passes, the extraction and the hashing, for pictures and captions."""
    config, size, images, captions, batch_size = CASES[case]
    torch.manual_seed(0)
    device = pick_device()
    text_tower = load_text_tower(get_profile("mini")).to(
        device
    )  # BERT-base: random weights, the same vocabulary
    if case == "coco":
        text_tower = (
            TextTower(BertModel(BertConfig(), False), text_tower.tokenizer, 64).to(device).eval()
        )
    vit = ViTModel(config, add_pooling_layer=False)
    towers = {
        "images": ImageTower(vit, config.image_size, [0.5] * 3, [0.5] * 3).to(device).eval(),
        "captions": text_tower,
    }
    dataset, cache = write_photos(folder, size, images, captions), folder / "cache"

    def extract() -> None:
        extract_embeddings(*towers.values(), dataset, cache, batch_size=batch_size, progress=False)

    batches = {kind: [] for kind in towers}
    hooks = [
        tower.register_forward_pre_hook(
            lambda _, args, inputs, kind=kind: batches[kind].append(inputs), with_kwargs=True
        )
        for kind, tower in towers.items()
    ]
    extract()  # fills the cache, warms up, and shows which batches the bare passes shall see
    for hook in hooks:
        hook.remove()
    batches["images"] = [
        {"pixel_values": towers["images"].normalise(b["pixel_values"])} for b in batches["images"]
    ]

    @torch.inference_mode()
    def bare(kind: str) -> None:
        with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
            for inputs in batches[kind]:
                towers[kind](**inputs)

    rows = {"images": len(dataset), "captions": len(set(dataset.all_captions()[0]))}
    seconds = {
        kind: {"rows": rows[kind], "bare": [], "extraction": [], "hashing": []} for kind in towers
    }
    for _ in range(ROUNDS):
        for kind, row in seconds.items():
            shutil.rmtree(next(cache.glob(f"{kind}-*")))  # the other tower's shards stay
            row["extraction"].append(timed(extract))
            row["bare"].append(timed(bare, kind))
            row["hashing"].append(timed(hash_towers, *towers.values()))
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
            bare, extraction, hashing = (
                np.array(row[what]) for what in ("bare", "extraction", "hashing")
            )
            row["ratio"] = float(np.median(bare / (extraction - hashing)))
            results[f"{case}/{kind}"] = row
            print(
                f"{case + ' ' + kind:16}{row['rows']:6}{np.median(bare):8.2f} s{np.median(extraction):10.2f} s"
                f"{np.median(hashing):8.2f} s{row['ratio']:8.2f}"
            )
    record = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "rounds": ROUNDS,
        "target": TARGET,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**record, "results": results}, indent=2) + "\n")
    short = [name for name, row in results.items() if row["ratio"] < TARGET]
    print(
        f"below {TARGET}: {', '.join(short)}"
        if short
        else f"all keep at least {TARGET:.0%} of the bare speed"
    )
    return bool(short)


if __name__ == "__main__":
    sys.exit(main())
