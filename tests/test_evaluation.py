"""Ranks against a brute-force ranking, chance against all orders, intervals against scipy's."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers import evaluation
from helpers.evaluation import classify, difference, ranks, retrieval, retrieval_chance, wilson
from helpers.probes import average_precision_chance, compositional, hits_at, mean_average_precision

NUMBER_TYPES = {
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "int64": lambda x: x.long(),
    "int8": lambda x: x.to(torch.int8),
    "numpy": lambda x: x.numpy(),
    "numpy float16": lambda x: x.numpy().astype(np.float16),
    "with gradients": lambda x: x.float().requires_grad_(),
}


def one_way(scores, relevant):
    """The metrics of one task from sorted lists, wrong items first in a tie; both [Q, G]."""
    hits = np.array([row[np.lexsort((row, -s))] for s, row in zip(scores, relevant)])
    best, total = hits.argmax(axis=1) + 1, hits.sum(axis=1)
    places = np.arange(1, hits.shape[1] + 1)
    precision = hits * (places <= total[:, None]) * hits.cumsum(axis=1) / places
    metrics = {f"recall@{k}": (best <= k).mean() for k in (1, 5, 10)}
    metrics |= {"median_rank": np.median(best), "mrr": (1 / best).mean()}
    return metrics | {"map@R": (precision.sum(axis=1) / total).mean()}


def brute_force(scores, owner):
    """`retrieval` from scores [N images, M captions]."""
    relevant = np.arange(len(scores))[:, None] == owner
    tasks = {"text_to_image": (scores.T, relevant.T), "image_to_text": (scores, relevant)}
    return {f"{t}/{name}": v for t, both in tasks.items() for name, v in one_way(*both).items()}


@st.composite
def galleries(draw):
    """Small whole numbers, so that ties are common and scores exact; 1 to 4 captions an image."""
    n, dim = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    captions = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    owner = draw(st.permutations(np.repeat(np.arange(n), captions).tolist()))
    rows = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    images = draw(st.lists(rows, min_size=n, max_size=n))
    texts = draw(st.lists(rows, min_size=len(owner), max_size=len(owner)))
    return torch.tensor(images).float(), torch.tensor(texts).float(), np.array(owner)


@settings(max_examples=100, deadline=None)
@given(galleries(), st.sampled_from(list(NUMBER_TYPES)))
def test_retrieval_is_the_brute_force_ranking_in_any_number_type(gallery, number_type):
    images, texts, owner = gallery
    expected = brute_force((images @ texts.T).numpy(), owner)
    images, texts = NUMBER_TYPES[number_type](images), NUMBER_TYPES[number_type](texts)
    assert retrieval(images, texts, owner) == pytest.approx(expected)
    assert retrieval(images, texts, torch.tensor(owner).to(torch.uint8)) == pytest.approx(expected)
    for task, hits in hits_at(images, texts, owner, k=5).items():
        assert hits.double().mean() == pytest.approx(expected[f"{task}/recall@5"])


def pairs(n=40, captions=5, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, dim, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(n * captions, dim, generator=generator), dim=-1)
    return images, texts, torch.arange(n).repeat_interleave(captions)


def test_chance_is_the_mean_over_all_orders():
    owner = np.array([0, 0, 2, 3, 4])  # image 1 has no caption: it can be found and never asks
    labels = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 0], [0, 1, 0], [0, 1, 0]])
    orders = np.array(list(itertools.permutations(range(5))))  # [120, 5]
    for k in (1, 2, 3, 4, 9):
        found = [(orders[:, :k] == 3).any(axis=1).mean()]
        of_images = [(owner[orders[:, :k]] == image).any(axis=1).mean() for image in (0, 2, 3, 4)]
        found.append(np.mean(of_images))
        assert list(retrieval_chance(owner, [k]).values()) == pytest.approx(found)
    found = [mean_average_precision(np.stack([order] * 3, axis=1), labels) for order in orders]
    assert average_precision_chance(torch.tensor(labels)) == pytest.approx(np.mean(found))


@pytest.mark.parametrize("chunk", [1, 7, 39, 512])
def test_chunks_change_nothing_and_equal_captions_tie_wherever_they_stand(chunk):
    """Every caption occurs at two images: whatever rounding does, nobody is alone at the top."""
    images, texts, _ = pairs(n=2 * 39, captions=1, dim=37)
    texts, groups = texts[:39].repeat(2, 1), torch.arange(78)
    for cast in (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.double):
        rank = ranks(cast(images), cast(texts), groups, groups, chunk)
        assert (rank >= 2).all() and rank.equal(ranks(cast(images), cast(texts), groups, groups))


def test_scores_that_are_not_a_number_count_against_us():
    images, _, owner = pairs()
    texts = images[owner].clone()
    texts[:5] = math.nan  # image 0's captions: last as queries, first as rivals of other images
    metrics = retrieval(images, texts, owner, ks=(1, 5, 6))
    assert metrics["text_to_image/recall@6"] == 195 / 200
    assert metrics["image_to_text/recall@5"] == 0
    assert metrics["image_to_text/recall@6"] == 39 / 40
    assert retrieval(images * math.nan, texts, owner)["text_to_image/recall@10"] == 0


def test_an_image_without_captions_and_a_label_outside_the_classes_are_named():
    for query, owner in ((1, [0, 0, 2]), (2, [0, 1, 7])):
        with pytest.raises(ValueError, match=f"query {query} has nothing to find"):
            retrieval(torch.eye(3), torch.eye(3), owner)
    with pytest.raises(ValueError, match="query 1"):
        classify(torch.eye(2), torch.eye(2), [0, 2])


def test_prompts_are_english():
    pairs = ("a photo of a {}", "apple"), ("A {}", "orange"), ("a small {}", "umbrella")
    expected = ["a photo of an apple", "An orange", "a small umbrella", "a pair of skis"]
    assert [evaluation.prompt(*pair) for pair in (*pairs, ("a {}", "skis"))] == expected
    assert len(set(evaluation.TEMPLATES)) == len(evaluation.TEMPLATES)
    assert all(template.count("{}") == 1 for template in evaluation.TEMPLATES)


def test_class_embeds_are_the_normalised_mean_of_unit_vectors():
    vectors = {"a cat": [3.0, 0], "the cat": [0, 0.5], "a dog": [-1.0, 0], "the dog": [-2.0, 0]}
    encode_texts = lambda texts: torch.tensor([vectors[text] for text in texts])  # noqa: E731
    embeds = evaluation.class_embeds(encode_texts, ["cat", "dog"], ["a {}", "the {}"])
    torch.testing.assert_close(embeds, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


@pytest.mark.parametrize("cast", NUMBER_TYPES.values(), ids=NUMBER_TYPES)
def test_classification_counts_in_any_number_type(cast):
    classes = 8 * torch.eye(10)
    images = classes[[0, 1, 2, 3]] + classes[[9, 9, 9, 9]] / 8
    result = classify(cast(images), classes, cast(torch.tensor([0.0, 1, 2, 9])))
    assert result["n"] == 4 and result["predictions"].tolist() == [0, 1, 2, 3]
    assert (result["top1"], result["top1_chance"]) == (0.75, 0.1)
    assert (result["top5"], result["top5_chance"]) == (1.0, 0.5)
    assert result["top1_interval"] == wilson(3, 4) and result["top5_interval"] == wilson(4, 4)


def test_constant_class_scores_are_never_right_and_undefined_ones_refused():
    result = classify(torch.ones(3, 8), torch.ones(8, 8), [0, 1, 2])
    assert result["top1"] == result["top5"] == 0
    broken = torch.eye(3)
    broken[1, 1] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        classify(broken, torch.eye(3), [0, 1, 2])
    with pytest.raises(ValueError, match="NaN"):
        mean_average_precision(broken, torch.eye(3))


@pytest.mark.parametrize("cast", NUMBER_TYPES.values(), ids=NUMBER_TYPES)
def test_average_precision_by_hand(cast):
    scores = torch.tensor([[9.0, 1, 0], [8, 2, 0], [7, 3, 0]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]])  # the last category is never shown
    expected = ((1 + 2 / 3) / 2 + 1) / 2
    assert mean_average_precision(cast(scores), labels) == pytest.approx(expected)
    assert mean_average_precision(cast(scores), labels.numpy() > 0) == pytest.approx(expected)
    constant = mean_average_precision(cast(0 * scores), labels)
    assert constant == pytest.approx((2 / 3 + 1 / 3) / 2)  # the share of images that show it
    with pytest.raises(ValueError, match="no image shows any category"):
        mean_average_precision(cast(scores), 0 * labels)


@pytest.mark.parametrize("cast", NUMBER_TYPES.values(), ids=NUMBER_TYPES)
def test_the_compositional_probe_needs_a_strict_win(cast):
    images = torch.eye(3)[[0, 0, 0, 0]]
    captions, foils = torch.eye(3)[[0, 1, 1, 0]], torch.eye(3)[[1, 0, 1, 0]]
    result = compositional(cast(images), cast(captions), foils)  # right, wrong, tie, tie
    assert result == {"accuracy": 0.25, "interval": wilson(1, 4), "chance": 0.5, "n": 4}
    assert compositional(images * math.nan, captions, foils)["accuracy"] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts):
    hits, n = counts
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx(tuple(expected), abs=1e-5)
    assert wilson(np.int16(hits), np.int16(n)) == wilson(hits, n)  # a product that overflows


def answers(*shares):
    """Random hits [5, Q] of models right about so many of 80 images, and each query's image [Q]."""
    rng = np.random.default_rng(0)
    images = rng.permutation(np.repeat(np.arange(80), rng.integers(1, 6, 80)))
    return *((rng.random((5, 80)) < share)[:, images] for share in shares), images


