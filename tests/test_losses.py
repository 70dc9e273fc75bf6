"""The losses against plain loops, in float64; notebooks 03 and 05 compare with cross-entropies."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.losses import clip_loss, siglip_loss

LN10 = math.log(10)


def unit(n, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, dim, generator=generator, dtype=dtype), dim=-1)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def clip_loop(images, texts, logit_scale, ids):
    """InfoNCE pair by pair: −ln p of each positive, weighted 1 / (number of positives)."""
    n, total = len(images), scalar(0.0)
    logits = logit_scale.exp() * (images[:, None] * texts).sum(dim=2)
    for i in range(n):
        positives = [j for j in range(n) if ids[j] == ids[i]]
        for j in positives:
            total = total + (logits[i].logsumexp(0) - logits[i, j]) / len(positives)
            total = total + (logits[:, i].logsumexp(0) - logits[j, i]) / len(positives)
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


def assert_same(first, second, *inputs):
    """Two losses agree in value and gradients."""
    first, second = value_and_gradients(first, *inputs), value_and_gradients(second, *inputs)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


ids_of_a_batch = st.lists(st.integers(0, 4), min_size=1, max_size=7)
numbers = st.integers(1, 5), st.integers(0, 2**16), st.floats(-1.0, 3.0), st.floats(-12.0, 2.0)


@settings(max_examples=50, deadline=None)
@given(ids_of_a_batch, *numbers)
def test_the_losses_are_their_loops_in_value_and_gradients(ids, dim, seed, scale, bias):
    """The losses see lengths, which whoever made the embeddings has divided by, and any ids."""
    inputs = 1.5 * unit(len(ids), dim, seed), unit(len(ids), dim, seed + 1), scalar(scale)
    assert_same(lambda *x: clip_loss(*x, np.array(ids)), lambda *x: clip_loop(*x, ids), *inputs)
    inputs = *inputs, scalar(bias)
    assert_same(lambda *x: siglip_loss(*x, ids), lambda *x: siglip_loop(*x, ids), *inputs)


@pytest.mark.parametrize("scale", [0.0, math.log(100)])
def test_float32_at_the_largest_scale_stays_finite(scale):
    embeds = unit(64, 8, dtype=torch.float32)
    for texts in (embeds, -embeds):
        for loss in (clip_loss, lambda i, t, s: siglip_loss(i, t, s, torch.tensor(-10.0))):
            value, gradients = value_and_gradients(loss, embeds, texts, torch.tensor(scale))
            assert value.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sigmoid_loss_of_16_bit_embeddings_is_computed_in_32(dtype):
    """Half of the inputs, or all of them: the value is that of the same numbers in float32."""
    halves = [t.to(dtype) for t in (unit(512, 64), unit(512, 64, seed=1), scalar(LN10))]
    exact = siglip_loss(*(t.double() for t in halves), scalar(-10.0)).item()
    for bias in (torch.tensor(-10.0), torch.tensor(-10.0, dtype=dtype)):
        value, gradients = value_and_gradients(siglip_loss, *halves, bias)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(exact, rel=1e-5)
        assert [g.dtype for g in gradients] == [dtype, dtype, dtype, bias.dtype]
    mixed = siglip_loss(halves[0], halves[1].float(), halves[2].float(), torch.tensor(-10.0))
    assert mixed.item() == pytest.approx(exact, rel=1e-5)
