"""helpers/probes.py against hand-written files in COCO's format and pycocotools."""

import numpy as np
import pytest
from pycocotools.coco import COCO

from helpers import load_or_build
from helpers.data import CaptionedImages
from helpers.probes import TASKS, Instances, classes, evaluate, load_compositional, load_probes
from tests import coco_files
from tests.coco_files import IDS, image_entry, profile, write_annotations, write_images

CATEGORIES = [
    {"supercategory": "animal", "id": 18, "name": "dog"},
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "vehicle", "id": 3, "name": "car"},
]


def instance(annotation_id, image_id, category_id, bbox, **more):
    x, y, w, h = bbox
    outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    row = {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox}
    return row | {"segmentation": outline, "area": w * h, "iscrowd": 0} | more


def write_instances(root, annotations, ids=IDS, name="val2017", categories=CATEGORIES):
    images, file = [image_entry(image_id) for image_id in ids], f"instances_{name}.json"
    write_annotations(root, file, images, annotations, categories=categories)


@pytest.fixture
def root(tmp_path):
    coco_files.write_twelve(tmp_path)
    crowd = {"segmentation": {"counts": [0, 32 * 10, 32 * 38], "size": [32, 48]}, "iscrowd": 1}
    rows = [
        instance(1, 139, 18, [4, 4, 20, 16]),
        instance(2, 139, 18, [20, 10, 8, 8]),
        instance(3, 139, 1, [0, 0, 6, 6]),
        instance(4, 285, 3, [30, 8, 16, 10]),
        instance(5, 632, 1, [0, 0, 10, 32], **crowd),
        instance(6, 724, 1, [0, 0, 40, 10]),  # a square around it would not fit
        instance(7, 776, 1, [0, 0, 20, 20]),
        instance(8, 776, 3, [20, 0, 20, 20]),
    ]
    write_instances(tmp_path, rows)
    return tmp_path


def test_labels_and_boxes(root):
    instances = Instances(root)
    assert instances.names == ["person", "car", "dog"]
    labels = [[True, False, True], [False, True, False], [False] * 3]
    assert instances.labels([139, 285, 785]).tolist() == labels
    with pytest.raises(FileNotFoundError, match="instances_train2017.json does not exist"):
        Instances(root, "instances_train2017.json")
    assert instances.boxes(139)[0] == ("dog", (4, 4, 20, 16)) and len(instances.boxes(139)) == 3
    with pytest.raises(KeyError, match="instances_val2017.json does not list image 140"):
        instances.labels([140])


def test_masks_are_those_of_pycocotools(root):
    instances, oracle = Instances(root), COCO(root / "annotations/instances_val2017.json")
    for image_id, name, category in [(139, "dog", 18), (139, "person", 1), (632, "person", 1)]:
        rows = oracle.loadAnns(oracle.getAnnIds(image_id, category))
        mask = instances.mask(image_id, name)
        assert mask.dtype == bool and mask.any()
        assert np.array_equal(mask, sum(oracle.annToMask(a) for a in rows) > 0)
    empty = instances.mask(139, "car")
    assert empty.shape == (32, 48) and empty.dtype == bool and not empty.any()


def test_probes_of_coco_are_crops_of_val(root):
    row = profile(root, train_folder="train2017", val_images=None)
    [(name, known)] = load_probes(row).items()
    assert name == "known" and len(known) == 2
    assert [path.name for path in known.paths] == ["000000000139.jpg", "000000000285.jpg"]
    assert [known.names[label] for label in known.labels] == ["dog", "car"]
    assert known.crop_boxes == [(4, 2, 24, 22), (30, 5, 46, 21)]
    assert known.image(0).size == (20, 20)
    whole = CaptionedImages(root).image(0)
    assert np.array_equal(known.image(0), whole.crop((4, 2, 24, 22)))
    assert load_compositional(row) == {}


def test_probes_of_minicoco(root):
    for name in TASKS:
        more = {"colour": "red"} if name == "novel_combinations" else {}
        rows = [instance(k, 40 + k, 18 - 15 * k, [4, 4, 20, 16], **more) for k in range(2)]
        write_instances(root / "probes", rows, [40, 41], name)
        write_images(root / "probes", [40, 41], name)
    probes = load_probes(profile(root))
    assert tuple(probes) == tuple(TASKS)
    for name, probe in probes.items():
        assert [probe.names[label] for label in probe.labels] == ["dog", "car"]
        assert probe.image(1).size == (48, 32)
        assert probe.paths[0] == root / "probes" / name / "000000000040.jpg"
        assert probe.colours == (["red", "red"] if name == "novel_combinations" else None)


def test_compositional_captions_by_kind(root):
    row = {"image_id": 40, "id": 1, "caption": "A cat and a dog.", "foil": "A dog and a cat."}
    rows = [row | {"kind": "order"}, row | {"image_id": 41, "kind": "binding"}]
    images = [image_entry(40), image_entry(41)]
    write_annotations(root / "probes", "captions_compositional.json", images, rows)
    triples = load_compositional(profile(root))
    assert list(triples) == ["order", "binding"]
    for (images, captions, foils), image_id in zip(triples.values(), (40, 41)):
        assert captions == ["A cat and a dog."] and foils == ["A dog and a cat."]
        assert images.paths == [root / f"probes/compositional/{image_id:012d}.jpg"]


def test_an_evaluation_says_everything_beside_its_chance(smoke):
    load_or_build.data(smoke, "val")
    metrics = evaluate(smoke, load_or_build.heads(smoke))
    expected = {f"{task}/{top}" for task in TASKS.values() for top in ("top1", "top5")}
    expected |= {"text_to_image/recall@1", "image_to_text/recall@10"}
    assert expected | {"classification/map", "compositional/accuracy"} <= set(metrics)
    for name, row in metrics.items():
        assert 0 <= row["value"] <= (1 if "rank" not in name else 1e9), name
    assert metrics["text_to_image/recall@5"]["chance"] == 5 / smoke.val_images
    assert metrics["compositional/accuracy"]["chance"] == 0.5


def test_novel_combinations_are_classified_by_colour_and_category(smoke):
    load_or_build.data(smoke, "val")
    probe = load_probes(smoke)["novel_combinations"]
    names, labels = classes(probe)
    for label, category, colour in zip(labels, probe.labels, probe.colours, strict=True):
        assert names[label] == f"{colour} {probe.names[category]}"
