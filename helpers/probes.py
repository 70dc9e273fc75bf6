"""What is in the photographs of COCO 2017: labels, boxes and masks, and the sets on which a model is probed.

<root>/annotations/instances_{train,val}2017.json   MiniCOCO: <root>/probes/*, beside it in the same layout
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

from helpers.data import load_split
from helpers.storage.caption_files import read_json
from helpers.storage.images import open_image

PROBES = ("known", "unseen_drawing", "uncaptioned", "unseen", "pairs")


class Instances:
    """Labels, boxes and masks of <root>/annotations/<file>, through pycocotools; `names` [C] in category-id order."""

    def __init__(self, root, file: str = "instances_val2017.json"):
        self.path = Path(root) / "annotations" / file
        self.coco = COCO()
        self.coco.dataset, _ = read_json(self.path, "images", "annotations", "categories")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.names = [self.coco.cats[k]["name"] for k in sorted(self.coco.cats)]
        self.column = {
            k: c for c, k in enumerate(sorted(self.coco.cats))
        }  # category id → position in names

    def annotations(self, image_id) -> list[dict]:
        """What the file says about one image; KeyError if it does not list the image."""
        if image_id not in self.coco.imgs:
            raise KeyError(f"{self.path} does not list image {image_id}.")
        return self.coco.imgToAnns.get(image_id, [])

    def labels(self, image_ids) -> np.ndarray:
        """Which categories occur in each image: bool [N, C]."""
        labels = np.zeros((len(image_ids), len(self.names)), bool)
        for row, image_id in zip(labels, image_ids, strict=True):
            row[[self.column[a["category_id"]] for a in self.annotations(image_id)]] = True
        return labels

    def boxes(self, image_id) -> list[tuple[str, tuple[float, float, float, float]]]:
        """(name, (left, top, width, height)) of each object, in pixels."""
        return [
            (self.names[self.column[a["category_id"]]], tuple(a["bbox"]))
            for a in self.annotations(image_id)
        ]

    def mask(self, image_id, category: str) -> np.ndarray:
        """The pixels of all objects of a category: bool [H, W]."""
        found = [
            a
            for a in self.annotations(image_id)
            if self.column[a["category_id"]] == self.names.index(category)
        ]
        height, width = (self.coco.imgs[image_id][side] for side in ("height", "width"))
        return np.logical_or.reduce(
            [self.coco.annToMask(a) for a in found] or [np.zeros((height, width))]
        )


@dataclass
class LabelledImages:
    """Pictures of one object each; `names[labels[i]]` says which."""

    paths: list[Path]
    labels: np.ndarray  # [N] position in names
    names: list[str]
    colours: list[str] | None = None
    squares: list[tuple] | None = (
        None  # (left, top, right, bottom): the part of the picture that counts
    )

    def __len__(self):
        return len(self.paths)

    def image(self, i, size: int | None = None) -> Image.Image:
        return (
            open_image(self.paths[i]).crop(self.squares[i])
            if self.squares
            else open_image(self.paths[i], size)
        )


def load_probes(profile) -> dict[str, LabelledImages]:
    """Single objects to classify: MiniCOCO's probe sets, or for COCO one set "known", cut out of the val split."""
    root = profile.data / "probes"
    return (
        {name: _read_probe(root, name) for name in PROBES}
        if root.is_dir()
        else {"known": object_crops(profile)}
    )


def _read_probe(root, name) -> LabelledImages:
    instances = Instances(root, f"instances_{name}.json")
    found = instances.coco.dataset["annotations"]
    paths = [root / name / instances.coco.imgs[a["image_id"]]["file_name"] for a in found]
    labels = np.array([instances.column[a["category_id"]] for a in found])
    colours = [a.get("colour") for a in found]
    return LabelledImages(paths, labels, instances.names, colours if all(colours) else None)


def object_crops(profile, split: str = "val", limit: int = 1000) -> LabelledImages:
    """Squares around the one object that covers a tenth or more of a photograph, where the square fits into it."""
    images = load_split(profile, split)
    instances = Instances(profile.data, f"instances_{images.folder}.json")
    paths, labels, squares = [], [], []
    for i, image_id in enumerate(images.image_ids):
        if image_id not in instances.coco.imgs or len(paths) == limit:
            continue
        width, height = (instances.coco.imgs[image_id][side] for side in ("width", "height"))
        large = [
            a
            for a in instances.annotations(image_id)
            if np.prod(a["bbox"][2:]) >= 0.1 * width * height
        ]
        if (
            len(large) == 1
            and not large[0]["iscrowd"]
            and max(large[0]["bbox"][2:]) <= min(width, height)
        ):
            x, y, w, h = large[0]["bbox"]
            side = int(max(w, h))
            left = int(np.clip(x + w / 2 - side / 2, 0, width - side))
            top = int(np.clip(y + h / 2 - side / 2, 0, height - side))
            paths.append(images.path(i))
            labels.append(instances.column[large[0]["category_id"]])
            squares.append((left, top, left + side, top + side))
    return LabelledImages(paths, np.array(labels, int), instances.names, squares=squares)


def load_compositional(profile) -> dict[str, list[tuple[Path, str, str]]]:
    """Pictures with a true caption and a foil of the same words: {kind: [(path, caption, foil), …]}; {} without any."""
    folder = profile.data / "probes"
    file = folder / "annotations/captions_compositional.json"
    content = json.loads(file.read_text()) if file.is_file() else {"images": [], "annotations": []}
    path = {
        image["id"]: folder / "compositional" / image["file_name"] for image in content["images"]
    }
    triples = {}
    for a in content["annotations"]:
        triples.setdefault(a["kind"], []).append((path[a["image_id"]], a["caption"], a["foil"]))
    return triples
