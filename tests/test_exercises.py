"""Every exercise: unanswered, wrong in the ways readers are wrong, and right."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from helpers.exercises import CHECKS, check


def count_captions(coco):
    counts = {image["id"]: 0 for image in coco["images"]}
    for annotation in coco["annotations"]:
        counts[annotation["image_id"]] += 1
    return counts


def count_only_captioned(coco):
    return Counter(annotation["image_id"] for annotation in coco["annotations"])


def box_iou(a, b, least=0):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(least, width) * max(least, height)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def corner_iou(a, b):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def pad(sequences, left=False):
    longest = max(map(len, sequences))
    rows = [[[0] * (longest - len(s)), s][:: 1 if left else -1] for s in sequences]
    masks = [[0] * (longest - len(s)) + [1] * len(s) for s in sequences]
    return torch.tensor([a + b for a, b in rows]), torch.tensor(
        [m if left else m[::-1] for m in masks]
    )


def any_caption(similarity, owner, k):
    found = similarity.topk(k, dim=1).indices
    return (owner[found] == torch.arange(len(similarity))[:, None]).any(dim=1).float().mean()


def share_of_captions(similarity, owner, k):
    right = owner[similarity.topk(k, dim=1).indices] == torch.arange(len(similarity))[:, None]
    return (right.sum(dim=1) / torch.bincount(owner)).mean()


def first_caption_only(similarity, owner, k):
    first = torch.searchsorted(owner, torch.arange(len(similarity)))
    return (similarity.topk(k, dim=1).indices == first[:, None]).any(dim=1).float().mean()


def captions_ask(similarity, owner, k):
    return (
        (similarity.T.topk(min(k, len(similarity)), dim=1).indices == owner[:, None])
        .any(dim=1)
        .float()
        .mean()
    )


def clip(gradients, most, down_only=True):
    length = torch.cat([g.flatten() for g in gradients]).norm()
    return [g * (min(1, most / length) if down_only else most / length) for g in gradients]


def difference(after, before, ddof=1, root=True):
    d = np.subtract(after, before)
    return d.mean(), d.std(ddof=ddof) / (math.sqrt(len(d)) if root else 1)


RIGHT = {
    "00-chance": 5 / 1000,
    "00-diagonal": lambda similarity: (
        (similarity.argmax(dim=1) == torch.arange(len(similarity))).float().mean()
    ),
    "01-caption-count": count_captions,
    "01-iou": box_iou,
    "01-padding-mask": pad,
    "02-token-count": lambda size, patch: (size // patch) ** 2 + 1,
    "02-masked-mean": lambda hidden, mask: (
        (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    ),
    "02-normalise": lambda a, b: torch.cosine_similarity(a[:, None], b, dim=-1),
    "03-one-pair": 0,
    "03-untrained": math.log(512),
    "03-temperature": lambda similarities, temperature: torch.softmax(
        similarities / temperature, dim=1
    ),
    "04-clip": clip,
    "04-paired": difference,
    "04-bytes": lambda trained, frozen: 16 * trained + 4 * frozen,
    "05-one-pair": math.log(1 + math.exp(10)),
    "05-calm": lambda n: -math.log(n - 1),
    "05-shift": lambda n, m: math.log((n - 1) / (m - 1)),
    "06-recall": any_caption,
    "06-arange": lambda logits, labels: (logits.argmax(1) == labels).float().mean(),
    "06-prompt": "a drawing of a {}",
    "07-two-layers": lambda upper, lower, source: torch.minimum(upper[source][:, None], lower).sum(
        0
    ),
    "07-ignored": 0.5,
    "07-caption": ["relevance"],
    "08-local": (math.log(64), math.log(512)),
    "08-ring": lambda rank, k, world: (rank - k) % world,
}
WRONG = [
    ("00-chance", 0.5, "per cent"),
    ("00-chance", 1 / 1000, "five that count"),
    ("00-chance", 5, "as likely as any other"),
    (
        "00-diagonal",
        lambda similarity: (similarity.argmax(dim=1) == torch.arange(4)).sum(),
        "how many",
    ),
    (
        "00-diagonal",
        lambda similarity: (similarity.argmax(dim=0) == torch.arange(4)).float().mean(),
        "columns",
    ),
    ("00-diagonal", lambda similarity: 0.25, "rows 0 and 3"),
    ("01-caption-count", count_only_captioned, "632"),
    ("01-iou", corner_iou, "opposite corner"),
    ("01-iou", lambda a, b: 0.5, "one box"),
    ("01-iou", lambda a, b: 0.25, "counted twice"),
    ("01-iou", lambda a, b: box_iou(a, b, least=-99), "apart share nothing"),
    (
        "01-iou",
        lambda a, b: box_iou(a, b, least=-99) if b[1] > 8 else box_iou(a, b),
        "two negative sides",
    ),
    ("01-padding-mask", lambda sequences: pad(sequences, left=True), "come first"),
    (
        "01-padding-mask",
        lambda sequences: (pad(sequences)[0], 1 - pad(sequences)[1]),
        "upside down",
    ),
    (
        "01-padding-mask",
        lambda sequences: (pad(sequences)[0], pad(sequences)[0] != 0),
        "the number 0",
    ),
    ("01-padding-mask", lambda sequences: pad(sequences[:2]), "[3, 5]"),
    ("02-token-count", lambda size, patch: size // patch + 1, "one row"),
    ("02-token-count", lambda size, patch: (size // patch) ** 2, "before the first"),
    ("02-masked-mean", lambda hidden, mask: hidden.mean(1), "padding is averaged in"),
    (
        "02-masked-mean",
        lambda hidden, mask: (hidden * mask[..., None]).mean(1),
        "divide by its length",
    ),
    ("02-masked-mean", lambda hidden, mask: hidden[:, 0, :2], "shape"),
    ("02-normalise", lambda a, b: a @ b.T, "dot products"),
    ("02-normalise", lambda a, b: a / a.norm(dim=1, keepdim=True) @ b.T, "b's lengths"),
    ("02-normalise", lambda a, b: a.softmax(1) @ b.softmax(1).T, "lengths still count"),
    ("03-one-pair", 1, "probability"),
    ("03-untrained", 9, "nats"),
    ("03-untrained", 0, "1/n"),
    ("03-temperature", lambda s, t: torch.softmax(s * t, 1), "Divide"),
    ("03-temperature", lambda s, t: torch.softmax(s / t, 0), "sum to 1"),
    ("03-temperature", lambda s: s, "TypeError"),
    ("04-clip", lambda gradients, most: torch.cat([g.flatten() for g in gradients]), "shape"),
    (
        "04-clip",
        lambda gradients, most: [g * min(1, most / g.norm()) for g in gradients],
        "each tensor alone",
    ),
    ("04-clip", lambda gradients, most: [g.clamp(-most, most) for g in gradients], "each number"),
    (
        "04-clip",
        lambda gradients, most: [g / sum(h.norm() for h in gradients) for g in gradients],
        "Add squares",
    ),
    ("04-clip", lambda gradients, most: gradients, "should become 1"),
    ("04-clip", lambda gradients, most: clip(gradients, most, down_only=False), "short enough"),
    ("04-paired", lambda after, before: difference(before, after), "sign"),
    ("04-paired", lambda after, before: (0.05, 0.01), "your mean"),
    (
        "04-paired",
        lambda a, b: (0.03, math.sqrt((np.var(a, ddof=1) + np.var(b, ddof=1)) / 3)),
        "unrelated",
    ),
    ("04-paired", lambda after, before: difference(after, before, root=False), "√n"),
    ("04-paired", lambda after, before: difference(after, before, ddof=0), "n − 1"),
    ("04-paired", lambda after, before: (0.03, 0.02), "s/√n"),
    ("04-bytes", lambda trained, frozen: 16, "not for one"),
    ("04-bytes", lambda trained, frozen: 16 * (trained + frozen), "keeps nothing"),
    ("04-bytes", lambda trained, frozen: 16 * trained, "there once"),
    ("04-bytes", lambda trained, frozen: 12 * trained + 4 * frozen, "two"),
    ("04-bytes", lambda trained, frozen: 8 * trained + 4 * frozen, "running means"),
    ("04-bytes", lambda trained, frozen: 4 * trained + 4 * frozen, "four numbers"),
    ("04-bytes", lambda trained, frozen: max(16 * trained, 4 * frozen), "add up"),
    ("05-one-pair", 0, "InfoNCE"),
    ("05-one-pair", math.log(2), "logit 0"),
    ("05-one-pair", -10, "negative"),
    ("05-one-pair", 4.5e-5, "price of a no"),
    ("05-one-pair", 5, "10·0"),
    ("05-calm", lambda n: math.log(n - 1), "sign"),
    ("05-calm", lambda n: -math.log(n), "nearly"),
    ("05-calm", lambda n: -10, "depend on n"),
    ("05-calm", lambda n: -2.71, "slope"),
    ("05-shift", lambda n, m: 1.0, "nothing changes"),
    ("05-shift", lambda n, m: math.log((m - 1) / (n - 1)), "sign"),
    ("05-shift", lambda n, m: math.log(n / m), "odds"),
    ("05-shift", lambda n, m: 0.0, "calm(16)"),
    ("06-recall", share_of_captions, "share of its captions"),
    ("06-recall", first_caption_only, "first caption"),
    ("06-recall", captions_ask, "text→image"),
    (
        "06-recall",
        lambda similarity, owner, k: 100 * any_caption(similarity, owner, k),
        "between 0 and 1",
    ),
    ("06-prompt", "a drawing of a dog", "0 times"),
    ("06-prompt", "{}", "bare name"),
    ("06-prompt", "a picture of an {}", "turns it into"),
    ("06-prompt", "a {} next to a red car", "car"),
    ("06-prompt", ["a {}"], "list"),
    (
        "06-arange",
        lambda logits, labels: (logits.argmax(1) == torch.arange(6)).float().mean(),
        "arange",
    ),
    (
        "06-arange",
        lambda logits, labels: 100 * (logits.argmax(1) == labels).float().mean(),
        "between 0 and 1",
    ),
    ("07-two-layers", lambda upper, lower, source: upper[source] @ lower, "rollout"),
    (
        "07-two-layers",
        lambda upper, lower, source: torch.minimum(upper[source][:, None], lower.T).sum(0),
        "turned",
    ),
    (
        "07-two-layers",
        lambda upper, lower, source: torch.minimum(upper[source][:, None], lower).amax(0),
        "best single",
    ),
    (
        "07-two-layers",
        lambda upper, lower, source: torch.minimum(upper[source][:, None], lower),
        "one flow for each",
    ),
    (
        "07-two-layers",
        lambda upper, lower, source: torch.minimum(upper[0][:, None], lower).sum(0),
        "from token 1",
    ),
    ("07-ignored", 0, "residual pipe"),
    ("07-ignored", 0.5**12, "no factor"),
    ("07-ignored", 1.5, "leaves the source"),
    ("07-ignored", 1, "what pipes lead"),
    ("07-ignored", 0.25, "½ · 0"),
    ("07-caption", ["rollout", "relevance"], "get in there"),
    ("07-caption", "Relevance", "none of the four"),
    ("07-caption", [], "both towers"),
    ("08-local", (math.log(64), math.log(64)), "differ"),
    ("08-local", (math.log(512), math.log(64)), "other way round"),
    ("08-local", (1.0, 6.0), "blind guess"),
    ("08-local", (math.log(64), 8 * math.log(64)), "averaged"),
    ("08-local", (math.log(64), 5.0), "8 × 64"),
    ("08-ring", lambda rank, k, world: (rank + k) % world, "other way round"),
    ("08-ring", lambda rank, k, world: k, "round 0"),
    ("08-ring", lambda rank, k, world: rank - k, "% world"),
    ("08-ring", lambda rank, k, world: rank, "holds"),
]


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_unanswered_says_not_yet(name, capsys):
    check(name, ...)
    assert "not yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="not yet"):
        check(name, ..., strict=True)


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_is_confirmed(name, capsys):
    check(name, RIGHT[name], strict=True)
    assert capsys.readouterr().out.startswith(f"✓ {name}: ")


@pytest.mark.parametrize("name, answer, hint", WRONG)
def test_wrong_gets_a_hint(name, answer, hint, capsys):
    check(name, answer)
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ") and hint in out
    with pytest.raises(AssertionError, match=name):
        check(name, answer, strict=True)


def test_unknown_exercise():
    with pytest.raises(ValueError, match="no exercise 'nope'"):
        check("nope", ...)


def test_names_say_which_notebook():
    assert all(name[:2].isdigit() and name[2] == "-" for name in CHECKS)
