"""What a map is worth: does it lie on the named object, and do its patches matter to the model?

A map is [gh, gw], scores of an image's patches; coverage is [gh, gw], the share of each patch that
an object covers.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.data import splitmix64
from helpers.evaluation import prompt
from helpers.model import training_mode

CAPTION = "a picture of a {}"


class Question(NamedTuple):
    """Where is `name` in image i? The wrong caption names another object of the image."""

    i: int
    name: str
    other: str
    caption: str
    wrong: str


def questions(images, instances, count: int | None = None) -> list[Question]:
    """Up to `count` questions, one for an image that shows at least two categories.

    images: `CaptionedImages`, instances: `Instances` of the same folder. Their order, and which
    object is named, follow from a hash of the image's id. Crowds have no mask of their own and are
    left out. Where there are no instances, each image is asked for its first caption, and the wrong
    one is another's.
    """
    if instances is None:
        captions = [images.captions(i)[0] for i in range(len(images))]
        pairs = enumerate(zip(captions, captions[1:] + captions[:1]))
        return [Question(i, "its caption", "another's", *pair) for i, pair in pairs][:count]
    rows = []
    for i in np.argsort(splitmix64(images.image_ids)):
        image_id = images.image_ids[i]
        annotations = [a for a in instances.annotations(image_id) if not a["iscrowd"]]
        columns = {instances.column[a["category_id"]] for a in annotations}
        if len(columns) >= 2:
            columns = sorted(columns, key=lambda c: int(splitmix64(image_id, c)[0]))
            names = [instances.names[c] for c in columns[:2]]
            rows.append(Question(int(i), *names, *(prompt(CAPTION, name) for name in names)))
    return rows[:count]


def patch_coverage(instances, image_id, name: str, grid: tuple[int, int], visible=None) -> Tensor:
    """The share of each patch that the objects called `name` cover: [gh, gw].

    The image is squashed to the grid, as it is for a ViT. visible: the tower's `visible`, where it
    does not see the whole image.
    """
    mask = torch.from_numpy(instances.mask(image_id, name).astype(np.float32))  # [H, W]
    if visible is not None:
        left, upper, right, lower = map(round, visible(mask.shape[::-1]))
        mask = mask[upper:lower, left:right]
    return F.adaptive_avg_pool2d(mask[None, None], grid)[0, 0]


def pointing_game(maps, coverage):
    """Whether each map's peak lies on a patch that the object touches: [B], 0 or 1.

    maps, coverage [B, gh, gw]. Of several equal peaks the share that hits counts, which for a
    constant map is chance; a map of NaN has not pointed (Zhang et al. 2016, arXiv 1608.00507).

    Taught in notebook 07, "7 · Are the maps any good?".
    """
    maps, touched = maps.flatten(1), coverage.flatten(1) > 0  # [B, P]
    peak = maps == maps.max(dim=1, keepdim=True).values
    return (peak & touched).sum(dim=1) / peak.sum(dim=1).clamp_min(1)


def energy(maps: Tensor, coverage: Tensor) -> Tensor:
    """The share of each map that lies inside the object: [B]; chance is the object's share.

    Scores must not be negative; a map of zeros counts as even (Wang et al. 2020, arXiv 1910.01279).
    """
    maps = maps.flatten(1)  # [B, P]
    maps = torch.where(maps.sum(dim=1, keepdim=True) > 0, maps, 1.0)
    return (maps * coverage.flatten(1)).sum(dim=1) / maps.sum(dim=1)


def curves(model, images: dict, texts: dict, maps: Tensor, steps: int = 12):
    """Cosine of image and caption as patches go, and as they come: two tensors [B, steps + 1].

    Deletion and insertion (Petsiuk et al. 2018, arXiv 1806.07421), the best patch first. A patch
    that is away is 0 after normalisation, the grey of the mean image. images, texts: batches of
    both towers, pair b in row b; maps [B, gh, gw].
    """
    pixels = images["pixel_values"]
    pixels = model.image_tower.normalise(pixels) if pixels.dtype == torch.uint8 else pixels
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1).view(maps.shape)  # 0 for the best patch
    deletion, insertion = [], []
    with training_mode(model, False), torch.no_grad():
        text_embeds = model.encode_text(**texts)
        for step in range(steps):
            first = (place < round(step / steps * order.shape[1]))[:, None].float()
            first = F.interpolate(first, size=pixels.shape[2:], mode="nearest").to(pixels)
            for part, cosines in ((1 - first, deletion), (first, insertion)):
                cosines.append((model.encode_image(pixels * part) * text_embeds).sum(dim=-1))
    # One ends where the other starts: all grey, and the whole image.
    deletion, insertion = [*deletion, insertion[0]], [*insertion, deletion[0]]
    return torch.stack(deletion, dim=1).cpu(), torch.stack(insertion, dim=1).cpu()


def random_maps(count: int, grid: tuple[int, int], seed: int = 0) -> Tensor:
    """A baseline: maps of noise, [count, gh, gw]."""
    return torch.rand(count, *grid, generator=torch.Generator().manual_seed(seed))


def centre_prior(count: int, grid: tuple[int, int]) -> Tensor:
    """A baseline: the nearer to the middle of the image, the higher, everywhere: [count, gh, gw].

    A Gaussian as wide as a quarter of the image. In an even grid the middle is a corner: the patch
    to its lower right counts as nearest, or the peak would be four patches.
    """
    down, right = ((torch.arange(side) + 0.5) / side - 0.5 - 1e-3 for side in grid)
    squared_distance = down[:, None] ** 2 + right[None] ** 2
    prior = torch.exp(-squared_distance / (2 * 0.25**2))
    return prior.expand(count, -1, -1)
