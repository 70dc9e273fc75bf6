"""Retrieval and zero-shot classification, each with chance beside it.

And whether the difference between two models is more than luck.

Embeddings and scores may be tensors or arrays of any number type, on any device. Ties count against
the model, and in retrieval so do scores that are not a number: a constant embedding must not look
good.
"""

import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats

TEMPLATES = ["a {}", "a photo of a {}", "a picture of a {}", "a picture of one {}",
             "a close-up of a {}", "there is a {} in the scene",
             "a small {}", "a large {}"]  # fmt: skip
PAIRED_NOUNS = {"scissors", "skis"}  # the two names in COCO that English counts in pairs


def doubles(values):
    """Any array or tensor as float64 on the CPU, since Apple's GPUs have no float64.

    Taught in notebook 03, "Ranks".
    """
    return torch.as_tensor(values).detach().cpu().double()


def ranks(queries, gallery, query_group, gallery_group, chunk=128):
    """Rank of every relevant gallery item of every query, best first.

    queries [Q, E], gallery [G, E]; an item is relevant when its group [G] equals the query's [Q]
    (integers from 0). Returns int64 [Q, R], 1 = first, R the most items any query has; a query with
    fewer has ranks above G in the rest. In memory beside the input: a float64 gallery and a few
    [chunk, G]. ValueError when a query has no relevant item.

    Taught in notebook 03, "Ranks".
    """
    query_group, gallery_group = doubles(query_group).long(), doubles(gallery_group).long()
    group_sizes = torch.bincount(gallery_group, minlength=int(query_group.max()) + 1)
    relevant_items = group_sizes[query_group]  # [Q]
    if relevant_items.min() == 0:
        query = int(relevant_items.argmin())
        raise ValueError(f"query {query} has nothing to find: no gallery item is of its group")
    most = int(relevant_items.max())
    gallery = doubles(gallery).T  # [E, G]
    result = []
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        # Rounded from float64, so that equal items tie however the product is blocked.
        scores = (doubles(queries[rows]) @ gallery).float()  # [chunk, G]
        relevant = query_group[rows, None] == gallery_group
        nan = scores.isnan()
        own = scores.masked_fill(~relevant | nan, -math.inf).topk(most).values  # [chunk, R]
        # NaN is a rival above all others; an item of the query's own group is none.
        rivals = scores.masked_fill(nan, math.inf).masked_fill(relevant, math.nan)
        above = [(rivals >= own[:, r, None]).sum(dim=1) for r in range(most)]
        result.append(torch.stack(above, dim=1) + torch.arange(1, most + 1))
    return torch.cat(result)


def retrieval(image_embeds, text_embeds, owner, ks=(1, 5, 10)):
    """Retrieval both ways: every caption asks for its image, every image for any of its captions.

    image_embeds [N, E], text_embeds [M, E], unit vectors; owner [M]: row of the image that a
    caption belongs to. Returns {"text_to_image/recall@1": …, "image_to_text/map@R": …}: recall@k,
    median_rank, mrr and map@R for each way. map@R cuts each list at the number R of its relevant
    items: Musgrave et al. 2020, section 3.2.

    Taught in notebook 03, "Recall, and what else there is to report".
    """
    owner, images = doubles(owner).long(), torch.arange(len(image_embeds))
    text_ranks = ranks(text_embeds, image_embeds, owner, images)  # [M, 1]
    image_ranks = ranks(image_embeds, text_embeds, images, owner)  # [N, R]
    tasks = {
        "text_to_image": (text_ranks, torch.ones(len(owner))),
        "image_to_text": (image_ranks, torch.bincount(owner)),
    }
    metrics = {}
    for task, (rank, relevant_items) in tasks.items():
        best = rank[:, 0].double()
        for k in ks:
            metrics[f"{task}/recall@{k}"] = (best <= k).double().mean().item()
        metrics[f"{task}/median_rank"] = float(np.median(best))
        metrics[f"{task}/mrr"] = (1 / best).mean().item()
        precision = torch.arange(1, rank.shape[1] + 1) / rank.double()  # at each relevant item
        precision = precision * (rank <= relevant_items[:, None])
        metrics[f"{task}/map@R"] = (precision.sum(dim=1) / relevant_items).mean().item()
    return metrics


def retrieval_chance(owner, ks=(1, 5, 10)):
    """Expected recall of a random ranking, under the keys of `retrieval`; owner [M] as there.

    Whether one of n right captions is among the first k of M is hypergeometric. An image without
    captions can be found and asks for nothing.
    """
    captions = torch.bincount(doubles(owner).long()).tolist()  # [N], captions of each image
    images, total = len(captions), sum(captions)
    chance = {f"text_to_image/recall@{k}": min(1.0, k / images) for k in ks}
    for k in ks:
        # comb(n, k) is 0 where k > n: then no order misses.
        missed = [math.comb(total - n, k) / max(1, math.comb(total, k)) for n in captions if n]
        chance[f"image_to_text/recall@{k}"] = 1 - float(np.mean(missed))
    return chance


