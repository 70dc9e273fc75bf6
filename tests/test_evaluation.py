"""Ranks against a brute-force ranking, ties included; classification, intervals and the compositional probe."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.evaluation import (
    TEMPLATES,
    class_embeds,
    classify,
    compositional,
    mean_average_precision,
    prompt,
    ranks,
    retrieval,
    retrieval_chance,
    wilson,
)


def brute_force(scores, owner, ks=(1, 5, 10)):
    """The metrics of `retrieval` from sorted lists: scores [N images, M captions], wrong items first among equals."""
    n, m = scores.shape
    tasks = {
        "text_to_image": [(scores[:, j], [i == owner[j] for i in range(n)]) for j in range(m)],
        "image_to_text": [(scores[i], [owner[j] == i for j in range(m)]) for i in range(n)],
    }
    metrics = {}
    for task, queries in tasks.items():
        best, average_precision = [], []
        for query_scores, relevant in queries:
            order = sorted(
                range(len(relevant)), key=lambda item: (-query_scores[item], relevant[item])
            )
            found = [relevant[item] for item in order]
            best.append(found.index(True) + 1)
            total = sum(found)
            precisions = [
                sum(found[: place + 1]) / (place + 1) * found[place] for place in range(total)
            ]
            average_precision.append(sum(precisions) / total)
        for k in ks:
            metrics[f"{task}/recall@{k}"] = np.mean([rank <= k for rank in best])
        metrics[f"{task}/median_rank"] = np.median(best)
        metrics[f"{task}/mrr"] = np.mean([1 / rank for rank in best])
        metrics[f"{task}/map@R"] = np.mean(average_precision)
    return metrics


@st.composite
def galleries(draw):
    """Small whole numbers, so that ties are common and scores exact; 1 to 4 captions an image, in any order."""
    n, dim = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    captions = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
    owner = draw(st.permutations(np.repeat(np.arange(n), captions).tolist()))
    rows = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim)
    images = draw(st.lists(rows, min_size=n, max_size=n))
    texts = draw(st.lists(rows, min_size=len(owner), max_size=len(owner)))
    return torch.tensor(images).float(), torch.tensor(texts).float(), np.array(owner)


@settings(max_examples=100, deadline=None)
@given(galleries(), st.integers(1, 9))
def test_retrieval_is_the_brute_force_ranking(gallery, chunk):
    images, texts, owner = gallery
    expected = brute_force((images @ texts.T).numpy(), owner)
    assert retrieval(images, texts, owner, chunk=chunk) == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(galleries(), st.randoms(use_true_random=False))
def test_the_order_of_images_and_captions_does_not_matter(gallery, random):
    images, texts, owner = gallery
    image_order, text_order = (
        random.sample(range(len(images)), len(images)),
        random.sample(range(len(texts)), len(texts)),
    )
    place = np.argsort(image_order)  # where each image went
    shuffled = retrieval(images[image_order], texts[text_order], place[owner[text_order]])
    assert shuffled == pytest.approx(retrieval(images, texts, owner))


def pairs(n=40, captions=5, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, dim, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(n * captions, dim, generator=generator), dim=-1)
    return images, texts, torch.arange(n).repeat_interleave(captions)


def test_perfect_embeddings_score_one():
    images, _, owner = pairs()
    metrics = retrieval(images, images[owner], owner)
    assert all(value == 1 for value in metrics.values()) and len(metrics) == 12


def test_constant_embeddings_score_nothing():
    _, _, owner = pairs()
    metrics = retrieval(torch.ones(40, 3), torch.ones(200, 3), owner)
    assert metrics["text_to_image/recall@10"] == metrics["image_to_text/recall@10"] == 0
    assert metrics["text_to_image/median_rank"] == 40
    assert metrics["image_to_text/median_rank"] == 196  # all but its own other four come first


def test_random_embeddings_score_chance():
    images, texts, owner = pairs(n=300, dim=300)
    chance = retrieval_chance(owner)
    assert chance["text_to_image/recall@1"] == 1 / 300
    assert chance["image_to_text/recall@10"] == pytest.approx(
        1 - math.prod((1490 - i) / (1500 - i) for i in range(5))
    )
    metrics = retrieval(images, texts, owner)
    for name, value in chance.items():
        assert metrics[name] == pytest.approx(value, abs=0.035)
    assert metrics["text_to_image/median_rank"] == pytest.approx(150, abs=20)


def test_chance_of_a_gallery_smaller_than_k_is_one():
    assert set(retrieval_chance([0, 0, 1], ks=(5,)).values()) == {1.0}


def test_one_of_an_images_captions_is_enough_and_every_caption_is_a_query():
    images = torch.eye(3)
    texts = torch.eye(3)[[0, 1, 1, 1, 2, 2]]  # the second caption of image 0 looks like image 1
    metrics = retrieval(images, texts, [0, 0, 1, 1, 2, 2], ks=(1,))
    assert metrics["image_to_text/recall@1"] == pytest.approx(
        2 / 3
    )  # image 1 ties with a foreign caption
    assert metrics["text_to_image/recall@1"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("chunk", [1, 7, 39, 512])
def test_equal_captions_tie_wherever_they_stand(chunk):
    """Every caption occurs at two images: whatever rounding does, nobody is alone at the top."""
    images, texts, _ = pairs(n=2 * 39, captions=1, dim=37)
    texts = texts[:39].repeat(2, 1)
    rank = ranks(images, texts, torch.arange(78), torch.arange(78), chunk)
    assert (rank >= 2).all()


@pytest.mark.parametrize("chunk", [1, 3, 64, 1000])
def test_chunks_change_nothing(chunk):
    images, texts, owner = pairs(n=150, dim=64)
    assert retrieval(images, texts, owner, chunk=chunk) == retrieval(
        images, texts, owner, chunk=150
    )


def test_ranks_of_several_relevant_items_and_padding():
    queries, gallery = torch.tensor([[1.0], [-1.0]]), torch.tensor([[5.0], [4.0], [3.0], [2.0]])
    found = ranks(queries, gallery, [0, 1], [1, 0, 1, 0])
    assert found.tolist() == [[2, 4], [2, 4]]
    assert ranks(queries, gallery, [0, 1], [1, 0, 0, 0]).tolist() == [
        [2, 3, 4],
        [4, 5, 6],
    ]  # 5 and 6: no such item


def test_scores_that_are_not_a_number_count_against_us():
    images, _, owner = pairs()
    texts = images[owner].clone()
    texts[:5] = (
        math.nan
    )  # the captions of image 0: last as queries, first as rivals of every other image
    metrics = retrieval(images, texts, owner, ks=(1, 5, 6))
    assert metrics["text_to_image/recall@6"] == 195 / 200
    assert metrics["image_to_text/recall@5"] == 0
    assert metrics["image_to_text/recall@6"] == 39 / 40
    assert retrieval(images * math.nan, texts, owner)["text_to_image/recall@10"] == 0


def test_an_image_without_captions_is_named():
    with pytest.raises(ValueError, match="query 1 has nothing to find"):
        retrieval(torch.eye(3), torch.eye(3), [0, 0, 2])
    with pytest.raises(ValueError, match="query 2 has nothing to find"):
        retrieval(torch.eye(3), torch.eye(3), [0, 1, 7])


def test_prompts_are_english():
    assert prompt("a photo of a {}", "apple") == "a photo of an apple"
    assert prompt("A {}", "orange") == "An orange"
    assert prompt("a small {}", "umbrella") == "a small umbrella"
    assert prompt("a {}", "skis") == "a pair of skis"
    assert prompt("a {}", "red car") == "a red car"
    assert len(set(TEMPLATES)) == len(TEMPLATES) and all(
        template.count("{}") == 1 for template in TEMPLATES
    )


def test_class_embeds_are_the_normalised_mean_of_unit_vectors():
    vectors = {
        "a cat": [3.0, 0.0],
        "the cat": [0.0, 0.5],
        "a dog": [-1.0, 0.0],
        "the dog": [-2.0, 0.0],
    }
    embeds = class_embeds(
        lambda texts: torch.tensor([vectors[text] for text in texts]),
        ["cat", "dog"],
        ["a {}", "the {}"],
    )
    torch.testing.assert_close(embeds, torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))


def test_classification_counts():
    classes = torch.eye(10)
    images = classes[[0, 1, 2, 3]] + 0.1 * classes[[9, 9, 9, 9]]
    result = classify(images, classes, [0, 1, 2, 9])
    assert (result["top1"], result["top5"], result["chance"], result["top5_chance"]) == (
        0.75,
        1.0,
        0.1,
        0.5,
    )
    assert result["n"] == 4 and result["predictions"].tolist() == [0, 1, 2, 3]
    assert result["interval"] == wilson(3, 4) and result["top5_interval"] == wilson(4, 4)


def test_constant_or_undefined_class_scores_are_never_right():
    for images in (torch.ones(3, 8), torch.full((3, 8), math.nan)):
        result = classify(images, torch.ones(8, 8), [0, 1, 2])
        assert result["top1"] == result["top5"] == 0


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(ValueError, match="query 1"):
        classify(torch.eye(2), torch.eye(2), [0, 2])


def test_average_precision_by_hand():
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.2, 0.0], [0.7, 0.3, 0.0]])
    labels = np.array(
        [[1, 0, 0], [0, 0, 0], [1, 1, 0]], dtype=bool
    )  # the last category is never shown
    assert mean_average_precision(scores, labels) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert mean_average_precision(np.zeros((3, 3)), labels) == pytest.approx(
        (2 / 3 + 1 / 3) / 2
    )  # constant: chance
    assert mean_average_precision(torch.tensor(scores), torch.tensor(labels)) > 0.9
    with pytest.raises(ValueError, match="no image shows any category"):
        mean_average_precision(scores, np.zeros_like(labels))


def test_the_compositional_probe_needs_a_strict_win():
    images = torch.eye(3)[[0, 0, 0, 0]]
    captions = torch.eye(3)[[0, 1, 1, 0]]
    foils = torch.eye(3)[[1, 0, 1, 0]]  # right, wrong, tie, tie
    result = compositional(images, captions, foils)
    assert result == {"accuracy": 0.25, "interval": wilson(1, 4), "chance": 0.5, "n": 4}
    assert compositional(images * math.nan, captions, foils)["accuracy"] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(counts):
    """The ends are where the observed share is 1.96 standard errors away."""
    hits, n = counts
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n + 1e-12 and hits / n - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(hits / n - end) == pytest.approx(
                1.96 * math.sqrt(end * (1 - end) / n), rel=1e-6
            )


def test_wilson_known_value():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
