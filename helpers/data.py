"""COCO 2017 on disk, as PyTorch sees it: photographs and their captions.

    <root>/train2017/*.jpg   <root>/val2017/*.jpg   <root>/annotations/{captions,instances}_{train,val}2017.json

MiniCOCO is written in the same layout, so this module reads both and never asks which one it has.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from helpers.config import worker_threads
from helpers.storage.caption_files import read_captions
from helpers.storage.download import WHERE
from helpers.storage.images import open_image

WHOLE = (b"\xff\xd9", b"IEND\xaeB`\x82")  # how a complete JPEG, a complete PNG ends
CAPTION, ORDER, SPLIT = range(3)  # what a hash decides
WORKERS = worker_threads()  # that decode pictures while the tower runs


def splitmix64(*keys) -> np.ndarray:
    """A hash of integers that broadcast against each other: uint64, evenly spread. Equal keys, equal hash, anywhere.

    The finaliser of splitmix64 (Steele et al. 2014), chained. It is a bijection: unequal last keys, unequal hashes.
    """
    h = np.zeros(1, np.uint64)
    for key in keys:
        z = (h ^ np.asarray(key).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        h = z ^ (z >> np.uint64(31))
    return h


def draw_captions(seed: int, epoch: int, image_ids, counts) -> np.ndarray:
    """Which of its `counts` captions each image shows in `epoch`: int64 in [0, count)."""
    return (
        splitmix64(CAPTION, seed, epoch, image_ids) % np.asarray(counts).astype(np.uint64)
    ).astype(int)


def visiting_order(seed: int, epoch: int, image_ids) -> np.ndarray:
    """The order in which training visits the images in `epoch`: a permutation [N]."""
    return np.argsort(splitmix64(ORDER, seed, epoch, image_ids))


class CaptionedImages(Dataset):
    """The images of one folder with their captions: `image_ids` [N] ascending, image i by position in it.

    Which caption a training step sees, and in which order, follows from (seed, epoch, image id) alone: the number of
    workers, prefetching and resuming change nothing. `transform` (PIL image → tensor) is applied by `[]`, which
    decodes at `size` (see `open_image`).
    """

    def __init__(
        self,
        root,
        folder: str = "val2017",
        image_ids=None,
        seed: int = 0,
        transform=None,
        size=None,
    ):
        self.root, self.folder, self.seed, self.transform, self.size = (
            Path(root),
            folder,
            seed,
            transform,
            size,
        )
        self.annotation_file = self.root / "annotations" / f"captions_{folder}.json"
        self.table = read_captions(self.annotation_file)
        self._select(self.table.image_ids if image_ids is None else image_ids)

    def _select(self, image_ids):
        self.image_ids = np.unique(np.asarray(image_ids, np.int64))
        if len(unknown := np.setdiff1d(self.image_ids, self.table.image_ids)):
            raise ValueError(f"{self.annotation_file} does not list the images {_some(unknown)}.")
        self._rows = np.searchsorted(self.table.image_ids, self.image_ids)
        self.counts = np.diff(self.table.starts)[self._rows]  # captions per image

    def subset(self, image_ids) -> CaptionedImages:
        """The same data set with these images only; captions are shared, not copied."""
        part = copy(self)
        part._select(image_ids)
        return part

    def __len__(self):
        return len(self.image_ids)

    def path(self, i) -> Path:
        return self.root / self.folder / str(self.table.files[self._rows[i]])

    def _paths(self) -> list[str]:
        folder = os.path.join(self.root, self.folder)
        return [os.path.join(folder, name) for name in self.table.files[self._rows].tolist()]

    def image(self, i, size: int | None = None) -> Image.Image:
        return open_image(self.path(i), size)

    def _text(self, c) -> str:
        start, stop = self.table.offsets[c : c + 2]
        return self.table.utf8[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def captions(self, i) -> list[str]:
        """All captions of image i, by annotation id."""
        return [self._text(c) for c in range(*self.table.starts[self._rows[i] : self._rows[i] + 2])]

    def all_captions(self) -> tuple[list[str], np.ndarray]:
        """For evaluation: every caption [M], and for each the position [M] of the image that it belongs to."""
        texts = [text for i in range(len(self)) for text in self.captions(i)]
        return texts, np.repeat(np.arange(len(self)), self.counts)

    def draw(self, epoch: int, i=slice(None)) -> np.ndarray:
        """Which of its captions each image shows in `epoch`: int64 in [0, count). For images `i`, by default all."""
        self._require_captions(i)
        return draw_captions(self.seed, epoch, self.image_ids[i], self.counts[i])

    def caption(self, i, epoch: int) -> str:
        """The caption of image i that training sees in `epoch`."""
        return self._text(self.table.starts[self._rows[i]] + self.draw(epoch, i)[0])

    def order(self, epoch: int) -> np.ndarray:
        """The order in which training visits the images in `epoch`: a permutation [N]."""
        return visiting_order(self.seed, epoch, self.image_ids)

    def __getitem__(self, key) -> dict:
        """Image i as {"image", "caption", "image_id"}; `key` is i (epoch 0) or (epoch, i)."""
        epoch, i = key if isinstance(key, tuple) else (0, key)
        image = self.image(i, self.size)
        image = self.transform(image) if self.transform else image
        return {
            "image": image,
            "caption": self.caption(i, epoch),
            "image_id": int(self.image_ids[i]),
        }

    def fingerprint(self) -> str:
        """Changes with the annotation file and with the images' names and sizes on disk; reads no pixels."""
        digest = hashlib.sha256(self.table.digest.encode())
        for path in self._paths():
            digest.update(f"{os.path.basename(path)} {os.path.getsize(path)}\n".encode())
        return digest.hexdigest()

    def _require_captions(self, i=slice(None)):
        if not self.counts[i].all():
            bare = _some(self.image_ids[self.counts == 0])
            raise ValueError(
                f"{self.annotation_file} has no caption for {bare}. Fetch it again or take a subset()."
            )

    def check(self) -> CaptionedImages:
        """Before training: raises if the folder, an image, the end of its file or its captions are missing."""
        if not (self.root / self.folder).is_dir():
            raise FileNotFoundError(f"The folder {self.root / self.folder} does not exist. {WHERE}")
        self._require_captions()
        if missing := [path for path in self._paths() if not os.path.exists(path)]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(self)} images do not exist: {_some(missing)}. {WHERE}"
            )
        for path in self._paths():
            with open(path, "rb", buffering=0) as file:
                file.seek(max(0, os.path.getsize(path) - 8))
                if not file.read().endswith(WHOLE):
                    open_image(path)  # an odd ending is no proof, failing to decode is
        return self


