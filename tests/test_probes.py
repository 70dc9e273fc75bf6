"""helpers/instances.py against hand-written files in COCO's format and pycocotools."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
from pycocotools.coco import COCO

from helpers.data import CaptionedImages
from helpers.probes import Instances, load_probes
from tests.coco_files import IDS, LICENSES, image_entry, profile, write_images, write_twelve

CATEGORIES = [
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "vehicle", "id": 3, "name": "car"},
]


def instance(annotation_id, image_id, category_id, bbox, **more):
    x, y, w, h = bbox
    polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    entry = {
        "segmentation": polygon,
        "area": w * h,
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": bbox,
    }
    return entry | {"category_id": category_id, "id": annotation_id} | more


def write_instances(root, annotations, ids=IDS, name="val2017"):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    images = [image_entry(image_id) for image_id in ids]
    data = {
        "info": {},
        "licenses": LICENSES,
        "images": images,
        "annotations": annotations,
        "categories": CATEGORIES,
    }
    path = root / "annotations" / f"instances_{name}.json"
    path.write_text(json.dumps(copy.deepcopy(data)))
    return path


@pytest.fixture
def root(tmp_path):
    return write_twelve(tmp_path)


@pytest.fixture
def instances(root):
    crowd = {"segmentation": {"counts": [0, 32 * 10, 32 * 38], "size": [32, 48]}, "iscrowd": 1}
    path = write_instances(
        root,
        [
            instance(1, 139, 18, [4, 4, 20, 16]),
            instance(2, 139, 18, [20, 10, 8, 8]),
            instance(3, 139, 1, [0, 0, 6, 6]),
            instance(4, 285, 3, [30, 8, 16, 10]),
            instance(5, 632, 1, [0, 0, 10, 32], **crowd),
            instance(6, 724, 1, [0, 0, 40, 10]),  # a square around it would not fit
            instance(7, 776, 1, [0, 0, 20, 20]),
            instance(8, 776, 3, [20, 0, 20, 20]),
        ],
    )
    return Instances(root), COCO(path)


def test_labels_boxes_and_masks(instances, capsys):
    ours, oracle = instances
    capsys.readouterr()
    assert ours.names == ["person", "car", "dog"]
    assert ours.labels([139, 285, 785]).tolist() == [
        [True, False, True],
        [False, True, False],
        [False] * 3,
    ]
    assert ours.boxes(139)[0] == ("dog", (4, 4, 20, 16)) and len(ours.boxes(139)) == 3
    for image_id, name, category in [(139, "dog", 18), (139, "person", 1), (632, "person", 1)]:
        expected = (
            sum(oracle.annToMask(a) for a in oracle.loadAnns(oracle.getAnnIds(image_id, category)))
            > 0
        )
        mask = ours.mask(image_id, name)
        assert mask.dtype == bool and mask.any() and np.array_equal(mask, expected)
    empty = ours.mask(139, "car")
    assert empty.shape == (32, 48) and empty.dtype == bool and not empty.any()
    assert capsys.readouterr().out == ""


def test_labels_of_an_unlisted_image(instances):
    with pytest.raises(KeyError, match="instances_val2017.json does not list image 140"):
        instances[0].labels([140])


def test_instances_errors(root):
    with pytest.raises(FileNotFoundError, match="instances_val2017.json does not exist"):
        Instances(root)
    with pytest.raises(ValueError, match="captions_val2017.json has no `categories`"):
        Instances(root, "captions_val2017.json")


def test_probes_of_coco_are_crops_of_val(root, instances):
    row = profile(root, train_folder="train2017", val_images=None)
    probes = load_probes(row)
    assert list(probes) == ["known"]
    known = probes["known"]
    assert [path.name for path in known.paths] == ["000000000139.jpg", "000000000285.jpg"]
    assert [known.names[label] for label in known.labels] == ["dog", "car"]
    assert known.squares == [(4, 2, 24, 22), (30, 5, 46, 21)]
    assert (
        len(known) == 2
        and known.image(0).size == (20, 20)
        and known.image(1, size=8).size == (16, 16)
    )
    whole = CaptionedImages(root).image(0)
    assert np.array_equal(known.image(0), whole.crop((4, 2, 24, 22)))


def test_probes_of_minicoco(root):
    for name in ("known", "unseen_drawing", "uncaptioned", "unseen", "pairs"):
        more = {"colour": "red"} if name == "pairs" else {}
        found = [instance(k, 40 + k, 18 - 15 * k, [4, 4, 20, 16], **more) for k in range(2)]
        write_instances(root / "probes", found, [40, 41], name)
        write_images(root / "probes", [40, 41], name)
    probes = load_probes(profile(root))
    assert list(probes) == ["known", "unseen_drawing", "uncaptioned", "unseen", "pairs"]
    for name, probe in probes.items():
        assert [probe.names[label] for label in probe.labels] == ["dog", "car"]
        assert probe.image(1).size == (48, 32) and probe.image(1, 16).size == (24, 16)
        assert probe.paths[0] == root / "probes" / name / "000000000040.jpg"
        assert probe.colours == (["red", "red"] if name == "pairs" else None)
