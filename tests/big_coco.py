"""A captions file as large as COCO's own for train2017: the same counts, lengths and disorder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.coco_files import INFO, LICENSES, image_entry

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
    words, k = [], annotation_id
    for part in PARTS:
        choices = part.split("|")
        words.append(choices[k % len(choices)])
        k //= len(choices)
    return " ".join(words)


def write_big_captions(path: Path) -> dict:
    """Writes annotations/captions_*.json; returns {"image_ids": [N], "owners": [M]}, as arrays.

    The annotation with the id k + 1 belongs to the image owners[k]. Every image has five captions,
    a few have more, and neither images nor annotations are in any order.
    """
    rng = np.random.default_rng(0)
    image_ids = rng.choice(np.arange(1, LARGEST_ID + 1), IMAGES, replace=False)
    extra = rng.choice(image_ids, CAPTIONS - 5 * IMAGES, replace=False)
    owners = rng.permutation(np.concatenate([np.repeat(image_ids, 5), extra]))
    annotations = [
        {"image_id": owner, "id": k, "caption": caption_of(k)}
        for k, owner in enumerate(owners.tolist(), 1)
    ]
    content = {
        "info": INFO,
        "licenses": LICENSES,
        "images": [image_entry(k, folder="train2017") for k in image_ids.tolist()],
        "annotations": [annotations[k] for k in rng.permutation(CAPTIONS)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return {"image_ids": image_ids, "owners": owners}