def prompt(template, name):
    """A template like "a photo of a {}" with a category in it, in good English: a pair of skis.

    Taught in notebook 06, "Classification in words".
    """
    text = template.format(f"pair of {name}" if name in PAIRED_NOUNS else name)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def class_embeds(encode_texts, names, templates=TEMPLATES):
    """One unit vector a class: the mean of its prompts' unit vectors, normalised again.

    encode_texts: list of sentences to [n, E]. Returns [C, E]. Radford et al. 2021, section 3.1.4.

    Taught in notebook 06, "Classification in words".
    """
    prompts = [prompt(template, name) for name in names for template in templates]
    embeds = F.normalize(encode_texts(prompts), dim=-1)
    embeds = embeds.reshape(len(names), len(templates), -1)  # [C, P, E]
    return F.normalize(embeds.mean(dim=1), dim=-1)


def classify(image_embeds, class_embeds, labels):
    """Nearest class by cosine: top-1 and top-5 accuracy with 95 % intervals, and chance.

    image_embeds [N, E], class_embeds [C, E], labels [N]: row of the true class. Returns n,
    predictions (int64 [N]) and top1, top1_interval, top1_chance, likewise for top5. ValueError
    where a score is not a number.

    Taught in notebook 06, "Counting properly".
    """
    scores = doubles(image_embeds) @ doubles(class_embeds).T  # [N, C]
    if scores.isnan().any():
        raise ValueError("classify: some scores are NaN; check the embeddings")
    n, classes = scores.shape
    rank = ranks(image_embeds, class_embeds, labels, torch.arange(classes))[:, 0]
    result = {"n": n, "predictions": scores.argmax(dim=1)}
    for k in (1, 5):
        hits = int((rank <= k).sum())
        result[f"top{k}"] = hits / n
        result[f"top{k}_interval"] = wilson(hits, n)
        result[f"top{k}_chance"] = min(1.0, k / classes)
    return result


def wilson(hits, n, z=1.96):
    """Interval (low, high) of a proportion hits / n, 95 % by default. Wilson 1927."""
    hits, n = float(hits), float(n)
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return max(0.0, (centre - spread) / (n + z * z)), min(1.0, (centre + spread) / (n + z * z))


def difference(hits, baseline, images):
    """How much more often a model is right than a baseline, and whether that is shown.

    hits, baseline [S, Q]: 1 where a query is answered, by S seeds that are paired in order; images
    [Q]: the image that a query belongs to. Returns "mean", the mean difference; its 95 % intervals
    "over_seeds" (had we trained again: paired t, Student 1908; None for a single seed) and
    "over_images" (had we drawn others: percentile bootstrap, Efron 1979, of images with all their
    queries); and "verdict": "gain" or "loss" where both exclude 0, else "no difference shown".
    """
    gaps = (doubles(hits) - doubles(baseline)).numpy()  # [S, Q]
    mean = float(gaps.mean())
    _, image, queries = np.unique(images, return_inverse=True, return_counts=True)  # [Q], [I]
    sums = np.bincount(image, gaps.mean(axis=0))  # [I]
    drawn = np.random.default_rng(0).integers(len(sums), size=(4000, len(sums)))
    means = sums[drawn].sum(axis=1) / queries[drawn].sum(axis=1)  # [4000]
    over_images = np.quantile(means, (0.025, 0.975)).tolist()
    over_seeds, verdict = None, "no difference shown"
    if len(gaps) > 1:
        half = float(stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps.mean(axis=1)))
        over_seeds = [mean - half, mean + half]
        if min(over_seeds + over_images) > 0:
            verdict = "gain"
        if max(over_seeds + over_images) < 0:
            verdict = "loss"
    return {"mean": mean, "over_seeds": over_seeds, "over_images": over_images, "verdict": verdict}


def nearest(query, gallery, k=5):
    """The k items of a gallery [G, E] nearest to one unit vector [E]: cosines and rows [k]."""
    cosines = gallery @ query  # [G]
    return cosines.topk(min(k, len(gallery)))


def class_probabilities(image_embeds, class_embeds, logit_scale):
    """Softmax over classes of the scaled cosines: images [N, E] and classes [C, E] to [N, C].

    logit_scale [] is the logarithm of the factor, as the model learned it. Radford et al. 2021,
    section 3.1.1.
    """
    return (logit_scale.exp() * image_embeds @ class_embeds.T).softmax(dim=1)
