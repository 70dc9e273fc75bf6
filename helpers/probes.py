"""What is in the images of COCO 2017: labels, boxes and masks, and the sets to probe a model on.

<root>/annotations/instances_{train,val}2017.json; MiniCOCO has <root>/probes/ in the same layout.
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

PROBES = ("known", "unseen_drawing", "uncaptioned", "unseen", "novel_combinations")


class Instances:
    """Labels, boxes and masks of <root>/annotations/<file>, through pycocotools.

    names [C]: the categories in the order of their ids; column: category id to position in names.
    """

    def __init__(self, root, file: str = "instances_val2017.json"):
        self.path = Path(root) / "annotations" / file
        self.coco = COCO()
        self.coco.dataset, _ = read_json(self.path, "images", "annotations", "categories")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        ids = sorted(self.coco.cats)
        self.names = [self.coco.cats[category_id]["name"] for category_id in ids]
        self.column = {category_id: c for c, category_id in enumerate(ids)}

    def annotations(self, image_id) -> list[dict]:
        """The file's entries for one image; KeyError if it does not list the image."""
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
        annotations = self.annotations(image_id)
        return [(self.names[self.column[a["category_id"]]], tuple(a["bbox"])) for a in annotations]

    def mask(self, image_id, category: str) -> np.ndarray:
        """The pixels of all objects of a category: bool [H, W]."""
        c = self.names.index(category)
        mask = np.zeros(self.size(image_id)[::-1], bool)
        for a in self.annotations(image_id):
            if self.column[a["category_id"]] == c:
                mask |= self.coco.annToMask(a) > 0
        return mask

    def size(self, image_id) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.coco.imgs[image_id]["width"], self.coco.imgs[image_id]["height"]


@dataclass
class LabelledImages:
    """Images of one object each; `names[labels[i]]` says which."""

    paths: list[Path]
    labels: np.ndarray  # [N] position in names
    names: list[str]
    colours: list[str] | None = None
    crop_boxes: list[tuple] | None = None  # left, top, right, bottom of the part that counts

    def __len__(self):
        return len(self.paths)

    def image(self, i, size: int | None = None) -> Image.Image:
        """Image i; `size` as for `open_image`, for a crop at full size."""
        if self.crop_boxes:
            return open_image(self.paths[i]).crop(self.crop_boxes[i])
        return open_image(self.paths[i], size)


def load_probes(profile) -> dict[str, LabelledImages]:
    """Single objects to classify: MiniCOCO's sets, or for COCO "known", cut out of val."""
    root = profile.data / "probes"
    if not root.is_dir():
        return {"known": object_crops(profile)}
    probes = {}
    for name in PROBES:
        instances = Instances(root, f"instances_{name}.json")
        annotations = instances.coco.dataset["annotations"]
        files = [instances.coco.imgs[a["image_id"]]["file_name"] for a in annotations]
        labels = np.array([instances.column[a["category_id"]] for a in annotations])
        colours = [a["colour"] for a in annotations if "colour" in a] or None
        paths = [root / name / file for file in files]
        probes[name] = LabelledImages(paths, labels, instances.names, colours)
    return probes


def object_crops(profile, split: str = "val", limit: int = 1000) -> LabelledImages:
    """Squares around the one object that covers a tenth of an image or more, if they fit in."""
    images = load_split(profile, split)
    instances = Instances(profile.data, f"instances_{images.folder}.json")
    paths, labels, crop_boxes = [], [], []
    for i, image_id in enumerate(images.image_ids):
        if image_id not in instances.coco.imgs or len(paths) == limit:
            continue
        width, height = instances.size(image_id)
        area = 0.1 * width * height
        large = [a for a in instances.annotations(image_id) if np.prod(a["bbox"][2:]) >= area]
        if len(large) != 1 or large[0]["iscrowd"]:
            continue
        x, y, w, h = large[0]["bbox"]
        if max(w, h) <= min(width, height):
            side = int(max(w, h))
            left = int(np.clip(x + w / 2 - side / 2, 0, width - side))
            top = int(np.clip(y + h / 2 - side / 2, 0, height - side))
            paths.append(images.path(i))
            labels.append(instances.column[large[0]["category_id"]])
            crop_boxes.append((left, top, left + side, top + side))
    return LabelledImages(paths, np.array(labels, int), instances.names, crop_boxes=crop_boxes)


def load_compositional(profile) -> dict[str, tuple[LabelledImages, list[str], list[str]]]:
    """Images, true captions, foils of the same words: {kind: (images, captions, foils)}.

    {} where there is no such probe.
    """
    folder = profile.data / "probes"
    file = folder / "annotations/captions_compositional.json"
    if not file.is_file():
        return {}
    content = json.loads(file.read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    triples = {}
    for kind in dict.fromkeys(a["kind"] for a in content["annotations"]):
        rows = [a for a in content["annotations"] if a["kind"] == kind]
        paths = [folder / "compositional" / files[a["image_id"]] for a in rows]
        images = LabelledImages(paths, np.zeros(len(rows), int), [kind])
        triples[kind] = images, [a["caption"] for a in rows], [a["foil"] for a in rows]
    return triples
