"""What training sees: pictures with one caption each, batch by batch, raw or as features that a frozen tower has made.

Which caption, in which order and cut out how is a pure function of (seed, epoch, image id).
"""

from __future__ import annotations

from contextlib import closing, nullcontext

import numpy as np
import torch

from helpers.coco import draw_captions, splitmix64, visiting_order
from helpers.embeddings import embed_images, embed_texts, prefetch

CROP = 3  # what a hash decides, beside those in coco.py
KEPT = 0.85  # at least this much of each side of a picture is left by a random crop


class Pairs:
    """Images with their captions, to train on: each side raw, or as the features that its frozen tower made.

    images: CaptionedImages, or None; embeds: Embeddings of the same images, or None. At least one of the two.
    """

    def __init__(self, images=None, embeds=None):
        source = embeds if images is None else images
        self.images, self.embeds, self.image_ids = images, embeds, np.asarray(source.image_ids)
        if images is not None and embeds is not None and not np.array_equal(images.image_ids, embeds.image_ids):
            raise ValueError("the features are not those of these images: extract them from the same subset")
        self.owner = embeds.owner.numpy() if images is None else np.repeat(np.arange(len(images)), images.counts)
        self.counts = np.bincount(self.owner, minlength=len(self.image_ids))  # captions per image, [N]
        if not self.counts.all():
            raise ValueError(f"image {self.image_ids[self.counts.argmin()]} has no caption: leave such images out")
        # Embeddings list captions in any order: rows[starts[i]] … are those of image i.
        self.rows, self.starts = np.argsort(self.owner, kind="stable"), self.counts.cumsum() - self.counts

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

        loaded = prefetch(pictures, batches) if "image" in raw else map(self.image_features, batches)
        with closing(loaded) if "image" in raw else nullcontext():
            for batch, images in zip(batches, loaded, strict=True):
                result = {"image_ids": torch.as_tensor(self.image_ids[batch])}  # [B]
                result["pixel_values" if "image" in raw else "image_features"] = images  # uint8 [B, 3, S, S] or [B, D]
                if "text" in raw:
                    told = [self.images.captions(i)[picked[i] - self.starts[i]] for i in batch]
                    yield result | model.text_tower.tokenize(told)  # [B, T]
                else:
                    yield result | {"text_features": self.embeds.text_embeds[self.rows[picked[batch]]].float()}

    def image_features(self, batch):
        return self.embeds.image_embeds[batch].float()

    def captions(self, seed, epoch):
        """The caption that each image shows in an epoch, as a position in `rows`: int64 [N]."""
        return self.starts + draw_captions(seed, epoch, self.image_ids, self.counts)

    def picture(self, i, tower, seed, epoch):
        """Image i as the tower wants it, uint8 [3, S, S], cut out of the whole at random: a little else each epoch."""
        image = self.images.image(int(i), tower.size)
        dice = splitmix64(CROP, seed, epoch, self.image_ids[i], [0, 1, 2, 3]) / 2.0**64  # uniform in [0, 1)
        size = np.array(image.size)
        side = size * (KEPT + (1 - KEPT) * dice[:2])
        corner = (size - side) * dice[2:]
        return tower.preprocess(image, (*corner, *(corner + side)))

    def features(self, model, raw):
        """Features of all images [N, D] and captions [M, D], and for each caption its image [M]; raw sides anew."""
        images = self.images if "image" in raw else self.embeds.image_embeds
        if "image" in raw:
            images = embed_images(model.image_tower, self.images)
        if "text" in raw:
            texts, owner = self.images.all_captions()
            return images, embed_texts(model.text_tower, texts), torch.as_tensor(owner)
        return images, self.embeds.text_embeds, self.embeds.owner
