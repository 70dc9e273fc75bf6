"""A captions file as large as COCO's own for train2017, in seconds: the same keys, counts, lengths and disorder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

IMAGES, CAPTIONS = 118_287, 591_753  # of train2017
LARGEST_ID = 581_929
WHO = "A man|Two women|A young girl|Several people|A brown dog|A black and white cat|A giraffe|Ein Bär|犬|A café owner"
DOES = "is riding|is standing next to|sits in front of|looks at|walks past|is holding|is eating|jumps over"
WHAT = 'a skateboard|a red bus|a slice of pizza|an umbrella|a laptop computer|a wooden bench|two bicycles|a \\ or \\"'
WHERE = "on a city street|in a grassy field|in a small kitchen|at the beach|in the snow|near the water|at night"


def caption_of(annotation_id: int) -> str:
    """What the file says under an annotation id."""
    words, k = [], annotation_id
    for choices in (WHO, DOES, WHAT, WHERE):
        choices = choices.split("|")
        words.append(choices[k % len(choices)])
        k //= len(choices)
    return f"{' '.join(words)}{'.' if k % 3 else ', seen from above.'}"


def write_big_captions(
    path: Path, images: int = IMAGES, captions: int = CAPTIONS, seed: int = 0
) -> dict:
    """Writes annotations/captions_*.json; returns {"image_ids": [N] in the file's order, "owners": [M]}, as arrays.

    The annotation with the id k + 1 belongs to the image owners[k]. Every image has five captions, a few have more, and
    neither images nor annotations are in any order.
    """
    rng = np.random.default_rng(seed)
    image_ids = rng.choice(np.arange(1, LARGEST_ID + 1), images, replace=False)
    owners = np.concatenate(
        [np.repeat(image_ids, 5), rng.choice(image_ids, captions - 5 * images, replace=False)]
    )
    rng.shuffle(owners)
    told = [
        json.dumps(caption_of(k), ensure_ascii=True) for k in range(1, 3 * 10 * 8 * 8 * 7 + 1)
    ]  # then it repeats
    listed = [
        f'{{"license": 3, "file_name": "{k:012d}.jpg", '
        f'"coco_url": "http://images.cocodataset.org/train2017/{k:012d}.jpg", "height": 427, "width": 640, '
        f'"date_captured": "2013-11-14 16:28:13", '
        f'"flickr_url": "http://farm5.staticflickr.com/4153/5014840534_ba31a6ac08_z.jpg", "id": {k}}}'
        for k in image_ids.tolist()
    ]
    annotations = [
        f'{{"image_id": {owner}, "id": {k + 1}, "caption": {told[k % len(told)]}}}'
        for k, owner in enumerate(owners.tolist())
    ]
    order = rng.permutation(captions).tolist()
    info = {
        "description": "COCO 2017 Dataset",
        "url": "http://cocodataset.org",
        "version": "1.0",
        "year": 2017,
    }
    licenses = [
        {"url": "http://creativecommons.org/licenses/by-nc-nd/2.0/", "id": 3, "name": "BY-NC-ND"}
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'{{"info": {json.dumps(info)}, "licenses": {json.dumps(licenses)}, "images": [')
        file.write(
            ", ".join(listed)
            + '], "annotations": ['
            + ", ".join(annotations[k] for k in order)
            + "]}"
        )
    return {"image_ids": image_ids, "owners": owners}
