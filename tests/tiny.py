"""Tiny towers and a tiny data set in the genuine layout, for the tests."""

import json

import numpy as np
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

from helpers.encoders import ImageTower, TextTower
from helpers.model import CLIP

SENTENCE = "a red blue dog cat bus runs sleeps on the beach street near two three big small and"
WORDS = SENTENCE.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def image_tower(seed=0, size=16, mean=0.5, **shape):
    torch.manual_seed(seed)
    config = ViTConfig(**{**SMALL, **shape}, image_size=size, patch_size=8)
    return ImageTower(ViTModel(config, False), size, [mean] * 3, [0.5] * 3)


def text_tower(seed=0, max_length=12, words=WORDS, **shape):
    torch.manual_seed(seed)
    vocab = {word: i for i, word in enumerate([*SPECIAL, *words])}
    config = BertConfig(**{**SMALL, **shape}, vocab_size=64)
    return TextTower(BertModel(config, False), BertTokenizerFast(vocab=vocab), max_length)


def write_dataset(root, images=10):
    """COCO's layout: three captions an image, of different length; all images share the first."""
    rng = np.random.default_rng(0)
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    rows, annotations = [], []
    for i in range(images):
        name = f"{i + 100:012d}.jpg"
        pixels = rng.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val2017" / name)
        rows.append({"id": i + 100, "file_name": name, "height": 24 + i, "width": 40})
        others = (" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(2))
        for caption in ["a dog", *others]:
            annotations.append({"id": len(annotations), "image_id": i + 100, "caption": caption})
    data = {"info": {}, "licenses": [], "images": rows, "annotations": annotations}
    (root / "annotations" / "captions_val2017.json").write_text(json.dumps(data))


def deep_model(**text):
    """A CLIP of three layers a tower and 4 × 4 patches: something for maps to show.

    `text`: what differs in the text tower.
    """
    shape = {"num_hidden_layers": 3, "initializer_range": 0.5}
    words = [*WORDS, "##s", "##es"]
    towers = image_tower(size=32, **shape), text_tower(words=words, **{**shape, **text})
    torch.manual_seed(0)
    return CLIP(16, 16, 8, *towers).eval()
