"""Captions of COCO's full size: read whole, in seconds."""

import time

import numpy as np

from helpers.data import CaptionedImages
from tests.big_coco import CAPTIONS, IMAGES, caption_of, write_big_captions


def test_captions_of_full_size(tmp_path):
    written = write_big_captions(tmp_path / "annotations" / "captions_train2017.json")
    start = time.process_time()
    images = CaptionedImages(tmp_path, "train2017")
    # Four seconds here; ten times as much would be something else.
    assert time.process_time() - start < 40
    assert len(images) == IMAGES and images.counts.sum() == CAPTIONS
    assert set(images.counts) == {5, 6}
    assert np.array_equal(images.image_ids, np.sort(written["image_ids"]))
    # By image, then by annotation id.
    order = np.lexsort((np.arange(CAPTIONS), written["owners"]))
    texts, positions = images.all_captions()
    assert np.array_equal(images.image_ids[positions], written["owners"][order])
    assert texts == [caption_of(k + 1) for k in order.tolist()]
    assert images.path(7).name == f"{images.image_ids[7]:012d}.jpg"
    part = images.subset(images.image_ids[::1000])
    assert part.captions(3) == images.captions(3000)
