"""Small data sets in COCO's own files, for the tests."""

import dataclasses
import json

import numpy as np
from PIL import Image

from helpers.config import ROOT, get_profile

SAMPLE = ROOT.parent / "shared" / "coco-sample"
LICENSES = [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution"}]
INFO = {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0"}
IDS = [139, 285, 632, 724, 776, 785, 802, 872, 885, 1000, 1268, 581781]
WORDS = "a dog|zwei Bären|ein Café|犬が走る|🐕 runs|A giraffe eating from the tree.".split("|")


def image_entry(image_id, width=48, height=32, folder="val2017"):
    """What COCO says of an image, with all of its keys."""
    name = f"{image_id:012d}.jpg"
    return {
        "license": 4,
        "file_name": name,
        "coco_url": f"http://images.cocodataset.org/{folder}/{name}",
        "height": height,
        "width": width,
        "date_captured": "2013-11-14 17:02:52",
        "flickr_url": f"http://farm7.staticflickr.com/6116/{image_id}_z.jpg",
        "id": image_id,
    }


def write_annotations(root, name, images, annotations, **more):
    """An annotation file with COCO's own keys."""
    path = root / "annotations" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"info": INFO, "licenses": LICENSES, "images": images, "annotations": annotations}
    path.write_text(json.dumps(content | more))


def write_captions(root, captions: dict[int, list[str]], folder="val2017"):
    """A captions file: images in the order given, captions of different images interleaved."""
    rows = [
        {"image_id": image_id, "id": 37 + 2 * (row + 100 * k), "caption": text}
        for row, (image_id, texts) in enumerate(captions.items())
        for k, text in enumerate(texts)
    ]
    images = [image_entry(image_id, folder=folder) for image_id in captions]
    rows.sort(key=lambda row: row["id"])
    write_annotations(root, f"captions_{folder}.json", images, rows)


def write_images(root, ids, folder="val2017", grows=0):
    """Images of 48 × 32 pixels; grows: how much higher each is than the one before."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i, image_id in enumerate(ids):
        pixels = np.random.default_rng(image_id).integers(0, 256, (4, 6, 3), np.uint8)
        image = Image.fromarray(pixels).resize((48, 32 + grows * i))
        image.save(root / folder / f"{image_id:012d}.jpg")


def write_twelve(root):
    """Twelve images in shuffled order with four to six captions each."""
    ids = np.random.default_rng(0).permutation(IDS).tolist()
    captions = {i: [f"{i} {WORDS[(i + k) % 6]}" for k in range(4 + i % 3)] for i in ids}
    write_captions(root, captions)
    write_images(root, IDS)
    return root


def profile(root, **changes):
    """The profile coco-val over the files in `root`, with splits of 5, 3 and 4 images."""
    small = {"data": root, "train_images": 5, "dev_images": 3, "val_images": 4}
    return dataclasses.replace(get_profile("coco-val"), **(small | changes))


def elsewhere(name, folder, **changes):
    """A profile with folders of its own."""

    class Elsewhere(type(get_profile(name))):
        cache = folder / "cache"
        trained = folder / "trained"
        results = folder / "results"

    return Elsewhere(**{**vars(get_profile(name)), **changes})
