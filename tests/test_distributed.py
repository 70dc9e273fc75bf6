"""Past one device: processes against one, chunks and gradient caching against the plain step."""

import copy
import math
import os
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close as assert_same
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import distributed
from helpers.distributed import cached_backward, chunked_siglip_loss, gather, processes
from helpers.losses import clip_loss, siglip_loss
from helpers.model import CLIP, SIGLIP_START

PAIRS = {
    "clip": (clip_loss, distributed.gathered_clip_loss),
    "siglip": (siglip_loss, distributed.ring_siglip_loss),
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # for float64; a third in float32 is 3e-8 off


def tiny(kind, dropout=True):
    torch.manual_seed(0)
    start = {} if kind == "clip" else {**SIGLIP_START, "logit_bias": -1.5}
    return CLIP(6, 5, embed_dim=8, **start).double().train(dropout)


def batch_of(n):
    """Features of n pairs. Every third row shows the image of row 0: a positive elsewhere, too."""
    generator = torch.Generator().manual_seed(1)
    return {
        "image_features": torch.randn(n, 6, generator=generator).double(),
        "text_features": torch.randn(n, 5, generator=generator).double(),
        "image_ids": torch.arange(n) * (torch.arange(n) % 3 > 0),
    }


def rows_of(batch, rows):
    return {name: values[rows] for name, values in batch.items()}


def joined(parts):
    """The outputs of several parts as those of one batch; scalars are the same in all."""
    return {n: torch.cat([p[n] for p in parts]) if v.ndim else v for n, v in parts[0].items()}


def gradients(model):
    assert all(p.grad is not None for p in model.parameters())
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def plain_step(model, batch, loss, chunk=None):
    """Loss and gradients of one step, the batch embedded in chunks or at once."""
    model.zero_grad()
    n = len(batch["image_ids"])
    starts = range(0, n, chunk or n)
    outputs = joined([model(rows_of(batch, slice(i, i + (chunk or n)))) for i in starts])
    value = loss(**outputs, image_ids=batch["image_ids"])
    value.backward()
    return value.detach(), gradients(model)


def cached_step(model, batch, loss, chunk):
    model.zero_grad()
    return cached_backward(model, batch, loss, chunk), gradients(model)


class Largest(TorchDispatchMode):
    """Watches every operation inside: `numel` is the size of the largest tensor they made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


# Several processes: each of these runs in every process of one group.


def check_processes(world, rank):
    assert (dist.get_world_size(), dist.get_rank()) == processes() == (world, rank)
    pids = gather(torch.tensor([os.getpid()]))
    assert len(set(pids.tolist())) == world
    every_other = torch.arange(8.0).view(2, 4)[:, ::2]  # not contiguous
    assert torch.equal(gather(every_other), every_other.repeat(world, 1))
    (before,) = distributed.pass_on(torch.tensor([rank]))
    assert before.item() == (rank - 1) % world


def check_losses(world, rank, b=4):
    """Loss and every parameter's gradient under DDP equal those of one process with all rows."""
    batch = batch_of(b * world)
    own = rows_of(batch, slice(rank * b, (rank + 1) * b))
    for kind, (one_process, several) in PAIRS.items():
        model = tiny(kind, dropout=False)
        expected = plain_step(model, batch, one_process)
        value, by_name = plain_step(DistributedDataParallel(copy.deepcopy(model)), own, several)
        assert_same(expected, (gather(value[None]).mean(), by_name), **EXACT)
        outputs = model(own)
        local = gather(one_process(**outputs, image_ids=own["image_ids"]).detach()[None]).mean()
        assert abs(local - expected[0]) > 0.1, "negatives of one process alone are another loss"
        no_ids = gather(several(**outputs).detach()[None]).mean()
        assert_same(no_ids, one_process(**model(batch)).detach(), **EXACT)


def check_ring_never_holds_all(world, rank, b=16, width=8):
    with Largest() as largest:
        inputs = [t.requires_grad_() for t in F.normalize(torch.randn(2, b, width), dim=-1)]
        ends = [torch.zeros((), requires_grad=True) for _ in range(2)]
        distributed.ring_siglip_loss(*inputs, *ends).backward()
    assert largest.numel <= max(b * b, 2 * b * width) < b * world * b


def check_gradient_caching(world, rank, b=5, chunk=2):
    """With dropout, chunks that do not divide the batch, and DDP: as one step on what they gave."""
    own = rows_of(batch_of(b * world), slice(rank * b, (rank + 1) * b))
    for kind, (_, several) in PAIRS.items():
        torch.manual_seed(10 + rank)
        model = tiny(kind)
        torch.manual_seed(10 + rank)
        expected, averaged = plain_step(model, own, several, chunk)
        for gradient in averaged.values():
            dist.all_reduce(gradient)
            gradient /= world
        model = DistributedDataParallel(tiny(kind))
        torch.manual_seed(10 + rank)
        assert_same((expected, averaged), cached_step(model, own, several, chunk), **EXACT)


CHECKS = [check for name, check in globals().items() if name.startswith("check_")]


def work(rank, world, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
    for check in CHECKS:
        check(world, rank)
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(world, tmp_path):
    mp.start_processes(work, (world, tmp_path), nprocs=world, start_method="forkserver")


@pytest.mark.parametrize("kind", PAIRS)
def test_one_process_is_the_plain_loss_to_the_last_digits_of_float64(kind):
    steps = [plain_step(tiny(kind, dropout=False), batch_of(7), loss) for loss in PAIRS[kind]]
    assert_same(*steps, **EXACT)
    assert processes() == (1, 0)


# Chunks.

IDS = st.lists(st.integers(0, 4), min_size=1, max_size=12)


def siglip_pass(loss, embeds, image_ids=None):
    """The loss, its gradients, and the size of the largest tensor on the way."""
    ends = torch.tensor([math.log(10), -3.0], dtype=torch.promote_types(embeds.dtype, torch.float))
    leaves = [t.clone().requires_grad_() for t in (*embeds, *ends)]
    with Largest() as largest:
        value = loss(*leaves, image_ids)
        gradients = torch.autograd.grad(3 * value, leaves)
    return value.detach(), gradients, largest.numel


@settings(max_examples=60, deadline=None)
@given(IDS, st.integers(1, 15), st.booleans(), st.integers(0, 99))
def test_chunked_siglip_is_siglip(image_ids, chunk, with_ids, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, len(image_ids), 5, generator=generator, dtype=torch.float64)
    losses = siglip_loss, partial(chunked_siglip_loss, chunk=chunk)
    ids = image_ids if with_ids else None
    one, other = (siglip_pass(loss, F.normalize(draws, dim=-1), ids) for loss in losses)
    assert_same(one[:2], other[:2], rtol=1e-10, atol=1e-12)


def test_chunked_siglip_makes_no_square():
    draws = F.normalize(torch.randn(2, 96, 4), dim=-1)
    sizes = [siglip_pass(f, draws)[2] for f in (siglip_loss, partial(chunked_siglip_loss, chunk=8))]
    assert sizes == [96 * 96, 8 * 96]


def test_half_precision_is_computed_in_full():
    embeds = F.normalize(torch.randn(2, 9, 16), dim=-1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients, _ = siglip_pass(partial(chunked_siglip_loss, chunk=4), embeds)
    assert_same(value, siglip_pass(siglip_loss, embeds.float())[0])
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 2 + [torch.float32] * 2


# Gradient caching.


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_cached_replays_dropout(kind, chunk):
    """As one step on what the chunks gave; also the random numbers drawn afterwards."""
    model, batch, loss = tiny(kind), batch_of(10), PAIRS[kind][0]
    torch.manual_seed(5)
    expected, next_draw = plain_step(model, batch, loss, chunk), torch.rand(3)
    torch.manual_seed(5)
    assert_same(expected, cached_step(model, batch, loss, chunk))
    assert torch.equal(torch.rand(3), next_draw)
    torch.manual_seed(6)
    assert cached_step(model, batch, loss, chunk)[0] != expected[0], "dropout was on"


def test_cached_adds_up_calls_the_given_backward_and_works_with_a_locked_side_and_lists():
    model, batch = tiny("clip", dropout=False), batch_of(6)
    expected = plain_step(model, batch, clip_loss)[1]
    model.image_head.requires_grad_(False)
    lists = {**batch, "image_ids": batch["image_ids"].tolist()}
    cached_backward(model, lists, clip_loss, 4, backward=lambda tensor: (2 * tensor).backward())
    for name, gradient in gradients(model).items():
        assert_same(gradient, expected[name] * (1 if name.startswith("image_head") else 3))


def most_saved(step):
    """How many numbers autograd keeps at the worst moment of a step."""
    sizes, totals = weakref.WeakKeyDictionary(), []

    def save(tensor):
        saved = partial(torch.clone, tensor)
        sizes[saved] = tensor.numel()
        totals.append(sum(sizes.values()))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved()):
        step()
    return max(totals)


def test_cached_never_sees_more_than_a_chunk():
    """What autograd keeps at any one time: about what a batch of `chunk` would keep."""
    wide = CLIP(400, 400, embed_dim=8).train()
    images, texts = torch.randn(2, 64, 400)
    batch = {"image_features": images, "text_features": texts, "image_ids": torch.arange(64)}
    plain = most_saved(lambda: plain_step(wide, batch, clip_loss))
    cached = most_saved(lambda: cached_step(wide, batch, clip_loss, 8))
    assert cached < plain / 4
