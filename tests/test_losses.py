"""The losses against PyTorch's cross-entropy written out by hand and against plain loops in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.losses import clip_loss, same_image, siglip_loss

LN10, CLIP_SCALE = math.log(10), math.log(1 / 0.07)


def unit(n, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=dtype), dim=-1)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def log_sum_exp(values):
    top = max(value.item() for value in values)
    return top + torch.stack([(value - top).exp() for value in values]).sum().log()


def clip_loop(images, texts, logit_scale, ids):
    """InfoNCE, pair by pair: minus the log-probability of each positive, weighted 1 / (number of positives)."""
    n = len(images)
    logits = [
        [logit_scale.exp() * (images[i] * texts[j]).sum() for j in range(n)] for i in range(n)
    ]
    total = scalar(0.0)
    for i in range(n):
        positives = [j for j in range(n) if ids[j] == ids[i]]
        row, column = logits[i], [logits[j][i] for j in range(n)]
        for j in positives:
            total = total + (log_sum_exp(row) - row[j]) / len(positives)
            total = total + (log_sum_exp(column) - column[j]) / len(positives)
    return total / (2 * n)


def siglip_loop(images, texts, logit_scale, logit_bias, ids):
    """The sigmoid loss, pair by pair."""
    n, total = len(images), scalar(0.0)
    for i in range(n):
        for j in range(n):
            z = 1 if ids[i] == ids[j] else -1
            logit = logit_scale.exp() * (images[i] * texts[j]).sum() + logit_bias
            total = total - torch.log(1 / (1 + torch.exp(-z * logit)))
    return total / n


def value_and_gradients(loss, *inputs):
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs)


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


batches = st.tuples(
    st.lists(st.integers(0, 4), min_size=1, max_size=7),
    st.integers(1, 5),
    st.integers(0, 2**16),
    st.floats(-1.0, 3.0),
)


@settings(max_examples=25, deadline=None)
@given(batches)
def test_clip_loss_is_the_loop_in_value_and_gradients(batch):
    ids, dim, seed, scale = batch
    inputs = unit(len(ids), dim, seed), unit(len(ids), dim, seed + 1), scalar(scale)
    fast = value_and_gradients(lambda i, t, s: clip_loss(i, t, s, torch.tensor(ids)), *inputs)
    assert_same(fast, value_and_gradients(lambda i, t, s: clip_loop(i, t, s, ids), *inputs))


@settings(max_examples=25, deadline=None)
@given(batches, st.floats(-12.0, 2.0))
def test_siglip_loss_is_the_loop_in_value_and_gradients(batch, bias):
    ids, dim, seed, scale = batch
    inputs = unit(len(ids), dim, seed), unit(len(ids), dim, seed + 1), scalar(scale), scalar(bias)
    fast = value_and_gradients(
        lambda i, t, s, b: siglip_loss(i, t, s, b, torch.tensor(ids)), *inputs
    )
    assert_same(fast, value_and_gradients(lambda i, t, s, b: siglip_loop(i, t, s, b, ids), *inputs))


def test_clip_loss_is_cross_entropy_over_rows_and_columns():
    inputs = unit(9, 6), unit(9, 6, seed=1), scalar(CLIP_SCALE)

    def by_hand(images, texts, logit_scale):
        logits, target = torch.exp(logit_scale) * images @ texts.T, torch.arange(9)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    assert_same(value_and_gradients(clip_loss, *inputs), value_and_gradients(by_hand, *inputs))


def test_siglip_loss_is_the_algorithm_of_the_paper():
    inputs = unit(9, 6), unit(9, 6, seed=1), scalar(LN10), scalar(-10.0)

    def by_hand(images, texts, t_prime, bias):
        logits = images @ texts.T * torch.exp(t_prime) + bias
        labels = 2 * torch.eye(9, dtype=torch.float64) - torch.ones(9, 9, dtype=torch.float64)
        return -torch.sum(F.logsigmoid(labels * logits)) / 9

    assert_same(value_and_gradients(siglip_loss, *inputs), value_and_gradients(by_hand, *inputs))


def test_distinct_ids_are_the_plain_diagonal():
    images, texts, ids = unit(5, 4), unit(5, 4, seed=1), torch.tensor([7, 3, 900_000_000_000, 0, 5])
    assert same_image(images).equal(torch.eye(5, dtype=torch.bool))
    assert clip_loss(images, texts, scalar(1.0), ids) == clip_loss(images, texts, scalar(1.0))
    assert siglip_loss(images, texts, scalar(1.0), scalar(-1.0), ids.numpy()) == siglip_loss(
        images, texts, scalar(1.0), scalar(-1.0)
    )


def test_one_pair_has_nothing_to_confuse():
    assert clip_loss(unit(1, 4), unit(1, 4, seed=1), scalar(CLIP_SCALE)) == 0


def test_an_untrained_model_is_at_ln_n():
    n = 512
    equal = torch.ones(n, 8, dtype=torch.float64) / math.sqrt(8)
    assert clip_loss(equal, equal, scalar(CLIP_SCALE)).item() == pytest.approx(math.log(n))
    random = clip_loss(unit(n, 256), unit(n, 256, seed=1), scalar(CLIP_SCALE)).item()
    assert math.log(n) < random < math.log(n) + 1


@pytest.mark.parametrize(("bias", "loss"), [(-10, 10.006), (-2.71, 10.955), (-4.84, 5.848)])
def test_siglip_starts_where_theory_says(bias, loss):
    embeds = torch.eye(256, dtype=torch.float64)
    start = siglip_loss(embeds[:128], embeds[128:], scalar(LN10), scalar(bias))
    assert start.item() == pytest.approx(loss, abs=5e-4)


def test_siglip_divides_the_sum_by_n_and_not_by_n_squared():
    images, texts = unit(16, 8), unit(16, 8, seed=1)
    logits = 10 * images @ texts.T - 10
    mean_of_pairs = F.binary_cross_entropy_with_logits(logits, torch.eye(16, dtype=torch.float64))
    assert siglip_loss(images, texts, scalar(LN10), scalar(-10.0)).item() == pytest.approx(
        16 * mean_of_pairs.item()
    )


def test_siglip_started_like_clip_is_another_start():
    images, texts = unit(128, 64), unit(128, 64, seed=1)
    assert siglip_loss(images, texts, scalar(CLIP_SCALE), scalar(-10.0)) > siglip_loss(
        images, texts, scalar(LN10), scalar(-10.0)
    )


def test_length_is_the_business_of_the_model():
    """The losses see lengths, so forgetting to normalise changes them."""
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    assert not clip_loss(3 * images, texts, scalar(1.0)).isclose(
        clip_loss(images, texts, scalar(1.0))
    )
    assert not siglip_loss(3 * images, texts, scalar(1.0), scalar(-1.0)).isclose(
        siglip_loss(images, texts, scalar(1.0), scalar(-1.0))
    )


def test_arange_is_no_class():
    """Shuffling the batch, both sides alike, changes nothing; shuffling one side does."""
    images, texts, order = (
        unit(8, 4),
        unit(8, 4, seed=1),
        torch.randperm(8, generator=torch.Generator().manual_seed(0)),
    )
    for loss in (clip_loss, lambda i, t, s: siglip_loss(i, t, s, scalar(-5.0))):
        plain = loss(images, texts, scalar(2.0))
        assert loss(images[order], texts[order], scalar(2.0)).isclose(plain)
        assert not loss(images[order], texts, scalar(2.0)).isclose(plain)


def test_the_two_sides_play_the_same_role():
    images, texts, ids = unit(6, 4), unit(6, 4, seed=1), torch.tensor([0, 1, 1, 2, 0, 1])
    assert clip_loss(images, texts, scalar(2.0), ids).isclose(
        clip_loss(texts, images, scalar(2.0), ids)
    )
    swapped = siglip_loss(texts, images, scalar(2.0), scalar(-5.0), ids)
    assert siglip_loss(images, texts, scalar(2.0), scalar(-5.0), ids).isclose(swapped)


def test_two_captions_of_one_image_are_no_negatives():
    """With perfect embeddings and a large scale, only ignoring the duplicate costs anything."""
    embeds, ids = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 2])
    scale = scalar(math.log(100))
    least = math.log(2) / 2  # rows 0 and 1 of 4 share their mass between two captions: ln 2 each
    assert clip_loss(embeds, embeds, scale, ids).item() == pytest.approx(least)
    assert siglip_loss(embeds, embeds, scale, scalar(-50.0), ids).item() == pytest.approx(
        0, abs=1e-9
    )
    assert siglip_loss(embeds, embeds, scale, scalar(-50.0)).item() == pytest.approx(
        25
    )  # two pairs, 50 each, over 4
    pull = value_and_gradients(lambda e: clip_loss(e, embeds, scale, ids), embeds)[1][0]
    assert pull.abs().max() < 1e-9


def test_scale_and_bias_get_a_gradient():
    images, texts = unit(6, 4), unit(6, 4, seed=1)
    assert value_and_gradients(clip_loss, images, texts, scalar(1.0))[1][2] != 0
    _, gradients = value_and_gradients(siglip_loss, images, texts, scalar(1.0), scalar(-1.0))
    assert gradients[2] != 0 and gradients[3] != 0


@pytest.mark.parametrize("scale", [0.0, math.log(100)])
def test_float32_at_the_largest_scale_stays_finite(scale):
    embeds = unit(64, 8, dtype=torch.float32)
    for texts in (embeds, -embeds):
        for loss in (clip_loss, lambda i, t, s: siglip_loss(i, t, s, torch.tensor(-10.0))):
            value, gradients = value_and_gradients(loss, embeds, texts, torch.tensor(scale))
            assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


def test_mismatched_batches_are_refused():
    with pytest.raises((RuntimeError, ValueError)):
        clip_loss(unit(3, 4), unit(4, 4), scalar(0.0))
    with pytest.raises((RuntimeError, ValueError)):
        clip_loss(unit(3, 4), unit(3, 4), scalar(0.0), torch.arange(4))
