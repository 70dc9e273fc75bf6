"""Captions of COCO's full size, with train2017's counts, lengths and disorder: read in seconds."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from helpers.data import CaptionedImages
from tests.coco_files import image_entry, write_annotations

IMAGES, CAPTIONS = 118_287, 591_753  # of train2017
LARGEST_ID = 581_929
PARTS = [
    "A man|Two women|A young girl|Several people|A brown dog|A giraffe|Ein Bär|犬|A café owner",
    "is riding|is standing next to|sits in front of|looks at|walks past|is holding|jumps over",
    'a skateboard|a red bus|an umbrella|a laptop computer|a wooden bench|two bicycles|a \\ or \\"',
    "on a city street|in a grassy field|in a small kitchen|at the beach|in the snow|at night",
    ", seen from above.|.|",
]


def caption_of(annotation_id: int) -> str:
    """What the file says under an annotation id."""
    words = []
    for part in PARTS:
        choices = part.split("|")
        words.append(choices[annotation_id % len(choices)])
        annotation_id //= len(choices)
    return " ".join(words)


def write_big_captions(root: Path):
    """Writes captions_train2017.json; returns the images' ids [N], and the captions' owners [M].

    The annotation with the id k + 1 belongs to the image owners[k]. Every image has five captions,
    a few have more, and neither images nor annotations are in any order.
    """
    rng = np.random.default_rng(0)
    image_ids = rng.choice(np.arange(1, LARGEST_ID + 1), IMAGES, replace=False)
    extra = rng.choice(image_ids, CAPTIONS - 5 * IMAGES, replace=False)
    owners = rng.permutation(np.concatenate([np.repeat(image_ids, 5), extra]))
    rows = [
        {"image_id": k, "id": i, "caption": caption_of(i)} for i, k in enumerate(owners.tolist(), 1)
    ]
    images = [image_entry(k, folder="train2017") for k in image_ids.tolist()]
    shuffled = [rows[k] for k in rng.permutation(CAPTIONS)]
    write_annotations(root, "captions_train2017.json", images, shuffled)
    return image_ids, owners


def test_captions_of_full_size(tmp_path):
    image_ids, owners = write_big_captions(tmp_path)
    start = time.process_time()
    images = CaptionedImages(tmp_path, "train2017")
    # Four seconds here; ten times as much would be something else.
    assert time.process_time() - start < 40
    assert len(images) == IMAGES and images.counts.sum() == CAPTIONS
    assert set(images.counts) == {5, 6}
    assert np.array_equal(images.image_ids, np.sort(image_ids))
    # By image, then by annotation id.
    order = np.lexsort((np.arange(CAPTIONS), owners))
    texts, positions = images.all_captions()
    assert np.array_equal(images.image_ids[positions], owners[order])
    assert texts == [caption_of(k + 1) for k in order.tolist()]
    assert images.path(7).name == f"{images.image_ids[7]:012d}.jpg"
    part = images.subset(images.image_ids[::1000])
    assert part.captions(3) == images.captions(3000)
