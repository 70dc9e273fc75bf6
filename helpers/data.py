"""COCO 2017 on disk, as training and evaluation see it: images and their captions.

    <root>/train2017/*.jpg   <root>/val2017/*.jpg
    <root>/annotations/{captions,instances}_{train,val}2017.json

MiniCOCO is written in the same layout, so this module reads both and never asks which one it has.
What a training step sees follows from (seed, epoch, image id) alone: the number of workers,
prefetching and resuming change nothing.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import closing
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from helpers.storage.caption_files import read_captions, some
from helpers.storage.download import WHERE
from helpers.storage.images import open_image, prefetch

CAPTION, ORDER, SPLIT, CROP = range(4)  # what a hash decides
SMALLEST_CROP = 0.85  # of each side of an image


def splitmix64(*keys) -> np.ndarray:
    """A hash of integers that broadcast against each other: uint64, evenly spread.

    Equal keys give an equal hash on every machine. The finaliser of splitmix64 (Steele et al.
    2014), chained. It is a bijection: unequal last keys give unequal hashes.

    Taught in notebook 01, "7 · Which caption does a training step see?".
    """
    h = np.zeros(1, np.uint64)
    for key in keys:
        z = (h ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = z ^ (z >> np.uint64(31))
    return h


def draw_captions(seed: int, epoch: int, image_ids, counts) -> np.ndarray:
    """Which of its `counts` captions each image shows in `epoch`: int64 [N], in [0, count).

    Taught in notebook 01, "7 · Which caption does a training step see?".
    """
    hashes = splitmix64(CAPTION, seed, epoch, image_ids)
    return (hashes % np.asarray(counts).astype(np.uint64)).astype(int)


def visiting_order(seed: int, epoch: int, image_ids) -> np.ndarray:
    """The order in which training visits the images in `epoch`: a permutation [N].

    Taught in notebook 01, "8 · What is in a batch?".
    """
    return np.argsort(splitmix64(ORDER, seed, epoch, image_ids))


class CaptionedImages:
    """The images of one folder with their captions.

    `image_ids` [N] int64, ascending; image i is the one at position i. `counts` [N]: captions of
    each. Raises FileNotFoundError or ValueError for a captions file that is missing or wrong.
    """

    shared_captions = False  # whether equal captions are positives of each other

    def __init__(self, root, folder: str = "val2017"):
        self.root, self.folder = Path(root), folder
        self.annotation_file = self.root / "annotations" / f"captions_{folder}.json"
        self._files, self._captions, self._digest = read_captions(self.annotation_file)
        self._select(list(self._files))

    def _select(self, image_ids):
        self.image_ids = np.unique(np.asarray(image_ids, np.int64))
        self.counts = np.array([len(self.captions(i)) for i in range(len(self))], int)

    def subset(self, image_ids) -> CaptionedImages:
        """The same data set with these images only; captions are shared, not copied."""
        part = copy(self)
        part._select(image_ids)
        return part

    def __len__(self):
        return len(self.image_ids)

    def path(self, i) -> Path:
        """The file of image i."""
        return self.root / self.folder / self._files[int(self.image_ids[i])]

    def image(self, i) -> Image.Image:
        """Image i, upright and RGB."""
        return open_image(self.path(i))

    def captions(self, i) -> list[str]:
        """All captions of image i, by annotation id."""
        return self._captions[int(self.image_ids[i])]

    def all_captions(self) -> tuple[list[str], np.ndarray]:
        """For evaluation: every caption [M], and for each the position [M] of its image."""
        texts = [text for i in range(len(self)) for text in self.captions(i)]
        return texts, np.repeat(np.arange(len(self)), self.counts)

    def fingerprint(self) -> str:
        """Changes with the captions file and with the images' names and sizes on disk."""
        digest = hashlib.sha256(self._digest.encode())
        for i in range(len(self)):
            path = self.path(i)
            digest.update(f"{path.name} {os.path.getsize(path)}\n".encode())
        return digest.hexdigest()

    def check(self) -> CaptionedImages:
        """Raises if the folder, an image or its captions are missing."""
        if not (self.root / self.folder).is_dir():
            raise FileNotFoundError(f"The folder {self.root / self.folder} does not exist. {WHERE}")
        if not self.counts.all():
            bare = some(self.image_ids[self.counts == 0])
            raise ValueError(f"{self.annotation_file} has no caption for {bare}: leave them out.")
        paths = [self.path(i) for i in range(len(self))]
        missing = [path for path in paths if not path.exists()]
        if missing:
            lost = f"{len(missing)} of {len(self)} images do not exist: {some(missing)}"
            raise FileNotFoundError(f"{lost}. {WHERE}")
        return self


