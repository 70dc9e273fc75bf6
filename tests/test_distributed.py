"""Past one device: real processes against one, chunks and gradient caching against the plain step."""

import copy
import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import distributed
from helpers.distributed import (
    cached_backward,
    chunked_siglip_loss,
    gather,
    gathered_clip_loss,
    processes,
    ring_siglip_loss,
)
from helpers.losses import clip_loss, siglip_loss
from helpers.model import CLIP, SIGLIP_START

PAIRS = {"clip": (clip_loss, gathered_clip_loss), "siglip": (siglip_loss, ring_siglip_loss)}


def tiny(kind, dtype=torch.float64, dropout=True):
    torch.manual_seed(0)
    model = CLIP(
        6, 5, embed_dim=8, **({} if kind == "clip" else {**SIGLIP_START, "logit_bias": -1.5})
    ).to(dtype)
    return model.train(dropout)


def batch_of(n, dtype=torch.float64, seed=1):
    """Features of n pairs; every third row shows the picture of row 0, so that positives lie in other processes too."""
    generator = torch.Generator().manual_seed(seed)
    image_ids = torch.arange(n) * (torch.arange(n) % 3 > 0)
    images = torch.randn(n, 6, generator=generator, dtype=dtype)
    texts = torch.randn(n, 5, generator=generator, dtype=dtype)
    return {"image_features": images, "text_features": texts, "image_ids": image_ids}


def rows_of(batch, rows):
    return {name: values[rows] for name, values in batch.items()}


