"""Retrieval, zero-shot classification and the compositional probe, each with what guessing would score.

Ties, and scores that are not a number, count against the model: a constant embedding must not look good.
"""

from __future__ import annotations

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

TEMPLATES = [
    "a {}",
    "a photo of a {}",
    "a picture of a {}",
    "a picture of one {}",
    "a close-up of a {}",
    "there is a {} in the scene",
    "a small {}",
    "a large {}",
]
PAIRED_NOUNS = {"scissors", "skis"}  # the two names in COCO that English counts in pairs


def ranks(queries, gallery, query_group, gallery_group, chunk=128):
    """Rank of every relevant gallery item of every query, best first.

    queries [Q, E], gallery [G, E]; an item is relevant when its group [G] equals the query's [Q] (integers from 0).
    Returns int64 [Q, R], 1 = first, R the most items any query has; a query with fewer has ranks above G in the rest.
    In memory beside the input: a float64 gallery and a few [chunk, G]. ValueError when a query has no relevant item.
    """
    query_group, gallery_group = torch.as_tensor(query_group), torch.as_tensor(gallery_group)
    relevant_items = torch.bincount(gallery_group, minlength=int(query_group.max()) + 1)[
        query_group
    ]  # [Q]
    if relevant_items.min() == 0:
        raise ValueError(
            f"query {int(relevant_items.argmin())} has nothing to find: no gallery item is of its group"
        )
    most = int(relevant_items.max())
    gallery = gallery.double().T
    result = []
    for batch, group in zip(queries.split(chunk), query_group.split(chunk), strict=True):
        # Rounded from float64: equal captions score equal however the product is blocked, so that ties stay ties.
        scores = (batch.double() @ gallery).float()  # [chunk, G]
        relevant = (group[:, None] == gallery_group).to(scores.device)
        nan = scores.isnan()
        found = (
            scores.masked_fill(~relevant | nan, -math.inf).topk(most).values
        )  # [chunk, R], best first
        others = scores.masked_fill(nan, math.inf).masked_fill_(
            relevant, math.nan
        )  # nan is above nothing
        above = [(others >= found[:, r, None]).sum(dim=1) for r in range(most)]
        result.append(torch.stack(above, dim=1).cpu() + torch.arange(1, most + 1))
    return torch.cat(result)


def retrieval(image_embeds, text_embeds, owner, ks=(1, 5, 10), chunk=128):
    """Retrieval both ways: every caption asks for its image, every image for any of its captions.

    image_embeds [N, E], text_embeds [M, E], unit vectors; owner [M]: row of the image that a caption belongs to.
    Returns {"text_to_image/recall@1": …, "image_to_text/map@R": …}: recall@k, median_rank, mrr, map@R for each way.
    map@R cuts each list at the number R of its relevant items: Musgrave et al. 2020, section 3.2.
    """
    owner, images = torch.as_tensor(owner), torch.arange(len(image_embeds))
    tasks = {
        "text_to_image": ranks(text_embeds, image_embeds, owner, images, chunk),
        "image_to_text": ranks(image_embeds, text_embeds, images, owner, chunk),
    }
    relevant_items = {
        "text_to_image": torch.ones(len(owner)),
        "image_to_text": torch.bincount(owner).float(),
    }
    metrics = {}
    for task, rank in tasks.items():
        best = rank[:, 0].double()
        for k in ks:
            metrics[f"{task}/recall@{k}"] = (best <= k).double().mean().item()
        metrics[f"{task}/median_rank"] = float(np.median(best))
        metrics[f"{task}/mrr"] = (1 / best).mean().item()
        precision = (
            torch.arange(1, rank.shape[1] + 1) / rank.double()
        )  # [Q, R], at each relevant item
        within = rank <= relevant_items[task][:, None]
        metrics[f"{task}/map@R"] = (
            ((precision * within).sum(dim=1) / relevant_items[task]).mean().item()
        )
    return metrics