def _some(things) -> str:
    return ", ".join(map(str, things[:3])) + (
        f" and {len(things) - 3} more" if len(things) > 3 else ""
    )


def load_split(profile, split: str) -> CaptionedImages:
    """The images of `split`, checked: "train", "dev" (set aside from train) or "val" (looked at once, to report).

    Splits that come from one folder are dealt out in the order of the hashed image id, so they are disjoint and stay
    the same for every seed. Raises ValueError if the folder holds fewer images than the profile says.
    """
    train = None if profile.train_images is None else profile.train_images - profile.dev_images
    sizes = {"val": profile.val_images, "dev": profile.dev_images, "train": train}
    if split not in sizes:
        raise ValueError(f"There is no split {split!r}. Choose one of: {', '.join(sizes)}.")
    folders = {
        "val": profile.val_folder,
        "dev": profile.train_folder,
        "train": profile.train_folder,
    }
    images = CaptionedImages(profile.data, folders[split], seed=profile.seed)
    left = images.image_ids[np.argsort(splitmix64(SPLIT, images.image_ids))]
    for name, size in sizes.items():
        if folders[name] == folders[split]:
            taken, left = np.split(left, [len(left) if size is None else size])
            if len(taken) < (size or 1):
                short = f"the profile {profile.name} wants {size or 'some'} for {name} and {len(taken)} are left"
                raise ValueError(
                    f"{images.annotation_file} lists {len(images)} images: {short}. {WHERE}"
                )
            if name == split:
                return images.subset(taken).check()


class Collate:
    """Items of `CaptionedImages` → a batch. Captions are tokenised here and nowhere else.

    `tokenize`: texts → {"input_ids", "attention_mask"} [B, T], padded to the longest, truncated to the tower's limit.
    """

    def __init__(self, tokenize):
        self.tokenize = tokenize

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.stack([item["image"] for item in items]),  # [B, 3, H, W] uint8
            **self.tokenize([item["caption"] for item in items]),
            "image_ids": torch.tensor([item["image_id"] for item in items]),  # [B]
        }


class EpochBatches(Sampler):
    """The batches of one epoch, lists of (epoch, i): the `batch_sampler` of a DataLoader over `images`.

    The last, incomplete batch is dropped, since a contrastive loss depends on the batch size.
    """

    drop_last = True  # read by accelerate, like batch_size

    def __init__(self, images: CaptionedImages, batch_size: int, epoch: int):
        if batch_size > len(images):
            raise ValueError(
                f"A batch of {batch_size} is larger than the {len(images)} images. Take a smaller one."
            )
        self.images, self.batch_size, self.epoch = images, batch_size, epoch

    def __len__(self):
        return len(self.images) // self.batch_size

    def __iter__(self):
        order = self.images.order(self.epoch).tolist()
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(self.epoch, i) for i in order[start : start + self.batch_size]]