def gradients(model):
    assert all(p.grad is not None for p in model.parameters())
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def plain_step(model, batch, loss):
    model.zero_grad()
    value = loss(**model(batch), image_ids=batch["image_ids"])
    value.backward()
    return value.detach(), gradients(model)


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        torch.testing.assert_close(
            other[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


class Largest(TorchDispatchMode):
    """Watches every operation inside: `numel` is the size of the largest tensor that any of them made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(
            [self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))]
        )
        return result


# Several processes: each of these runs in every process of one group.


def check_processes(world, rank):
    assert (dist.get_world_size(), dist.get_rank()) == processes() == (world, rank)
    pids = gather(torch.tensor([os.getpid()]))
    assert len(set(pids.tolist())) == world


def check_losses(world, rank, b=4):
    """Loss and every parameter's gradient under DDP equal those of one process with all rows."""
    batch = batch_of(b * world)
    own = rows_of(batch, slice(rank * b, (rank + 1) * b))
    for kind, (one_process, several) in PAIRS.items():
        model = tiny(kind, dropout=False)
        expected = plain_step(model, batch, one_process)
        value, found = plain_step(DistributedDataParallel(tiny(kind, dropout=False)), own, several)
        mean = gather(value[None]).mean()
        assert_same(expected, (mean, found))
        local = gather(one_process(**model(own), image_ids=own["image_ids"]).detach()[None]).mean()
        assert abs(local - expected[0]) > 0.1, "negatives of one process alone are another loss"
        outputs = model(own)
        no_ids = gather(several(**outputs).detach()[None]).mean()
        torch.testing.assert_close(no_ids, one_process(**model(batch)).detach())


def check_gradient_flows_to_other_processes(world, rank):
    """Without DDP: the sum of all processes' losses, seen from the embeddings of one."""
    ends = {
        "clip": {"logit_scale": torch.tensor(1.0)},
        "siglip": dict.fromkeys(SIGLIP_START, torch.tensor(0.5)),
    }
    for kind, (one_process, several) in PAIRS.items():
        generator = torch.Generator().manual_seed(3)
        images, texts = F.normalize(
            torch.randn(2, 2 * world, 4, generator=generator), dim=-1
        ).requires_grad_()
        expected = torch.autograd.grad(
            world * one_process(images, texts, **ends[kind]), (images, texts)
        )
        rows = slice(2 * rank, 2 * rank + 2)
        mine = [images[rows].detach().requires_grad_(), texts[rows].detach().requires_grad_()]
        found = torch.autograd.grad(several(*mine, **ends[kind]), mine)
        for gradient, whole in zip(found, expected):
            torch.testing.assert_close(gradient, whole[rows])


def check_ring_never_holds_all(world, rank, b=16, width=8):
    with Largest() as largest:
        images, texts = F.normalize(torch.randn(2, b, width), dim=-1)
        inputs = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
        scale, bias = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        ring_siglip_loss(*inputs, scale, bias).backward()
    assert largest.numel <= max(b * b, 2 * b * width) < b * world * b


def check_gradient_caching(world, rank, b=5, chunk=2):
    """With dropout, a chunk that does not divide the batch, and DDP: as one step on what the chunks gave."""
    own = rows_of(batch_of(b * world), slice(rank * b, (rank + 1) * b))
    for kind, (_, several) in PAIRS.items():
        model = DistributedDataParallel(tiny(kind))
        torch.manual_seed(10 + rank)
        value = cached_backward(model, own, several, chunk)
        found = gradients(model)

        model = tiny(kind)
        torch.manual_seed(10 + rank)
        parts = [model(rows_of(own, slice(i, i + chunk))) for i in range(0, b, chunk)]
        outputs = {
            n: torch.cat([p[n] for p in parts]) if v.ndim else v for n, v in parts[0].items()
        }
        expected = several(**outputs, image_ids=own["image_ids"])
        expected.backward()
        averaged = gradients(model)
        for gradient in averaged.values():
            dist.all_reduce(gradient)
            gradient /= world
        assert_same((expected.detach(), averaged), (value, found))


CHECKS = [
    check_processes,
    check_losses,
    check_gradient_flows_to_other_processes,
    check_ring_never_holds_all,
    check_gradient_caching,
]


def work(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    for check in CHECKS:
        check(world, rank)
    (folder / f"done-{rank}").write_text(str(os.getpid()))
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_several_processes_equal_one(world, tmp_path):
    mp.spawn(work, (world, tmp_path), nprocs=world)
    pids = [(tmp_path / f"done-{rank}").read_text() for rank in range(world)]
    assert len({*pids, str(os.getpid())}) == world + 1


@pytest.mark.parametrize("kind", PAIRS)
def test_one_process_is_the_plain_loss(kind):
    one_process, several = PAIRS[kind]
    batch = batch_of(7)
    assert_same(
        *(plain_step(tiny(kind, dropout=False), batch, loss) for loss in (one_process, several))
    )
    assert processes() == (1, 0)


# Chunks.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.integers(1, 15),
    st.booleans(),
    st.integers(0, 99),
)
def test_chunked_siglip_is_siglip(image_ids, chunk, with_ids, seed):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, len(image_ids), 5, generator=generator, dtype=torch.float64)
    inputs = [
        *F.normalize(draws, dim=-1),
        torch.tensor(math.log(10)).double(),
        torch.tensor(-3.0).double(),
    ]
    ids = image_ids if with_ids else None
    results = []
    for loss, options in ((siglip_loss, {}), (chunked_siglip_loss, {"chunk": chunk})):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        value = loss(*leaves, ids, **options)
        results.append((value.detach(), dict(enumerate(torch.autograd.grad(3 * value, leaves)))))
    assert_same(*results, rtol=1e-10, atol=1e-12)


def test_chunked_siglip_makes_no_square():
    n, chunk, width = 96, 8, 4
    inputs = [*F.normalize(torch.randn(2, n, width), dim=-1), torch.tensor(2.0), torch.tensor(-3.0)]
    sizes = {}
    for name, loss, options in (
        ("plain", siglip_loss, {}),
        ("chunked", chunked_siglip_loss, {"chunk": chunk}),
    ):
        with Largest() as largest:
            leaves = [tensor.clone().requires_grad_() for tensor in inputs]
            loss(*leaves, **options).backward()
        sizes[name] = largest.numel
    assert sizes == {"plain": n * n, "chunked": chunk * n}


def test_half_precision_is_computed_in_full():
    images, texts = F.normalize(torch.randn(2, 9, 16), dim=-1).to(torch.bfloat16)
    leaves = [
        t.clone().requires_grad_() for t in (images, texts, torch.tensor(2.0), torch.tensor(-3.0))
    ]
    with torch.autocast("cpu", torch.bfloat16):
        value = chunked_siglip_loss(*leaves, chunk=4)
    value.backward()
    expected = siglip_loss(images.float(), texts.float(), torch.tensor(2.0), torch.tensor(-3.0))
    torch.testing.assert_close(value, expected)
    assert [leaf.grad.dtype for leaf in leaves] == [torch.bfloat16] * 2 + [torch.float32] * 2


# Gradient caching.


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("chunk", [1, 4, 7, 50])
def test_cached_is_plain_without_dropout(kind, chunk):
    model, batch, loss = (
        tiny(kind, torch.float32, dropout=False),
        batch_of(10, torch.float32),
        PAIRS[kind][0],
    )
    expected = plain_step(model, batch, loss)
    model.zero_grad()
    value = cached_backward(model, batch, loss, chunk)
    assert_same(expected, (value, gradients(model)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", PAIRS)
def test_cached_replays_dropout(kind):
    """As one step on what the chunks gave, each embedded once; also the random numbers drawn afterwards."""
    batch, loss, chunk = batch_of(10), PAIRS[kind][0], 4
    model = tiny(kind)
    torch.manual_seed(5)
    parts = [model(rows_of(batch, slice(i, i + chunk))) for i in (0, 4, 8)]
    outputs = {n: torch.cat([p[n] for p in parts]) if v.ndim else v for n, v in parts[0].items()}
    expected = loss(**outputs, image_ids=batch["image_ids"])
    expected.backward()
    expected, next_draw = (expected.detach(), gradients(model)), torch.rand(3)

    again = tiny(kind)
    torch.manual_seed(5)
    value = cached_backward(again, batch, loss, chunk)
    assert_same(expected, (value, gradients(again)))
    assert torch.equal(torch.rand(3), next_draw)
    torch.manual_seed(6)
    again.zero_grad()
    assert cached_backward(again, batch, loss, chunk) != value, "dropout was on"


def test_cached_adds_up_and_calls_the_given_backward():
    model, batch = tiny("clip", dropout=False), batch_of(6)
    expected = plain_step(model, batch, clip_loss)[1]
    cached_backward(model, batch, clip_loss, 4, backward=lambda tensor: (2 * tensor).backward())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 3 * expected[name])


def test_cached_works_with_a_locked_side_and_lists():
    model, batch = tiny("clip", dropout=False), batch_of(6)
    model.image_head.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    clip_loss(**model(batch), image_ids=batch["image_ids"]).backward()
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()
    cached_backward(model, {**batch, "image_ids": batch["image_ids"].tolist()}, clip_loss, 4)
    torch.testing.assert_close([p.grad for p in trained], expected)
    assert all(p.grad is None for p in model.image_head.parameters())


def test_cached_never_sees_more_than_a_chunk():
    """What autograd keeps at any one time: about what a batch of `chunk` would keep."""

    def kept(step):
        now, most = [0], [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor = tensor
                now[0] += tensor.numel()
                most[0] = max(most[0], now[0])

            def __del__(self):
                now[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            step()
        return most[0]

    wide = CLIP(400, 400, embed_dim=8).train()
    features = torch.randn(2, 64, 400)
    batch = {
        "image_features": features[0],
        "text_features": features[1],
        "image_ids": torch.arange(64),
    }
    plain = kept(lambda: plain_step(copy.deepcopy(wide), batch, clip_loss))
    small = kept(lambda: plain_step(copy.deepcopy(wide), rows_of(batch, slice(8)), clip_loss))
    cached = kept(lambda: cached_backward(copy.deepcopy(wide), batch, clip_loss, 8))
    whole_loss = kept(
        lambda: clip_loss(
            *F.normalize(torch.randn(2, 64, 8), dim=-1).requires_grad_(), torch.zeros(())
        )
    )
    assert cached <= max(small, whole_loss) + 2 * 64 * 8 < plain / 2


def test_alone_nothing_is_passed_on():
    tensors = torch.ones(2), torch.zeros(3)
    assert distributed.pass_on(*tensors) == tensors