def test_intervals_of_a_difference_are_scipys():
    hits, baseline, images = answers(0.8, 0.5)
    result = difference(hits, torch.tensor(baseline), images)
    paired = stats.ttest_rel(hits.mean(axis=1), baseline.mean(axis=1))
    assert result["mean"] == pytest.approx(hits.mean() - baseline.mean())
    assert result["over_seeds"] == pytest.approx(list(paired.confidence_interval()))
    gaps = hits.mean(axis=0) - baseline.mean(axis=0)
    gaps = [gaps[images == image] for image in range(80)]

    def mean_gap(drawn):
        return np.concatenate([gaps[image] for image in drawn]).mean()

    again = stats.bootstrap([range(80)], mean_gap, vectorized=False, method="percentile", rng=1)
    low, high = again.confidence_interval
    assert result["over_images"] == pytest.approx([low, high], abs=0.05 * (high - low))
    assert difference(hits, baseline, images) == result, "another draw"


def test_a_gain_or_loss_needs_both_intervals():
    more, less, images = answers(0.8, 0.5)
    always, never = np.ones_like(more), np.zeros_like(more)
    on_one_image, by_three_seeds = always & (images == 0), always & (np.arange(5) < 3)[:, None]
    pairs = (more, less), (less, more), (always, never)
    verdicts = [difference(*pair, images)["verdict"] for pair in pairs]
    assert verdicts == ["gain", "loss", "gain"]
    for hits in (never, on_one_image, by_three_seeds, always[:1]):
        result = difference(hits, never[: len(hits)], images)
        assert result["verdict"] == "no difference shown"
    assert result["over_seeds"] is None and result["over_images"] == [1, 1]
