"""A folder in COCO 2017's layout for tests: JPEGs of every kind that COCO holds, and annotations with its own keys."""

import json

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

CATEGORIES = {  # COCO's 80, by supercategory, in the order of their ids
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "backpack, umbrella, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket",
    "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, dining table, toilet",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
}
UNUSED = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (333, 500), (612, 612)]
KINDS = ["plain", "plain", "greyscale", "CMYK", "EXIF", "progressive"]
SHOWN = ["dog", "cat", "bus", "car", "boat", "pizza", "couch", "bed"]
COLOURS = ["red", "green", "blue", "yellow", "white", "black"]
PLACES = [
    "on the beach",
    "in the kitchen",
    "on a street",
    "in the snow",
    "on a grass field",
    "in a living room",
]


def categories():
    names = [(kind, name) for kind, names in CATEGORIES.items() for name in names.split(", ")]
    ids = [k for k in range(1, 91) if k not in UNUSED]
    return [
        {"supercategory": kind, "id": k, "name": name}
        for k, (kind, name) in zip(ids, names, strict=True)
    ]


def write_coco(root, images=64, folder="val2017", seed=0):
    """`images` photographs with five captions each, and with boxes, polygons and a crowd here and there."""
    rng, kinds = np.random.default_rng(seed), categories()
    number = {c["name"]: c["id"] for c in kinds}
    (root / folder).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    listed, captions, objects = [], [], []
    for i in range(images):
        image_id, (width, height), kind = (
            139 + 1097 * i,
            SIZES[i % len(SIZES)],
            KINDS[i % len(KINDS)],
        )
        name, colour, place = (
            words[int(rng.integers(len(words)))] for words in (SHOWN, COLOURS, PLACES)
        )
        w, h = int(width * rng.uniform(0.4, 0.6)), int(height * rng.uniform(0.4, 0.6))
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        picture = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(
            (width, height)
        )
        ImageDraw.Draw(picture).ellipse([x, y, x + w, y + h], fill=colour)
        _save(picture, root / folder / f"{image_id:012d}.jpg", kind)
        listed.append({
            "license": 4, "file_name": f"{image_id:012d}.jpg", "height": height, "width": width, "id": image_id,
            "coco_url": f"http://images.cocodataset.org/{folder}/{image_id:012d}.jpg",
            "date_captured": "2013-11-14 17:02:52", "flickr_url": f"http://farm7.staticflickr.com/6116/{image_id}_z.jpg",
        })  # fmt: skip
        told = [
            f"A {colour} {name} {place}.",
            f"A {name} {place} next to a person with a cup.",
            f"a {name} {place}",
            f"There is a {colour} {name} {place} and someone looks at it from far away",
            f"The {name} is {colour}. ",
        ]
        captions += [
            {"image_id": image_id, "id": 37 + 5 * i + k, "caption": text}
            for k, text in enumerate(told)
        ]
        ring = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
        found = [(name, [ring], [x, y, w, h], w * h / 2, 0)]
        found += [
            ("person", [[2, 2, 30, 2, 30, 40, 2, 40]], [2.0, 2.0, 28.0, 38.0], 28.0 * 38, 0)
        ] * (i % 3)
        if i % 9 == 0:  # a crowd: run lengths, not packed, as COCO writes them
            crowd = np.zeros((height, width), np.uint8, order="F")
            crowd[-20:, :50] = 1
            runs = np.diff(
                np.flatnonzero(np.diff(crowd.flatten(order="F"), prepend=2, append=2))
            ).tolist()
            runs = {"counts": [0, *runs] if crowd[0, 0] else runs, "size": [height, width]}
            assert rle.decode(rle.frPyObjects(runs, height, width)).sum() == 1000
            found.append(("person", runs, [0, height - 20, 50, 20], 1000, 1))
        for name, where, box, area, crowd in found:
            objects.append({
                "segmentation": where, "area": area, "iscrowd": crowd, "image_id": image_id, "bbox": box,
                "category_id": number[name], "id": 900_000 + len(objects),
            })  # fmt: skip
    about = {
        "info": {"description": "COCO 2017 Dataset", "url": "http://cocodataset.org", "version": "1.0", "year": 2017,
                 "contributor": "COCO Consortium", "date_created": "2017/09/01"},
        "licenses": [{"url": "http://creativecommons.org/licenses/by/2.0/", "id": 4, "name": "Attribution License"}],
        "images": [listed[i] for i in rng.permutation(images)],
    }  # fmt: skip
    for file, parts in {
        f"captions_{folder}.json": {
            "annotations": [captions[k] for k in rng.permutation(len(captions))]
        },
        f"instances_{folder}.json": {"annotations": objects, "categories": kinds},
    }.items():
        (root / "annotations" / file).write_text(json.dumps({**about, **parts}))


def _save(picture, path, kind):
    """As a camera, a scanner or a print shop would."""
    if kind == "greyscale":
        picture.convert("L").save(path)
    elif kind == "CMYK":
        picture.convert("CMYK").save(path)
    elif kind == "EXIF":  # the camera was held upright: stored lying on its side, with a note
        exif = Image.Exif()
        exif[0x0112] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    else:
        picture.save(path, progressive=kind == "progressive")