CROP = 3  # what a hash decides, beside those in coco.py
KEPT = 0.85  # at least this much of each side of a picture is left by a random crop


def prefetch(
    load: Callable,
    items: Iterable,
    workers: int = WORKERS,
    ahead: int = WORKERS,
    at_start: Callable | None = None,
) -> Iterator:
    """load(item) for each item, in order, while background threads work on the next `ahead` ones.

    Threads suffice: decoding and tokenising release Python's lock. And they work in notebooks on every system.
    """
    with ThreadPoolExecutor(workers, initializer=at_start) as pool:
        waiting, items, failed = deque(), iter(items), None
        try:
            while True:
                try:
                    waiting.append(pool.submit(load, next(items)))
                except StopIteration:
                    break
                except Exception as error:  # what was begun before it comes first
                    failed = error
                    break
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
            if failed is not None:
                raise failed
        finally:  # an error or a reader who has seen enough: what has not begun never will
            for future in waiting:
                future.cancel()


class Examples:
    """Images with their captions, to train on: each side raw, or as the features that its frozen tower made.

    images: CaptionedImages, or None; embeds: Embeddings of the same images, or None. At least one of the two.
    """

    def __init__(self, images=None, embeds=None):
        source = embeds if images is None else images
        self.images, self.embeds, self.image_ids = images, embeds, np.asarray(source.image_ids)
        if (
            images is not None
            and embeds is not None
            and not np.array_equal(images.image_ids, embeds.image_ids)
        ):
            raise ValueError(
                "the features are not those of these images: extract them from the same subset"
            )
        self.owner = (
            embeds.owner.numpy()
            if images is None
            else np.repeat(np.arange(len(images)), images.counts)
        )
        self.counts = np.bincount(
            self.owner, minlength=len(self.image_ids)
        )  # captions per image, [N]
        if not self.counts.all():
            raise ValueError(
                f"image {self.image_ids[self.counts.argmin()]} has no caption: leave such images out"
            )
        # Embeddings list captions in any order: rows[starts[i]] … are those of image i.
        self.rows, self.starts = (
            np.argsort(self.owner, kind="stable"),
            self.counts.cumsum() - self.counts,
        )

    def __len__(self):
        return len(self.image_ids)

    def batches(self, model, raw, seed, epoch, batch_size, which, part=(0, 1)):
        """The batches of an epoch whose numbers are in `which`; one caption an image.

        raw: the sides, of "image" and "text", that are read as pictures and words; `part` (k, n): the k-th of n parts.
        """
        order, picked = visiting_order(seed, epoch, self.image_ids), self.captions(seed, epoch)
        batches = [order[k * batch_size : (k + 1) * batch_size] for k in which]
        batches = [np.split(batch, part[1])[part[0]] for batch in batches]

        def pictures(batch):
            return torch.stack([self.picture(i, model.image_tower, seed, epoch) for i in batch])

        loaded = (
            prefetch(pictures, batches) if "image" in raw else map(self.image_features, batches)
        )
        with closing(loaded) if "image" in raw else nullcontext():
            for batch, images in zip(batches, loaded, strict=True):
                result = {"image_ids": torch.as_tensor(self.image_ids[batch])}  # [B]
                result["pixel_values" if "image" in raw else "image_features"] = (
                    images  # uint8 [B, 3, S, S] or [B, D]
                )
                if "text" in raw:
                    told = [self.images.captions(i)[picked[i] - self.starts[i]] for i in batch]
                    yield result | model.text_tower.tokenize(told)  # [B, T]
                else:
                    yield result | {
                        "text_features": self.embeds.text_embeds[self.rows[picked[batch]]].float()
                    }

    def image_features(self, batch):
        return self.embeds.image_embeds[batch].float()

    def captions(self, seed, epoch):
        """The caption that each image shows in an epoch, as a position in `rows`: int64 [N]."""
        return self.starts + draw_captions(seed, epoch, self.image_ids, self.counts)

    def picture(self, i, tower, seed, epoch):
        """Image i as the tower wants it, uint8 [3, S, S], cut out of the whole at random: a little else each epoch."""
        image = self.images.image(int(i), tower.size)
        dice = (
            splitmix64(CROP, seed, epoch, self.image_ids[i], [0, 1, 2, 3]) / 2.0**64
        )  # uniform in [0, 1)
        size = np.array(image.size)
        side = size * (KEPT + (1 - KEPT) * dice[:2])
        corner = (size - side) * dice[2:]
        return tower.preprocess(image, (*corner, *(corner + side)))
