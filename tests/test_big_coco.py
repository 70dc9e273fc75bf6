"""Captions of COCO's full size: read whole, held in little memory, and shared with workers."""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import tracemalloc
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest

from helpers.data import CaptionedImages
from tests.big_coco import CAPTIONS, IMAGES, caption_of, write_big_captions

MB = 2**20


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """What was written, and what was read of it."""
    root = tmp_path_factory.mktemp("big")
    written = write_big_captions(root / "annotations" / "captions_train2017.json")
    return written, CaptionedImages(root, "train2017")


def digest(texts):
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def test_every_caption_is_read_and_belongs_to_its_image(big):
    written, images = big
    assert (
        len(images) == IMAGES and images.counts.sum() == CAPTIONS and set(images.counts) == {5, 6}
    )
    assert np.array_equal(images.image_ids, np.sort(written["image_ids"]))
    order = np.lexsort((np.arange(CAPTIONS), written["owners"]))  # by image, then by annotation id
    texts, positions = images.all_captions()
    assert np.array_equal(images.image_ids[positions], written["owners"][order])
    assert digest(texts) == digest(caption_of(k + 1) for k in order.tolist())
    assert images.path(7).name == f"{images.image_ids[7]:012d}.jpg"


def test_what_is_held_is_a_few_arrays(big):
    _, images = big
    arrays = [
        *images.table[1:],
        *(value for value in vars(images).values() if isinstance(value, np.ndarray)),
    ]
    assert all(array.dtype != object for array in arrays)
    assert sum(array.nbytes for array in arrays) < 60 * MB  # 300 are allowed
    few = [value for value in vars(images).values() if not isinstance(value, np.ndarray)]
    assert sum(len(value) for value in few if isinstance(value, (list, dict, set))) == 0


def test_memory_of_reading_a_tenth(tmp_path):
    """A tenth of 1.5 GB at the peak and of 300 MB held would be allowed."""
    write_big_captions(
        tmp_path / "annotations" / "captions_train2017.json", IMAGES // 10, CAPTIONS // 10
    )
    gc.collect()
    tracemalloc.start()
    try:
        images = CaptionedImages(tmp_path, "train2017")
        gc.collect()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(images) == IMAGES // 10
    assert held < 8 * MB and peak < 100 * MB


def seen(images):
    """What there is to see of a data set: a hash of all that is in the table, and some captions."""
    content = hashlib.sha256()
    for array in images.table[1:]:
        content.update(array.view(np.uint8))
    part = images.subset(images.image_ids[::1000])
    return content.hexdigest(), images.table.files.dtype, part.all_captions()[0], part.path(3)


def see(images, answers):
    answers.send(seen(images))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_see_the_same(big, method):
    _, images = big
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    worker = context.Process(target=see, args=(images, there))
    worker.start()
    found = here.recv()
    worker.join()
    assert found == seen(images)


def test_what_is_sent_to_a_spawned_worker_is_small(big):
    """Handles of the captions' memory, not the captions; what is left are the ids and the two counts of each image."""
    _, images = big
    sent = len(ForkingPickler.dumps(images))
    assert sent < 3 * 8 * len(images) + 10_000
    assert len(ForkingPickler.dumps(images.table)) < 10_000
    assert ForkingPickler.loads(ForkingPickler.dumps(images.table)).digest == images.table.digest


def test_the_file_has_cocos_own_keys(tmp_path):
    path = tmp_path / "annotations" / "captions_train2017.json"
    written = write_big_captions(path, 10, 52)
    data = json.loads(path.read_text())
    assert list(data) == ["info", "licenses", "images", "annotations"]
    keys = "license file_name coco_url height width date_captured flickr_url id".split()
    assert all(list(image) == keys for image in data["images"]) and len(data["images"]) == 10
    assert all(list(a) == ["image_id", "id", "caption"] for a in data["annotations"])
    told = {a["id"]: (a["image_id"], a["caption"]) for a in data["annotations"]}
    assert told == {
        k + 1: (owner, caption_of(k + 1)) for k, owner in enumerate(written["owners"].tolist())
    }
