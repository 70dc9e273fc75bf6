"""Every exercise: unanswered, wrong in the ways readers are wrong, and right."""

import math
from collections import Counter

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


RIGHT = {
    "01-caption-count": count_captions,
    "02-masked-mean": lambda hidden, mask: (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True),
    "03-one-pair": 0,
    "03-untrained": math.log(512),
    "03-temperature": lambda similarities, temperature: torch.softmax(similarities / temperature, dim=1),
    "06-arange": lambda logits, labels: (logits.argmax(1) == labels).float().mean(),
}
WRONG = [
    ("01-caption-count", count_only_captioned, "632"),
    ("02-masked-mean", lambda hidden, mask: hidden.mean(1), "padding is averaged in"),
    ("02-masked-mean", lambda hidden, mask: (hidden * mask[..., None]).mean(1), "divide by its length"),
    ("02-masked-mean", lambda hidden, mask: hidden[:, 0, :2], "shape"),
    ("03-one-pair", 1, "probability"),
    ("03-untrained", 9, "nats"),
    ("03-untrained", 0, "1/n"),
    ("03-temperature", lambda s, t: torch.softmax(s * t, 1), "Divide"),
    ("03-temperature", lambda s, t: torch.softmax(s / t, 0), "sum to 1"),
    ("03-temperature", lambda s: s, "TypeError"),
    ("06-arange", lambda logits, labels: (logits.argmax(1) == torch.arange(6)).float().mean(), "arange"),
    ("06-arange", lambda logits, labels: 100 * (logits.argmax(1) == labels).float().mean(), "between 0 and 1"),
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
