"""A folder in COCO 2017's layout: JPEGs of every kind that COCO holds, all of its annotations."""

import numpy as np
from PIL import Image, ImageDraw

from helpers.minicoco.sprites import CATEGORIES
from tests.coco_files import image_entry, write_annotations

SIZES = [(640, 480), (480, 640), (640, 427), (427, 640), (500, 375), (333, 500), (612, 612)]
KINDS = ["plain", "plain", "greyscale", "CMYK", "EXIF", "progressive"]
NOUNS = "dog cat bus car boat pizza couch bed".split()
COLOURS = "red green blue yellow white black".split()
PLACES = "on the beach, in the kitchen, on a street, in the snow, on a field, in a room".split(", ")
CAPTIONS = """A {0} {1} {2}.
A {1} {2} next to a person with a cup.
a {1} {2}
There is a {0} {1} {2} and someone looks at it from far away
The {1} is {0}. """.splitlines()


def write_coco(root, images):
    """`images` photographs with five captions each, boxes, polygons and a crowd here and there."""
    rng = np.random.default_rng(0)
    (root / "val2017").mkdir(parents=True)
    listed, captions, objects = [], [], []
    for i in range(images):
        image_id, (width, height) = 139 + 1097 * i, SIZES[i % len(SIZES)]
        noun, colour, place = (str(rng.choice(words)) for words in (NOUNS, COLOURS, PLACES))
        w, h = width // 2, height // 2
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        image = noise.resize((width, height))
        ImageDraw.Draw(image).ellipse([x, y, x + w, y + h], fill=colour)
        _save(image, root / "val2017" / f"{image_id:012d}.jpg", KINDS[i % len(KINDS)])
        listed.append(image_entry(image_id, width, height))
        for text in CAPTIONS:
            text = text.format(colour, noun, place)
            captions.append({"image_id": image_id, "id": 37 + len(captions), "caption": text})
        ring = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
        found = [(noun, [ring], [x, y, w, h], w * h / 2, 0)]
        person = [[2, 2, 30, 2, 30, 40, 2, 40]], [2.0, 2.0, 28.0, 38.0], 28.0 * 38
        found += [("person", *person, 0)] * (i % 3)
        found += [("person", *_crowd(width, height), 1)] * (i % 9 == 0)
        for name, *facts in found:
            row = dict(zip(("segmentation", "bbox", "area", "iscrowd"), facts))
            row |= {"image_id": image_id, "category_id": CATEGORIES[name]["id"]}
            objects.append(row | {"id": 900_000 + len(objects)})
    listed = [listed[i] for i in rng.permutation(images)]
    captions = [captions[k] for k in rng.permutation(len(captions))]
    kinds = [
        {"supercategory": row["supercategory"], "id": row["id"], "name": name}
        for name, row in CATEGORIES.items()
    ]
    write_annotations(root, "captions_val2017.json", listed, captions)
    write_annotations(root, "instances_val2017.json", listed, objects, categories=kinds)


def _crowd(width, height):
    """Run lengths, not packed, as COCO writes them, of a strip below; its box and area."""
    counts = [height - 20, 20] * 50  # column by column: off, then on
    runs = {"counts": [*counts, height * (width - 50)], "size": [height, width]}
    return runs, [0, height - 20, 50, 20], 1000


def _save(image, path, kind):
    """As a camera, a scanner or a print shop would."""
    exif = Image.Exif()
    if kind == "EXIF":
        # The camera was held upright: stored lying on its side, with a note.
        exif[0x0112] = 6
        image = image.transpose(Image.Transpose.ROTATE_90)
    elif kind in ("greyscale", "CMYK"):
        image = image.convert("L" if kind == "greyscale" else kind)
    image.save(path, progressive=kind == "progressive", exif=exif)
