"""What a map is worth: does it lie on the object that the caption names, and do its patches matter to the model?

A map is [gh, gw], scores of a picture's patches; a cover is [gh, gw], the share of each patch that an object covers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.data import splitmix64
from helpers.evaluation import prompt
from helpers.model import evaluating

ASKED = "a picture of a {}"


class Question(NamedTuple):
    """One question to a map: where is `name` in picture i? The wrong caption names another object of the picture."""

    i: int
    name: str
    other: str
    caption: str
    wrong: str


def questions(images, instances, count: int | None = None) -> list[Question]:
    """Up to `count` pairs, one a picture that shows at least two categories, in an order that follows from image ids.

    images: `CaptionedImages`, instances: `Instances` of the same folder. Objects without a mask of their own (crowds)
    are left out; which of the picture's objects is named and which is the other is decided by a hash of its id.
    """
    found = []
    for i in np.argsort(splitmix64(images.image_ids)):
        image_id = images.image_ids[i]
        shown = {
            instances.names[instances.column[a["category_id"]]]: a
            for a in instances.annotations(image_id)
            if not a["iscrowd"]
        }
        if len(shown) >= 2:
            names = sorted(
                shown, key=lambda name: int(splitmix64(image_id, instances.names.index(name))[0])
            )
            found.append(Question(int(i), *names[:2], *(prompt(ASKED, name) for name in names[:2])))
        if len(found) == count:
            break
    return found


def patch_coverage(instances, image_id, name: str, grid: tuple[int, int]) -> Tensor:
    """The share of each patch that the objects called `name` cover: [gh, gw]. The picture is squashed, as for a ViT."""
    mask = torch.from_numpy(instances.mask(image_id, name).astype(np.float32))
    return F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0]


def pointing_game(maps: Tensor, covers: Tensor) -> Tensor:
    """Whether each map's peak lies on a patch that the object touches: [B], 0 or 1 (Zhang et al. 2016, 1608.00507).

    maps, covers [B, gh, gw]. Of several equal peaks one counts, at random: the share of them that hit, which for a
    constant map is chance, the share of patches that the object touches. What is no number has not pointed: 0.
    """
    flat, touched = maps.flatten(1), covers.flatten(1) > 0  # [B, P]
    peak = flat == flat.max(dim=1, keepdim=True).values
    return (peak & touched).sum(dim=1) / peak.sum(dim=1).clamp_min(1)


def energy(maps: Tensor, covers: Tensor) -> Tensor:
    """The share of each map that lies inside the object: [B]; chance is the object's share of the picture.

    Scores must not be negative; a map of zeros counts as spread evenly (Wang et al. 2020, arXiv 1910.01279).
    """
    flat = maps.flatten(1)
    flat = torch.where(flat.sum(dim=1, keepdim=True) > 0, flat, torch.ones_like(flat))
    return (flat * covers.flatten(1)).sum(dim=1) / flat.sum(dim=1)


def curves(model, seen: dict, read: dict, maps: Tensor, steps: int = 12) -> tuple[Tensor, Tensor]:
    """Cosine of picture and caption as patches go, and as they come, best first: deletion, insertion [B, steps + 1].

    A patch that is away is grey, 0 after normalisation, where the tower's pictures have their mean. seen, read: batches
    of both towers, pair b in row b; maps [B, gh, gw]. Petsiuk et al. 2018 (arXiv 1806.07421).
    """
    count, (high, wide) = len(maps), maps.shape[1:]
    pixels = seen["pixel_values"]
    pixels = (
        model.image_tower.normalise(pixels) if pixels.dtype == torch.uint8 else pixels
    )  # [B, 3, H, W]
    place = (
        maps.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    )  # [B, P]: 0 for the best patch
    deletion, insertion = [], []
    with evaluating(model):
        text_embeds = model.encode_text(**read)
        for step in range(steps):
            first = (
                (place < round(step / steps * place.shape[1])).view(count, 1, high, wide).float()
            )
            first = F.interpolate(first, size=pixels.shape[2:], mode="nearest").to(pixels.device)
            for kept, into in ((1 - first, deletion), (first, insertion)):
                into.append((model.encode_image(pixels * kept) * text_embeds).sum(dim=-1))
    deletion, insertion = (
        [*deletion, insertion[0]],
        [*insertion, deletion[0]],
    )  # all grey, and the whole picture
    return torch.stack(deletion, dim=1).clone().cpu(), torch.stack(insertion, dim=1).clone().cpu()


def random_maps(count: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """A baseline: maps of noise, [count, gh, gw]."""
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed))


def centre_prior(count: int, grid: tuple[int, int]) -> Tensor:
    """A baseline: the nearer to the middle of the picture, the higher, for every picture alike: [count, gh, gw].

    A Gaussian as wide as a quarter of the picture. In an even grid the middle is a corner, not a patch: the patch to
    its lower right counts as nearest, or the peak would be four patches.
    """
    down, right = ((torch.arange(side) + 0.5) / side - 0.5 - 1e-3 for side in grid)
    return torch.exp(-(down[:, None] ** 2 + right[None] ** 2) / (2 * 0.25**2)).expand(count, -1, -1)