def load_split(profile, split: str) -> CaptionedImages:
    """The images of `split`, checked: "train", "dev" (for choices) or "val" (to report).

    Splits of one folder are dealt out in the order of the hashed image id, so they are disjoint
    and the same for every seed. Raises ValueError if the folder holds fewer images than the
    profile says.
    """
    names = ("val", "dev", "train")
    sizes = {name: getattr(profile, f"{name}_images") for name in names}
    folders = {name: getattr(profile, f"{name}_folder") for name in names}
    images = CaptionedImages(profile.data, folders[split])
    images.shared_captions = profile.shared_captions
    left = images.image_ids[np.argsort(splitmix64(SPLIT, images.image_ids))]
    for name, size in sizes.items():
        if folders[name] == folders[split]:
            ids, left = np.split(left, [len(left) if size is None else size])
            if len(ids) < (size or 1):
                short = f"{name} wants {size or 'some'} of {len(images)} images, {len(ids)} left"
                raise ValueError(f"{images.annotation_file} is short: {short}. {WHERE}")
            if name == split:
                return images.subset(ids).check()


class Examples:
    """Images with their captions, to train on: each side raw, or as its frozen tower's features.

    images: CaptionedImages, or None; embeds: Embeddings of the same images, or None. At least one
    of the two. `owner` [M]: each caption's image. Embeddings list captions in any order:
    rows[starts[i]], … of them, counts[i] in all, are those of image i. `positives` [M]: captions
    with one number are positives of each other; usually those of one image.
    """

    def __init__(self, images=None, embeds=None):
        source = embeds if images is None else images
        self.images, self.embeds, self.image_ids = images, embeds, np.asarray(source.image_ids)
        if images is None:
            self.owner = embeds.owner.numpy()
        else:
            self.owner = np.repeat(np.arange(len(images)), images.counts)
            if embeds is not None and not np.array_equal(images.image_ids, embeds.image_ids):
                fix = "extract them from the same subset"
                raise ValueError(f"the features are not those of these images: {fix}")
        self.counts = np.bincount(self.owner, minlength=len(self))
        if not self.counts.all():
            bare = self.image_ids[self.counts.argmin()]
            raise ValueError(f"image {bare} has no caption: leave such images out")
        self.positives = self.image_ids[self.owner]
        if source.shared_captions:
            texts = embeds.captions if images is None else images.all_captions()[0]
            self.positives = np.unique(texts, return_inverse=True)[1]
        self.rows = np.argsort(self.owner, kind="stable")
        self.starts = self.counts.cumsum() - self.counts

    def __len__(self):
        return len(self.image_ids)

    def batches(self, model, raw, seed, epoch, batch_size, which, part=(0, 1)):
        """The batches of an epoch whose numbers are in `which`; one caption an image.

        raw: the sides, of "image" and "text", that are read as pixels and words, not as features.
        part: (k, n) for the k-th of n equal parts of each batch.
        """
        order = visiting_order(seed, epoch, self.image_ids)
        picks = draw_captions(seed, epoch, self.image_ids, self.counts)
        batches = [order[k * batch_size : (k + 1) * batch_size] for k in which]
        batches = [np.split(batch, part[1])[part[0]] for batch in batches]

        def crops(batch):
            return torch.stack([self.crop(i, model.image_tower, seed, epoch) for i in batch])

        # Images are read ahead, nothing else is worth it.
        with closing(prefetch(crops, batches if "image" in raw else [])) as loaded:
            for batch in batches:
                rows = self.rows[self.starts[batch] + picks[batch]]
                result = {"image_ids": torch.as_tensor(self.positives[rows])}  # [B]
                if "image" in raw:
                    result["pixel_values"] = next(loaded)  # [B, 3, S, S] uint8
                else:
                    result["image_features"] = self.embeds.image_embeds[batch].float()  # [B, D]
                if "text" in raw:
                    texts = [self.images.captions(i)[picks[i]] for i in batch]
                    result |= model.text_tower.tokenize(texts)  # [B, T] each
                else:
                    result["text_features"] = self.embeds.text_embeds[rows].float()  # [B, D]
                yield result

    def crop(self, i, tower, seed, epoch):
        """A random crop of image i as the tower wants it, uint8 [3, S, S]; another each epoch."""
        image = self.images.image(int(i))
        # Four numbers, uniform in [0, 1).
        dice = splitmix64(CROP, seed, epoch, self.image_ids[i], range(4)) / 2.0**64
        size = np.array(image.size)
        side = size * (SMALLEST_CROP + (1 - SMALLEST_CROP) * dice[:2])
        corner = (size - side) * dice[2:]
        return tower.preprocess(image, (*corner, *(corner + side)))