def retrieval_chance(owner, ks=(1, 5, 10)):
    """Expected recall of a random ranking, under the keys of `retrieval`; owner [M] as there."""
    captions = np.bincount(np.asarray(owner))  # [N], captions of each image
    images, total = len(captions), int(captions.sum())
    chance = {f"text_to_image/recall@{k}": min(1.0, k / images) for k in ks}
    for k in ks:
        missed = [
            math.comb(total - int(n), k) / math.comb(total, k) if k <= total else 0.0
            for n in captions
        ]
        chance[f"image_to_text/recall@{k}"] = 1 - float(np.mean(missed))
    return chance


def prompt(template, name):
    """A template like "a photo of a {}" with a category in it, in good English: an apple, a pair of skis."""
    text = template.format(f"pair of {name}" if name in PAIRED_NOUNS else name)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def class_embeds(encode_texts, names, templates=TEMPLATES):
    """One unit vector a class: the mean of its prompts' unit vectors, normalised again.

    encode_texts: list of sentences to [n, E]. Returns [C, E]. Radford et al. 2021, section 3.1.4.
    """
    prompts = [prompt(template, name) for name in names for template in templates]
    embeds = F.normalize(encode_texts(prompts), dim=-1).reshape(
        len(names), len(templates), -1
    )  # [C, P, E]
    return F.normalize(embeds.mean(dim=1), dim=-1)


def classify(image_embeds, class_embeds, labels):
    """Nearest class by cosine: top-1 and top-5 accuracy with 95 % intervals, and chance.

    image_embeds [N, E], class_embeds [C, E], labels [N]: row of the true class. `predictions` is int64 [N].
    """
    classes, n = len(class_embeds), len(image_embeds)
    rank = ranks(image_embeds, class_embeds, torch.as_tensor(labels), torch.arange(classes))[:, 0]
    hits = {k: int((rank <= k).sum()) for k in (1, 5)}
    return {
        "top1": hits[1] / n,
        "interval": wilson(hits[1], n),
        "chance": 1 / classes,
        "top5": hits[5] / n,
        "top5_interval": wilson(hits[5], n),
        "top5_chance": min(1.0, 5 / classes),
        "n": n,
        "predictions": (image_embeds @ class_embeds.T).argmax(dim=1).cpu(),
    }


def mean_average_precision(scores, labels):
    """Mean over categories of the average precision of ranking images by score.

    scores [N, C]; labels bool [N, C]. Categories that no image shows are left out; chance is the mean share of images
    that show a category. ValueError when none is shown.
    """
    scores, labels = np.asarray(scores), np.asarray(labels, dtype=bool)
    shown = np.flatnonzero(labels.any(axis=0))
    if not len(shown):
        raise ValueError(
            "mean_average_precision: no image shows any category; check that labels and images match"
        )
    return float(np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in shown]))


def compositional(image_embeds, caption_embeds, foil_embeds):
    """How often an image is nearer to its caption than to the same words bound or ordered otherwise; all [N, E]."""
    right = (image_embeds * caption_embeds).sum(dim=1) > (image_embeds * foil_embeds).sum(dim=1)
    n, hits = len(right), int(right.sum())
    return {"accuracy": hits / n, "interval": wilson(hits, n), "chance": 0.5, "n": n}


def wilson(hits, n, z=1.96):
    """Interval (low, high) of a proportion hits / n, 95 % by default. Wilson 1927."""
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def nearest(query, gallery, k=5):
    """The k items of a gallery [G, E] nearest to one unit vector [E]: cosines [k] and rows [k], best first."""
    cosines = gallery @ query  # [G]
    return cosines.topk(min(k, len(gallery)))


def class_probabilities(image_embeds, class_embeds, logit_scale):
    """Softmax over classes of the scaled cosines: images [N, E] and classes [C, E] to [N, C].

    logit_scale [] is the logarithm of the factor, as the model learned it. Radford et al. 2021, section 3.1.1.
    """
    return (logit_scale.exp() * image_embeds @ class_embeds.T).softmax(dim=1)
