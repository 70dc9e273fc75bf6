"""Every exercise: unanswered, wrong in the ways readers are wrong, and right."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from helpers.exercises import EXERCISES, check
from helpers.losses import clip_loss

ZERO = torch.tensor(0.0)  # the logarithm of a factor of 1


def count_captions(coco):
    counts = {image["id"]: 0 for image in coco["images"]}
    for annotation in coco["annotations"]:
        counts[annotation["image_id"]] += 1
    return counts


def box_iou(a, b, least=0):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(least, width) * max(least, height)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def pad(sequences):
    rows = [torch.tensor(sequence) for sequence in sequences]
    return [pad_sequence(rows, True), pad_sequence([torch.ones_like(row) for row in rows], True)]


def mean(hidden, mask):
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def padding(lengths, size):
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return 1 - sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def choose_alpha(alphas, recall, probes, worst=min):
    allowed = [i for i in range(len(alphas)) if worst(p[i] for p in probes.values()) >= -1]
    return alphas[max(allowed, key=lambda i: recall[i])]


def own_among(best):
    """The share of rows i that hold i."""
    return (best == torch.arange(len(best))[:, None]).any(dim=1).float().mean()


def accuracies(scores, labels):
    return (scores.argmax(dim=-1) == labels).double().mean(dim=-1)


def recall_among(similarity, owner, gallery):
    asks = torch.isin(owner, gallery)
    nearest = gallery[similarity[asks][:, gallery].argmax(1)]
    return (nearest == owner[asks]).double().mean()


def choose(dev_scores, dev_labels, val_scores, val_labels):
    return accuracies(val_scores, val_labels)[accuracies(dev_scores, dev_labels).argmax()]


def any_caption_wins(logits, image_ids):
    right = image_ids[:, None] == image_ids
    of_rows = -(logits.softmax(1) * right).sum(1).log()
    of_columns = -(logits.softmax(0) * right).sum(0).log()
    return (of_rows.mean() + of_columns.mean()) / 2


def clip(gradients, most, down_only=True):
    length = torch.cat([g.flatten() for g in gradients]).norm()
    return [g * (min(1, most / length) if down_only else most / length) for g in gradients]


def difference(after, before, root=True):
    d = np.subtract(after, before)
    return d.mean(), d.std(ddof=1) / (math.sqrt(len(d)) if root else 1)


def sigmoid_in_chunks(images, texts, t, b, chunk, shifted=True):
    total = 0
    for start in range(0, len(images), chunk):
        logits = t * images[start : start + chunk] @ texts.T + b
        signs = 2 * torch.eye(len(images))[start * shifted :][: len(logits)] - 1
        total -= F.logsigmoid(signs * logits).sum()
    return total / len(images)


def widest(matrices, source, best=torch.amax, narrower=torch.minimum):
    for matrix in matrices.flip(0):
        source = best(narrower(source[:, None], matrix), 0)
    return source


def merge(found, sizes, k):
    starts = np.cumsum([0, *sizes])
    rows = torch.cat([rows + start for (_, rows), start in zip(found, starts)])
    return rows[torch.cat([scores for scores, _ in found]).argsort(descending=True)[:k]]


RIGHT = {
    "00-chance": 5 / 1000,
    "00-diagonal": lambda s, k: own_among(s.topk(k, dim=1).indices),
    "01-caption-count": count_captions,
    "01-direction": "image → text",
    "01-iou": box_iou,
    "01-padding-mask": pad,
    "02-token-count": lambda size, patch: (size // patch) ** 2 + 1,
    "02-masked-mean": mean,
    "02-padding": padding,
    "02-normalise": lambda a, b: torch.cosine_similarity(a[:, None], b, dim=-1),
    "03-one-pair": 0,
    "03-untrained": math.log(512),
    "03-any-caption": any_caption_wins,
    "03-temperature": math.log(511) / 0.5,
    "04-clip": clip,
    "04-paired": difference,
    "04-bytes": lambda trained, frozen: 16 * trained + 4 * frozen,
    "04-share": 0.39,
    "04-alpha": choose_alpha,
    "05-one-pair": math.log(1 + math.exp(10)),
    "05-chunks": sigmoid_in_chunks,
    "05-calm": lambda n: -math.log(n - 1),
    "05-shift": lambda n, m: math.log((n - 1) / (m - 1)),
    "06-choose": choose,
    "06-prompt": "a drawing of a {}",
    "07-widest": widest,
    "07-ignored": 0.5,
    "07-other-layers": 1.0,
    "08-local": (math.log(64), math.log(512)),
    "08-ring": lambda rank, k, world: (rank - k) % world,
    "08-merge": merge,
    "09-gallery": recall_among,
    "09-growth": 0.3,
}
WRONG = [
    ("00-chance", 0.5, "percentage"),
    ("00-diagonal", lambda s, k: own_among(s.topk(k, dim=0).indices.T), "columns"),
    ("00-diagonal", lambda s, k: own_among(s.topk(1, dim=1).indices), "k is 2"),
    ("01-direction", "text → image", "vague"),
    ("01-direction", "both", "write"),
    ("01-direction", "image → text or text → image", "alone"),
    ("01-iou", lambda a, b: box_iou(a, b, least=-99), "apart share nothing"),
    ("01-padding-mask", lambda s: (pad(s)[0], pad(s)[0] != 0), "the number 0"),
    ("02-masked-mean", lambda hidden, mask: hidden.mean(1), "padding is averaged in"),
    ("02-padding", lambda lengths, size: padding(lengths, len(lengths)), "longest of all"),
    ("02-normalise", lambda a, b: a @ b.T, "dot products"),
    ("02-normalise", lambda a, b: a, "[2, 3]"),
    ("03-any-caption", lambda logits, ids: clip_loss(logits, torch.eye(3), ZERO, ids), "clip_loss"),
    ("03-any-caption", lambda logits, ids: clip_loss(logits, torch.eye(3), ZERO), "no part"),
    ("04-clip", lambda g, most: [x * min(1, most / x.norm()) for x in g], "each tensor alone"),
    ("04-clip", lambda g, most: clip(g, most, down_only=False), "short enough"),
    ("04-clip", lambda g, most: clip(g, 1.0), "whatever `most` says"),
    ("04-paired", lambda *x: (np.subtract(*x).mean(), np.subtract(*x).std(ddof=1) / 3**0.5), "√3"),
    ("04-paired", lambda after, before: difference(after, before, root=False), "√n"),
    ("04-alpha", lambda alphas, recall, _: alphas[recall.index(max(recall))], "loses more than"),
    ("04-alpha", lambda *x: choose_alpha(*x, worst=lambda p: next(iter(p))), "every probe"),
    ("05-chunks", lambda *x: sigmoid_in_chunks(*x, shifted=False), "second chunk"),
    ("05-calm", lambda n: -math.log(n), "nearly"),
    ("05-shift", lambda n, m: math.log(n / m), "odds"),
    ("06-choose", lambda dev, dl, val, vl: accuracies(val, vl).max(), "chosen on the pictures"),
    ("06-prompt", "a drawing of a dog", "0 times"),
    ("06-prompt", "a {} or a {}", "several times"),
    ("06-prompt", "{}", "bare name"),
    ("06-prompt", "a picture of an {}", "turns it into"),
    ("06-prompt", "a {} next to a red car", "car"),
    ("06-prompt", ["a {}"], "list"),
    ("06-prompt", "xyz {}", "what kind of picture"),
    ("06-prompt", "a {}", "what kind of picture"),
    ("07-widest", lambda *x: widest(*x, best=torch.sum, narrower=torch.mul), "rollout"),
    ("07-widest", lambda matrices, source: widest(matrices.flip(0), source), "first layer"),
    ("08-merge", lambda found, sizes, k: merge(found, [0, 0, 0], k), "counted through"),
    ("09-gallery", lambda s, owner, gallery: recall_among(s, owner, torch.arange(4)), "left out"),
]


def table():
    """For each test of an exercise its known wrong answers, and none at all, with their hints."""
    for name, exercise in EXERCISES.items():
        for number, test in enumerate(exercise.get("tests", [exercise])):
            if "right" in test:
                for result, hint in [*test.get("wrong", ()), ([], test["hint"])]:
                    yield name, number, result, hint


def test_every_exercise_is_tested_and_named_after_its_notebook():
    assert set(RIGHT) == set(EXERCISES)
    assert all(name[:2].isdigit() and name[2] == "-" for name in EXERCISES)
    with pytest.raises(ValueError, match="no exercise 'nope'"):
        check("nope", ...)


@pytest.mark.parametrize("name", RIGHT)
def test_right_is_confirmed_and_unanswered_says_not_yet(name, capsys):
    check(name, RIGHT[name], strict=True)
    assert capsys.readouterr().out == f"✓ {name}: {EXERCISES[name]['notice']}\n"
    check(name, ...)
    assert "not yet" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="not yet"):
        check(name, ..., strict=True)


@pytest.mark.parametrize("name, answer, hint", WRONG)
def test_wrong_gets_a_hint(name, answer, hint, capsys):
    check(name, answer)
    out = capsys.readouterr().out
    assert out.startswith(f"✗ {name}: ") and hint in out
    with pytest.raises(AssertionError, match=name):
        check(name, answer, strict=True)


@pytest.mark.parametrize("name, number, result, hint", list(table()))
def test_each_wrong_result_of_the_table_gets_its_hint(name, number, result, hint, capsys):
    tests = EXERCISES[name].get("tests", [EXERCISES[name]])
    results = itertools.cycle([*(test["right"] for test in tests[:number]), result])
    answer = (lambda *inputs: next(results)) if "inputs" in tests[0] else result
    test_wrong_gets_a_hint(name, answer, hint, capsys)


def test_every_type_of_number_is_accepted():
    kinds = np.float32, np.float64, torch.tensor, np.atleast_1d
    for kind in (*kinds, lambda x: torch.tensor(x).requires_grad_()):
        check("00-chance", kind(0.005), strict=True)
        check("05-shift", lambda n, m, kind=kind: kind(RIGHT["05-shift"](n, m)), strict=True)
    check("08-local", np.float32(RIGHT["08-local"]), strict=True)
    check("08-local", torch.tensor(RIGHT["08-local"]), strict=True)
    for kind in (np.asarray, torch.Tensor.double, torch.Tensor.tolist, list):
        for name in ("02-masked-mean", "07-widest"):
            check(name, lambda *x, f=RIGHT[name], kind=kind: kind(f(*x)), strict=True)


def test_what_is_right_may_be_rounded_or_written_with_another_arrow():
    check("01-iou", lambda a, b: round(box_iou(a, b), 2), strict=True)
    for answer in ("image -> text", "Image to text", "image_to_text"):
        check("01-direction", answer, strict=True)


def test_an_answer_may_change_its_inputs():
    def in_place(gradients, most):
        length = math.sqrt(sum(g.square().sum() for g in gradients))
        return [g.mul_(min(1, most / length)) for g in gradients]

    for _ in range(2):
        check("04-clip", in_place, strict=True)
