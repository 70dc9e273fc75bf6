"""Questions to a map, where is this object?, the patches that the object covers, and a score.

Notebook 07 has further scores, in "6 · Are the maps any good?".
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.data import splitmix64
from helpers.evaluation import prompt

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

    Taught in notebook 07, "6 · Are the maps any good?".
    """
    maps, touched = maps.flatten(1), coverage.flatten(1) > 0  # [B, P]
    peak = maps == maps.max(dim=1, keepdim=True).values
    return (peak & touched).sum(dim=1) / peak.sum(dim=1).clamp_min(1)
