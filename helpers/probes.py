"""What is in the images of COCO 2017, the sets to probe a model on, and what it makes of them.

<root>/annotations/instances_{train,val}2017.json; MiniCOCO has <root>/probes/ and, for dev,
<root>/probes_dev/ in the same layout.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from sklearn.metrics import average_precision_score

from helpers import evaluation
from helpers.data import load_split
from helpers.evaluation import doubles, wilson
from helpers.features import embed_images, embed_texts
from helpers.minicoco.sprites import COLOURS
from helpers.model import CLIP
from helpers.storage.caption_files import read_json
from helpers.storage.images import open_image

# In the results, what is asked of each probe.
TASKS = {
    "known": "classification",
    "unseen_drawing": "classification_unseen_drawing",
    "uncaptioned": "zero_shot",
    "unseen": "zero_shot_unseen",
    "novel_combinations": "zero_shot_pairs",
}


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


def load_instances(profile, split: str = "val") -> Instances | None:
    """The labels, boxes and masks of a split; None where its data has none."""
    file = f"instances_{getattr(profile, f'{split}_folder')}.json"
    known = Path(profile.data, "annotations", file).is_file()
    return Instances(profile.data, file) if known else None


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

    def image(self, i) -> Image.Image:
        """Image i, or the part of it that counts."""
        image = open_image(self.paths[i])
        return image.crop(self.crop_boxes[i]) if self.crop_boxes else image


def load_probes(profile, split: str = "val") -> dict[str, LabelledImages]:
    """Single objects to classify, for "val" or "dev": MiniCOCO's sets; of COCO "known", cut out.

    {} where nothing says what the images show.
    """
    root = profile.data / ("probes" if split == "val" else f"probes_{split}")
    if not root.is_dir():
        crops = object_crops(profile, split)
        return {} if crops is None else {"known": crops}
    probes = {}
    for name in TASKS:
        if not (root / name).is_dir():
            continue
        instances = Instances(root, f"instances_{name}.json")
        annotations = instances.coco.dataset["annotations"]
        files = [instances.coco.imgs[a["image_id"]]["file_name"] for a in annotations]
        labels = np.array([instances.column[a["category_id"]] for a in annotations])
        colours = [a["colour"] for a in annotations if "colour" in a] or None
        paths = [root / name / file for file in files]
        probes[name] = LabelledImages(paths, labels, instances.names, colours)
    return probes


def object_crops(profile, split: str = "val", limit: int = 1000) -> LabelledImages | None:
    """Squares around the one object that covers a tenth of an image or more, if they fit in.

    None where nothing says what the images show.
    """
    instances = load_instances(profile, split)
    if instances is None:
        return None
    images = load_split(profile, split)
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


def classes(probe):
    """The classes of a probe's images and each image's own among them: (names [C], labels [n])."""
    own, labels = np.unique(probe.labels, return_inverse=True)
    names = [probe.names[c] for c in own]
    if probe.colours is None:
        return names, labels
    # Every colour with each category: both must be right.
    colours = list(COLOURS)
    colour_labels = np.array([colours.index(colour) for colour in probe.colours])
    names = [f"{colour} {name}" for name in names for colour in colours]
    return names, labels * len(colours) + colour_labels


def mean_average_precision(scores, labels):
    """Mean over categories of the average precision of ranking images by score.

    scores [N, C]; labels bool [N, C]. Categories that no image shows are left out. ValueError when
    none is shown, or a score is not a number.
    """
    scores, labels = doubles(scores).numpy(), doubles(labels).numpy() > 0
    columns = np.flatnonzero(labels.any(axis=0))
    if not len(columns):
        raise ValueError("no image shows any category: check that labels and images match")
    return float(np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in columns]))


def average_precision_chance(labels):
    """The mean average precision of random scores, in expectation; labels bool [N, C].

    Not the share of images that show a category: the first few places weigh more than the rest,
    and an image that shows it has itself at its own place. Bestgen 2015, PBML 103.
    """
    n, shown = len(labels), doubles(labels).sum(dim=0)  # [C], images that show each category
    # Of the images before one that shows it, the share that shows it too; mean over categories.
    others = ((shown[shown > 0] - 1) / max(1, n - 1)).mean().item()
    harmonic = float((1 / np.arange(1, n + 1)).sum())
    return (harmonic + others * (n - harmonic)) / n


def compositional(image_embeds, caption_embeds, foil_embeds):
    """How often an image is nearer to its caption than to a foil of the same words; all [N, E]."""
    images, captions, foils = (doubles(e) for e in (image_embeds, caption_embeds, foil_embeds))
    right = (images * captions).sum(dim=1) > (images * foils).sum(dim=1)
    n, hits = len(right), int(right.sum())
    return {"accuracy": hits / n, "interval": wilson(hits, n), "chance": 0.5, "n": n}


@torch.no_grad()
def evaluate(profile, model: CLIP, split: str = "val") -> dict[str, dict]:
    """All that the course reports of a model: {"text_to_image/recall@1": {"value", "chance"}, …}.

    Where a value is a share of n trials, "n" stands beside it, and in "hits" which of them hit.
    """
    images = load_split(profile, split)
    device, batch_size = model.logit_scale.device, profile.batch_size

    def image_vectors(those):
        features = embed_images(model.image_tower, those, batch_size)
        return model.project_image(features.to(device)).cpu()

    def text_vectors(those):
        features = embed_texts(model.text_tower, those, batch_size)
        return model.project_text(features.to(device)).cpu()

    captions, owner = images.all_captions()
    embeds = image_vectors(images), text_vectors(captions)
    chance = evaluation.retrieval_chance(owner)
    recalls = evaluation.retrieval(*embeds, owner)
    metrics = {name: {"value": v, "chance": chance.get(name)} for name, v in recalls.items()}
    for task, hits in hits_at(*embeds, owner).items():
        metrics[f"{task}/recall@1"]["hits"] = packed(hits)
    for name, probe in load_probes(profile, split).items():
        names, labels = classes(probe)
        vectors = evaluation.class_embeds(text_vectors, names)
        result = evaluation.classify(image_vectors(probe), vectors, labels)
        for top in ("top1", "top5"):
            row = {"value": result[top], "chance": result[f"{top}_chance"], "n": result["n"]}
            metrics[f"{TASKS[name]}/{top}"] = row
        hits = result["predictions"] == torch.as_tensor(labels)
        metrics[f"{TASKS[name]}/top1"]["hits"] = packed(hits)
    instances = load_instances(profile, split)
    if instances:
        labels = instances.labels(images.image_ids)
        scores = embeds[0] @ evaluation.class_embeds(text_vectors, instances.names).T
        precision = mean_average_precision(scores, labels)
        chance = average_precision_chance(labels)
        metrics["classification/map"] = {"value": precision, "chance": chance}
    triples = load_compositional(profile).values() if split == "val" else ()
    if triples:
        parts = [(image_vectors(p), text_vectors(true), text_vectors(foils))
                 for p, true, foils in triples]  # fmt: skip
        result = compositional(*(torch.cat(part) for part in zip(*parts)))
        row = {"value": result["accuracy"], "chance": result["chance"], "n": result["n"]}
        metrics["compositional/accuracy"] = row
    return metrics


def hits_at(image_embeds, text_embeds, owner, k=1):
    """Which queries find a right answer among the first k; arguments as in `retrieval`.

    Returns {"text_to_image": bool [M], "image_to_text": bool [N]}.
    """
    images = torch.arange(len(image_embeds))
    text_ranks = evaluation.ranks(text_embeds, image_embeds, owner, images)  # [M, 1]
    image_ranks = evaluation.ranks(image_embeds, text_embeds, images, owner)  # [N, R]
    return {"text_to_image": text_ranks[:, 0] <= k, "image_to_text": image_ranks[:, 0] <= k}


def packed(hits) -> str:
    """Booleans as hexadecimal digits; `unpacked` gives them back, with up to 7 zeros at the end."""
    return np.packbits(np.asarray(hits, bool)).tobytes().hex()


def unpacked(digits: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8))


def change(tables: list[dict], before: list[dict], metric: str, images) -> dict:
    """`evaluation.difference` of one metric between two models, by tables of `evaluate`.

    tables, before: one a seed, paired in order; images [Q]: the image of each query.
    """

    def hits(some):
        return np.stack([unpacked(table[metric]["hits"])[: len(images)] for table in some])

    return evaluation.difference(hits(tables), hits(before), images)
