"""Tiny towers and a tiny data set in the genuine layout, for the tests."""

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast, ViTConfig, ViTModel

from helpers.encoders import ImageTower, TextTower
from helpers.model import CLIP
from tests.coco_files import write_captions, write_images

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


def whole(**start):
    """A CLIP with both towers."""
    return CLIP(16, 16, 8, image_tower(), text_tower(), **start)


def write_dataset(root, images=10):
    """COCO's layout: three captions an image, of different length; all images share the first."""
    rng, captions = np.random.default_rng(0), {}
    for image_id in range(100, 100 + images):
        others = (" ".join(rng.choice(WORDS, rng.integers(3, 9))) for _ in range(2))
        captions[image_id] = ["a dog", *others]
    write_captions(root, captions)
    write_images(root, captions, grows=1)


def deep_model(**text):
    """A CLIP of three layers a tower and 4 × 4 patches: something for maps to show.

    Weights so large that attention is far from uniform, and dropout in training. `text`: what
    differs in the text tower.
    """
    shape = {"num_hidden_layers": 3, "initializer_range": 0.5}
    shape |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    words = [*WORDS, "##s", "##es"]
    towers = image_tower(size=32, **shape), text_tower(0, 16, words, **{**shape, **text})
    torch.manual_seed(0)
    return CLIP(16, 16, 8, *towers).eval()
