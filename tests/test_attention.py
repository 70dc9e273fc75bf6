"""Attention: recorded without a trace, and its four readings against plain loops, networkx and gradients by hand."""

import copy
import tracemalloc
import weakref

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from helpers import attention, max_flow
from helpers.attention import (
    METHODS,
    attention_flow,
    explain,
    fuse_heads,
    input_bound,
    look,
    one_token,
    patch_grid,
    pooling,
    raw_attention,
    record,
    relevance,
    rollout,
    word_scores,
)
from helpers.model import CLIP
from tests.tiny import WORDS, image_tower, text_tower

# Three layers, weights large enough that attention is far from uniform, and dropout everywhere in training mode.
SHAPE = {"num_hidden_layers": 3, "initializer_range": 0.5}
DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
CAPTIONS = ["two dogs on the beach", "a cat", "a small red bus near the street and a big dog"]
UNIT = 2**30  # capacities are whole multiples of 1 / UNIT


def see(size=32):
    return image_tower(size=size, **SHAPE, **DROPOUT).eval()


def read():
    return text_tower(max_length=16, words=[*WORDS, "##s", "##es"], **SHAPE, **DROPOUT).eval()


def pictures(count=3, high=32, wide=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randint(
            0, 256, (count, 3, high, wide), dtype=torch.uint8, generator=generator
        )
    }


@pytest.fixture
def model():
    towers = see(), read()
    torch.manual_seed(0)
    return CLIP(16, 16, embed_dim=8, image_tower=towers[0], text_tower=towers[1]).eval()


def batch_of(tower):
    return tower.tokenize(CAPTIONS) if hasattr(tower, "tokenizer") else pictures()


def outputs(tower, **inputs):
    """The model's own forward with attention, on a copy that nobody else sees."""
    alone = copy.deepcopy(tower.model).eval()
    alone.set_attn_implementation("eager")
    return alone(**inputs, output_attentions=True)


def own(tower, batch):
    if "pixel_values" in batch:
        return outputs(tower, pixel_values=tower.normalise(batch["pixel_values"]))
    return outputs(tower, **batch)


# Recording


@pytest.mark.parametrize("make", [see, read])
def test_record_is_the_models_own_attention(make):
    tower = make()
    batch = batch_of(tower)
    expected = torch.stack(own(tower, batch).attentions).detach()  # [L, B, H, N, N]
    real = (
        batch.get("attention_mask", torch.ones(3, expected.shape[-1]))[:, None, :]
        .expand(-1, 2, -1)
        .bool()
    )
    found = record(tower, batch)
    assert found.shape == expected.shape == (3, 3, 2, real.shape[-1], real.shape[-1])
    for layer, other in zip(found, expected, strict=True):
        torch.testing.assert_close(layer[real], other[real])
        torch.testing.assert_close(layer[real].sum(dim=-1), torch.ones(int(real.sum())))
        assert not layer[~real].any()
    assert found.std() > 0.05, "the model attends to nothing in particular: not worth a test"


def test_float_pictures_are_taken_as_normalised():
    tower, batch = see(), pictures()
    normalised = {"pixel_values": tower.normalise(batch["pixel_values"])}
    assert torch.equal(record(tower, batch), record(tower, normalised))
    assert not normalised["pixel_values"].requires_grad


@pytest.mark.parametrize("make", [see, read])
def test_attention_is_recorded_without_dropout_and_without_a_copy_of_the_weights(make):
    tower = make()
    expected = record(tower, batch_of(tower))
    assert torch.equal(record(tower.train(), batch_of(tower)), expected)
    weights = {id(tensor) for tensor in [*tower.parameters(), *tower.buffers()]}
    with attention.showing_attention(tower):
        assert {id(tensor) for tensor in [*tower.parameters(), *tower.buffers()]} == weights


@pytest.mark.parametrize(
    "layers, same", [(slice(1, 3), [1, 2]), (slice(-1, None), [2]), ([2, 0], [2, 0]), ([1], [1])]
)
def test_only_the_asked_layers_are_held(layers, same):
    tower = see()
    found = record(tower, pictures(), layers)
    assert torch.equal(found, record(tower, pictures())[same])
    assert found.untyped_storage().nbytes() == found.numel() * 4, "a view into something larger"


def test_no_other_layer_outlives_its_chunk(monkeypatch):
    handed_out, alive = [], []
    forward = attention.forward

    def watched(*args, **kwargs):
        alive.append(sum(reference() is not None for reference in handed_out))
        weights, states = forward(*args, **kwargs)
        handed_out.extend(map(weakref.ref, weights))
        return weights, states

    monkeypatch.setattr(attention, "forward", watched)
    monkeypatch.setattr(attention, "AT_A_TIME", 1)
    found = record(see(), pictures(3), slice(1, 2))
    assert len(handed_out) == 9 and max(alive) <= 1, "the one asked for"
    assert found.shape[:2] == (1, 3) and all(reference() is None for reference in handed_out)


@pytest.mark.parametrize("make", [see, read])
def test_chunks_change_nothing(make, monkeypatch):
    tower = make()
    whole = record(tower, batch_of(tower))
    sizes = []
    forward = attention.forward
    watched = lambda t, b, **k: sizes.append(len(next(iter(b.values())))) or forward(t, b, **k)  # noqa: E731
    monkeypatch.setattr(attention, "forward", watched)
    monkeypatch.setattr(attention, "AT_A_TIME", 2)
    torch.testing.assert_close(record(tower, batch_of(tower)), whole)
    assert sizes == [2, 1]


def disorder(tower):
    """A state that is nobody's default: modes and requires_grad mixed, gradients here and there, a hook."""
    for i, part in enumerate(tower.modules()):
        part.training = i % 3 > 0
    for i, weight in enumerate(tower.parameters()):
        weight.requires_grad_(i % 2 > 0)
        weight.grad = torch.ones_like(weight) if i % 5 == 0 else None
    linears(tower)[0].register_forward_hook(lambda *_: None)


def linears(tower):
    return [part for part in tower.modules() if isinstance(part, nn.Linear)]


def state(tower):
    """All that a look at a tower must not change."""
    parts = [tower, *tower.model.modules()]
    return {
        "model": id(tower.model),
        "implementation": tower.model.config._attn_implementation,
        "config": tower.model.config.to_dict(),
        "modes": [part.training for part in parts],
        "attributes": [sorted(vars(part)) for part in parts],
        "hooks": [
            (list(p._forward_hooks), list(p._forward_pre_hooks), list(p._backward_hooks))
            for p in parts
        ],
        "weights": [
            (
                id(weight),
                weight._version,
                weight.requires_grad,
                id(weight.grad),
                getattr(weight.grad, "_version", None),
            )
            for weight in tower.parameters()
        ],
        "buffers": [(id(buffer), buffer._version) for buffer in tower.buffers()],
    }


LOOKS = {
    "image": lambda model: record(model.image_tower, pictures()),
    "text": lambda model: record(model.text_tower, model.text_tower.tokenize(CAPTIONS)),
    "pair": lambda model: relevance(model, pictures(), model.text_tower.tokenize(CAPTIONS)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_leaves_the_model_as_it_was(model, name, implementation):
    towers = model.image_tower, model.text_tower
    for tower in towers:
        tower.model.set_attn_implementation(implementation)
        disorder(tower)
    model.image_head.train()
    before = [state(tower) for tower in towers]
    assert before[0]["implementation"] == implementation
    for _ in range(2):
        LOOKS[name](model)
        assert [state(tower) for tower in towers] == before
    assert model.image_head[3].training and not model.text_head.training
    assert all(
        weight.grad is None
        for weight in [*model.image_head.parameters(), *model.text_head.parameters()]
    )


@pytest.mark.parametrize("name", LOOKS)
def test_an_exception_inside_leaves_the_model_as_it_was(model, name):
    towers = model.image_tower, model.text_tower

    def burst(*_):
        raise ArithmeticError("in the last layer")

    for tower in towers[1:] if name == "pair" else towers:
        disorder(tower)
        linears(tower)[-1].register_forward_hook(burst)
    before = [state(tower) for tower in towers]
    with pytest.raises(ArithmeticError, match="in the last layer"):
        LOOKS[name](model)
    assert [state(tower) for tower in towers] == before


@pytest.mark.parametrize("make", [see, read])
def test_a_model_that_keeps_no_weights_is_named(make, monkeypatch):
    tower = make()
    monkeypatch.setattr(type(tower.model), "set_attn_implementation", lambda self, name: None)
    before = state(tower)
    with pytest.raises(RuntimeError) as error:
        record(tower, batch_of(tower))
    for part in (
        type(tower.model).__name__,
        "no attention weights",
        "sdpa",
        "attn_implementation='eager'",
    ):
        assert part in str(error.value)
    assert state(tower) == before


def test_a_changed_patch_is_found_where_it_is_in_a_picture_that_is_not_square():
    """In the first layer a token's logits are its own: where one patch changes, only that column changes."""
    tower, batch = see(), pictures(2, high=16, wide=40)
    changed = {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][:, :, 8:16, 24:32] = 0  # the patch in row 1, column 3
    first, other = (
        record(tower, b, [0])[0].log()[:, 0, 0] for b in (batch, changed)
    )  # [B, N]: from CLS, one head
    moved = ((other - other[:, :1]) - (first - first[:, :1])).abs() > 1e-3
    grid = patch_grid(tower, batch["pixel_values"], moved)
    assert grid.shape == (2, 2, 5) and grid.nonzero().tolist() == [[0, 1, 3], [1, 1, 3]]


def test_padding_changes_nothing_for_real_tokens():
    tower = read()
    together = tower.tokenize(CAPTIONS)
    attentions = record(tower, together)
    assert not together["attention_mask"].all()
    for b, caption in enumerate(CAPTIONS):
        alone = tower.tokenize([caption])
        n = alone["input_ids"].shape[1]
        torch.testing.assert_close(attentions[:, b, :, :n, :n], record(tower, alone)[:, 0])
        assert not attentions[:, b, :, n:].any() and not attentions[:, b, :, :, n:].any()
        for method in ("raw", "rollout", "flow"):
            scores = look(tower, together, method)[b]
            torch.testing.assert_close(scores[:n], look(tower, alone, method)[0])
            assert not scores[n:].any()


@pytest.mark.parametrize("make", [see, read])
def test_pooling_is_the_towers_own(make):
    tower = make()
    batch = batch_of(tower)
    states = own(tower, batch).last_hidden_state
    weights = pooling(batch, states.shape[1])
    assert weights.shape == states.shape[:2]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    embeds = tower(**batch)
    torch.testing.assert_close(torch.einsum("bn,bnd->bd", weights, states), embeds)


def test_one_token_holds_all():
    assert one_token(2, 3, 4).tolist() == [[0, 0, 1, 0]] * 3


# Readings of attention, against plain loops


def some_attention(layers=3, examples=2, heads=3, tokens=5, seed=0, sharpness=2.0):
    """Random attention in float64: the softmax of normal logits times a sharpness, [L, B, H, N, N]."""
    logits = np.random.default_rng(seed).standard_normal((layers, examples, heads, tokens, tokens))
    return torch.from_numpy(logits * sharpness).softmax(dim=-1)


def some_source(examples, tokens, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(tokens), examples))


def slow_fused(matrices, fuse, discard, residual):
    """One layer of one example, heads [H][N][N] as lists, to one matrix [N][N] by the published recipes."""
    heads, n = len(matrices), len(matrices[0])
    pick = {"mean": lambda values: sum(values) / heads, "max": max, "min": min}[fuse]
    fused = [[pick([matrices[h][i][j] for h in range(heads)]) for j in range(n)] for i in range(n)]
    order = sorted((fused[i][j], i, j) for i in range(n) for j in range(n))
    for _, i, j in order[: int(n * n * discard)]:
        if (i, j) != (0, 0):
            fused[i][j] = 0.0
    for i in range(n):
        if residual:
            fused[i] = [0.5 * value + 0.5 * (i == j) for j, value in enumerate(fused[i])]
        total = sum(fused[i])
        fused[i] = [value / total if total else 0.0 for value in fused[i]]
    return fused


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("discard", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_heads_are_fused_as_published(fuse, discard, residual):
    attentions = some_attention()
    attentions[1, 0, :, 0, 0] = 1e-6  # the smallest of all, and yet the one that is never dropped
    before = attentions.clone()
    found = fuse_heads(attentions, fuse, discard, residual)
    expected = [
        [slow_fused(example, fuse, discard, residual) for example in layer]
        for layer in attentions.tolist()
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(attentions, before)
    sums = found.sum(dim=-1)
    if residual or not discard:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:  # a row that lost all of its entries has nothing to be divided by
        assert ((sums - 1).abs() < 1e-9).logical_or(sums == 0).all()


def test_discard_drops_that_share_and_never_the_first_tokens_own():
    attentions = some_attention(heads=1, tokens=10)
    attentions[:, :, :, 0, 0] = 1e-6
    kept = fuse_heads(attentions, discard=0.6, residual=False) > 0
    assert (kept.sum(dim=(-1, -2)) == 41).all() and kept[..., 0, 0].all()


@pytest.mark.parametrize("fuse", ["median", None])
def test_unknown_fusion_is_refused(fuse):
    with pytest.raises(ValueError, match=f"fuse is {fuse!r}.*'mean', 'max' or 'min'"):
        rollout(some_attention(), fuse=fuse)


@pytest.mark.parametrize("discard", [-0.1, 1, 90])
def test_discard_is_a_share(discard):
    with pytest.raises(ValueError, match=f"discard is {discard}.*at least 0 and below 1"):
        rollout(some_attention(), discard=discard)


def test_raw_attention_is_one_layers_rows_weighted_by_the_source():
    attentions, source = some_attention(), some_source(2, 5)
    for layer in (0, 1, -1):
        for head in (None, 0, 2):
            found = raw_attention(attentions, source, layer, head)
            for b in range(2):
                for j in range(5):
                    heads = range(3) if head is None else [head]
                    looks = [
                        attentions[layer, b, h, i, j] * source[b, i]
                        for h in heads
                        for i in range(5)
                    ]
                    assert found[b, j].item() == pytest.approx(
                        float(sum(looks)) / len(heads), abs=1e-12
                    )
    torch.testing.assert_close(
        raw_attention(attentions, source).sum(dim=-1), torch.ones(2, dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "fusing", [{}, {"fuse": "max"}, {"fuse": "min", "discard": 0.5}, {"residual": False}]
)
def test_rollout_multiplies_from_the_last_layer_to_the_first(fusing):
    attentions = some_attention(layers=4)
    whole = rollout(attentions, **fusing)
    for b in range(2):
        options = {"fuse": "mean", "discard": 0.0, "residual": True} | fusing
        layers = [slow_fused(layer[b], **options) for layer in attentions.tolist()]
        n = len(layers[0])
        product = layers[0]  # R_1 = Â_1, then R_l = Â_l R_(l-1)
        for above in layers[1:]:
            product = [
                [sum(above[i][k] * product[k][j] for k in range(n)) for j in range(n)]
                for i in range(n)
            ]
        torch.testing.assert_close(whole[b], torch.tensor(product, dtype=torch.float64))
    torch.testing.assert_close(whole.sum(dim=-1), torch.ones(2, 5, dtype=torch.float64))
    for i in range(5):
        torch.testing.assert_close(rollout(attentions, one_token(i, 2, 5), **fusing), whole[:, i])
    source = some_source(2, 5)
    mixture = torch.stack([sum(source[b, i] * whole[b, i] for i in range(5)) for b in range(2)])
    torch.testing.assert_close(rollout(attentions, source, **fusing), mixture)


def test_rollout_of_one_token_and_of_a_part_of_the_layers():
    assert rollout(some_attention(tokens=1)).shape == (2, 1, 1)
    attentions = some_attention(layers=4)
    torch.testing.assert_close(
        rollout(attentions[2:]) @ rollout(attentions[:2]), rollout(attentions)
    )


# Flow, against networkx


def graph(matrices, source, unit=float):
    """The layered graph, node (l, i) token i above layer l, (0, j) the inputs; unit: makes a capacity of a number."""
    layers, n = len(matrices), len(source)
    directed = nx.DiGraph()
    directed.add_edges_from(
        ("source", (layers, i), {"capacity": unit(source[i])}) for i in range(n)
    )
    for k, matrix in enumerate(matrices):
        edges = (
            ((k + 1, i), (k, j), {"capacity": unit(matrix[i][j])})
            for i in range(n)
            for j in range(n)
        )
        directed.add_edges_from(edges)
    return directed


def whole(capacity):
    return int(capacity * UNIT)


def by_networkx(directed, target):
    return nx.maximum_flow_value(
        directed, "source", (0, target), flow_func=nx.algorithms.flow.edmonds_karp
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(3, 6),
    tokens=st.integers(4, 12),
    residual=st.booleans(),
    spread=st.booleans(),
    sharpness=st.sampled_from([0.5, 2.0, 8.0]),
    sparse=st.booleans(),
)
def test_flow_is_the_maximum_flow(seed, layers, tokens, residual, spread, sharpness, sparse):
    rng = np.random.default_rng(seed)
    attentions = some_attention(layers, 1, 2, tokens, seed, sharpness)
    if sparse:  # entries that are exactly 0, at least one left in a row
        keep = torch.from_numpy(rng.random(attentions.shape) < 0.4) | (
            attentions == attentions.amax(-1, keepdim=True)
        )
        attentions = attentions * keep
        attentions = attentions / attentions.sum(dim=-1, keepdim=True)
    source = one_token(int(rng.integers(tokens)), 1, tokens).double()
    if spread:  # over some of the tokens, as over a caption's
        source = (
            torch.from_numpy(rng.dirichlet(np.ones(tokens)) * (rng.random(tokens) < 0.7))[None]
            + 0.1 * source
        )
        source = source / source.sum()
    found = attention_flow(attentions, source, residual)
    bound = input_bound(attentions, residual)[0]
    assert found.shape == (1, tokens) and found.dtype == torch.float64
    matrices, start = fuse_heads(attentions, residual=residual)[:, 0].tolist(), source[0].tolist()
    rounded, exact = graph(matrices, start, whole), graph(matrices, start)
    for j in rng.choice(tokens, 3, replace=False).tolist():
        value, (_, below) = nx.minimum_cut(
            rounded, "source", (0, j), flow_func=nx.algorithms.flow.edmonds_karp
        )
        ours = found[0, j].item()
        assert ours * UNIT == value, (
            "on whole capacities both count, so they agree to the last unit"
        )
        # Each edge of the smallest cut lost less than a unit, and no cut has more edges than the graph.
        assert -1e-12 <= by_networkx(exact, j) - ours <= exact.number_of_edges() / UNIT
        assert ours <= bound[j] + 1e-12
        column = sum(whole(row[j]) for row in matrices[0])
        assert (below == {(0, j)}) == (value == column), (
            "nothing but the target lies below the cut at the input"
        )
        if below == {(0, j)}:
            assert abs(ours - bound[j].item()) <= tokens / UNIT


def test_flow_of_three_tokens_by_hand():
    upper = [[0.5, 0.3, 0.2], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    lower = [[0.6, 0.4, 0.0], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5]]
    attentions = torch.tensor([lower, upper])[:, None, None]  # [L=2, B=1, H=1, 3, 3]
    # From token 0 there is one way through each token between: the narrower of its two edges, three times.
    expected = [[0.5 + 0.1 + 0.0, 0.4 + 0.1 + 0.2, 0.0 + 0.3 + 0.2]]
    torch.testing.assert_close(
        attention_flow(attentions, one_token(0, 1, 3), residual=False), torch.tensor(expected)
    )
    # 0.2 starts in token 0, and 0.8 in token 1, which looks at itself alone. To input 0: 0.2 by way of 0, 0.1 by way
    # of 1. To input 1: 0.2 by way of 0 and 2, 0.1 by way of 1. To input 2: 0.2 by way of 2, 0.8 by way of 1.
    source = torch.tensor([[0.2, 0.8, 0.0]])
    torch.testing.assert_close(
        attention_flow(attentions, source, residual=False), torch.tensor([[0.3, 0.3, 1.0]])
    )
    # Into the inputs lead 0.7, 1.0 and 1.3: only input 2 receives all that a flow of 1 could bring.
    torch.testing.assert_close(
        input_bound(attentions, residual=False), torch.tensor([[0.7, 1.0, 1.0]])
    )


def test_flow_through_one_layer_is_as_wide_as_each_edge():
    attentions, source = some_attention(layers=1), some_source(2, 5)
    edges = torch.minimum(source[:, :, None], fuse_heads(attentions)[0])
    torch.testing.assert_close(attention_flow(attentions, source), edges.sum(dim=1), atol=5 / UNIT, rtol=0)


@pytest.mark.parametrize("part", [slice(0, 2), slice(1, 3), slice(2, None)])
def test_flow_over_a_part_of_the_layers(part):
    attentions, source = some_attention(layers=4, examples=1), some_source(1, 5)
    directed = graph(fuse_heads(attentions)[part, 0].tolist(), source[0].tolist(), whole)
    found = attention_flow(attentions[part], source)[0] * UNIT
    assert found.tolist() == [by_networkx(directed, j) for j in range(5)]


def test_flow_keeps_the_order_of_the_batch():
    attentions, source = some_attention(examples=3), some_source(3, 5)
    found = attention_flow(attentions, source)
    assert torch.equal(attention_flow(attentions[:, [2, 0, 1]], source[[2, 0, 1]]), found[[2, 0, 1]])
    assert torch.equal(torch.cat([attention_flow(attentions[:, [b]], source[[b]]) for b in range(3)]), found)
    assert not torch.allclose(found[0], found[1])


def test_many_examples_in_several_processes_give_the_same():
    attentions, source = some_attention(examples=max_flow.MANY), some_source(max_flow.MANY, 5)
    alone = [attention_flow(attentions[:, [b]], source[[b]]) for b in range(max_flow.MANY)]
    assert torch.equal(attention_flow(attentions, source), torch.cat(alone))


def test_flow_of_float32_is_float32():
    attentions, source = some_attention(), some_source(2, 5)
    found = attention_flow(attentions.float(), source.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attention_flow(attentions, source), atol=1e-6, rtol=0)


def test_input_bound_is_half_and_half_the_first_layers_columns():
    attentions = some_attention(layers=2, tokens=6)
    for b in range(2):
        for j in range(6):
            column = sum(attentions[0, b, :, i, j].mean().item() for i in range(6))
            assert input_bound(attentions)[b, j].item() == pytest.approx(
                min(1, 0.5 + 0.5 * column), abs=1e-12
            )
            assert input_bound(attentions, False)[b, j].item() == pytest.approx(
                min(1, column), abs=1e-12
            )
    assert torch.equal(input_bound(attentions[:1]), input_bound(attentions)), (
        "no later layer has a say"
    )


def test_deep_flow_stands_at_the_bound_and_shallow_flow_does_not():
    attentions, source = (
        some_attention(layers=10, examples=1, tokens=10, sharpness=1.0),
        one_token(0, 1, 10),
    )
    bound = input_bound(attentions)
    torch.testing.assert_close(attention_flow(attentions, source), bound, atol=10 / UNIT, rtol=0)
    shallow = attention_flow(attentions[:2], source)
    assert (shallow <= bound).all() and (shallow < bound - 0.01).sum() >= 8


def test_more_capacity_than_int32_holds_does_not_wrap():
    """All tokens look at token 0: twenty times 2³⁰ lead into it, while no more than 2³⁰ leaves the source."""
    attentions = torch.zeros(3, 1, 1, 20, 20, dtype=torch.float64)
    attentions[..., 0] = 1
    found = attention_flow(attentions, torch.full((1, 20), 1 / 20, dtype=torch.float64), residual=False)[0]
    assert found[0].item() == pytest.approx(1, abs=20 / UNIT) and not found[1:].any()


def test_flow_at_the_size_of_vit_b16(monkeypatch):
    """Two of 197 targets: a flow that obeys the capacities and fills a cut is proved the largest."""
    n, seen = 197, []
    exact = max_flow.maximum_flow

    def first_two(capacities, source, target):
        if len(seen) == 2:  # the others take the same way
            return exact(max_flow.csr_array(np.array([[0, 1], [0, 0]], dtype=np.int32)), 0, 1)
        result = exact(capacities, source, target)
        seen.append((capacities.copy(), source, target, result))
        return result

    monkeypatch.setattr(max_flow, "maximum_flow", first_two)
    attentions = some_attention(12, 1, 1, n).float()
    tracemalloc.start()
    found = attention_flow(attentions, one_token(0, 1, n))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (1, n) and peak < 64 * 2**20
    for j, (capacities, source, target, result) in enumerate(seen):
        assert capacities.dtype == np.int32 and capacities.data.min() >= 0
        assert capacities.nnz == n + 11 * n * n + n
        assert capacities[[source]].sum(dtype=np.int64) <= UNIT
        sent = result.flow.astype(np.int64)
        assert (sent - capacities.astype(np.int64)).max() <= 0, "no edge carries more than it can"
        left = sent.sum(axis=1)
        assert not np.delete(left, [source, target]).any(), "what comes in goes out"
        into = capacities[:, [target]].sum(dtype=np.int64)  # the cut at the input
        out = capacities[[1 + 11 * n]].sum(
            dtype=np.int64
        )  # and the one below the first token of the last layer
        assert left[source] == -left[target] == result.flow_value == (into, out)[j]
        assert found[0, j].item() == pytest.approx((into, out)[j] / UNIT, abs=1e-6)


# Relevance, against gradients of one pair at a time


def slow_relevance(model, pixels, ids, layers=slice(None)):
    """Equations 5 and 6 of Chefer et al. written out for one pair: scores [N], scores [T] and the cosine."""
    towers = model.image_tower, model.text_tower
    inputs = {"pixel_values": towers[0].normalise(pixels[None])}, {"input_ids": ids[None]}
    found = [outputs(tower, **values) for tower, values in zip(towers, inputs, strict=True)]
    heads = [copy.deepcopy(head).eval() for head in (model.image_head, model.text_head)]
    image = heads[0](found[0].last_hidden_state[0, 0])
    text = heads[1](found[1].last_hidden_state[0].mean(dim=0))
    cosine = image @ text / image.norm() / text.norm()
    relevances = []
    for output in found:
        n = output.last_hidden_state.shape[1]
        relevance = torch.eye(n, dtype=torch.float64)
        for weights in output.attentions[layers]:
            (gradient,) = torch.autograd.grad(cosine, weights, retain_graph=True)
            averaged = torch.zeros(n, n, dtype=torch.float64)
            for head in range(weights.shape[1]):
                averaged += (gradient[0, head] * weights[0, head]).detach().clamp(
                    min=0
                ) / weights.shape[1]
            relevance = relevance + averaged @ relevance
        relevances.append(relevance - torch.eye(n, dtype=torch.float64))
    return relevances[0][0], relevances[1].mean(dim=0), cosine.detach()


@pytest.mark.parametrize("layers", [slice(None), slice(-1, None), slice(1, 3)])
def test_relevance_is_equations_5_and_6(model, layers):
    model.double()
    texts = model.text_tower.tokenize(CAPTIONS)
    of_patches, of_tokens, similarity = relevance(model, pictures(), texts, layers)
    assert (
        of_patches.shape == (3, 17)
        and of_tokens.shape == texts["input_ids"].shape
        and similarity.shape == (3,)
    )
    for b, n in enumerate(texts["attention_mask"].sum(dim=1).tolist()):
        expected = slow_relevance(
            model, pictures()["pixel_values"][b], texts["input_ids"][b, :n], layers
        )
        for found, right in zip(
            (of_patches[b], of_tokens[b, :n], similarity[b]), expected, strict=True
        ):
            torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-8)
        assert not of_tokens[b, n:].any()
    assert of_patches.max() > 1e-3 and of_tokens.max() > 1e-3


def test_relevance_of_a_batch_is_that_of_its_pairs(model):
    texts = model.text_tower.tokenize(CAPTIONS)
    together = relevance(model, pictures(), texts)
    for b in range(3):
        alone = relevance(
            model,
            {"pixel_values": pictures()["pixel_values"][[b]]},
            {k: v[[b]] for k, v in texts.items()},
        )
        for found, one in zip(together, alone, strict=True):
            torch.testing.assert_close(found[[b]], one, rtol=1e-4, atol=1e-7)
    listed = relevance(model, pictures(), texts, [2])
    assert all(map(torch.equal, listed, relevance(model, pictures(), texts, slice(-1, None))))


@pytest.mark.parametrize("trainable", [True, False])
def test_relevance_asks_nothing_of_the_weights(model, trainable):
    model.requires_grad_(trainable)
    texts = model.text_tower.tokenize(CAPTIONS)
    expected = relevance(model, pictures(), texts)
    with torch.no_grad():
        inside = relevance(model, pictures(), texts)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, expected, inside))
    assert all(
        weight.grad is None and weight.requires_grad is trainable for weight in model.parameters()
    )
    assert not any(part.requires_grad for part in expected)
    normalised = {"pixel_values": model.image_tower.normalise(pictures()["pixel_values"])}
    assert all(map(torch.equal, relevance(model, normalised, texts), expected))
    assert not normalised["pixel_values"].requires_grad
    with torch.no_grad():
        cosine = (model.encode_image(**pictures()) * model.encode_text(**texts)).sum(dim=-1)
    torch.testing.assert_close(expected[2], cosine)


def test_relevance_drops_nothing_in_training_mode(model):
    texts = model.text_tower.tokenize(CAPTIONS)
    expected = relevance(model, pictures(), texts)
    model.train()
    assert all(map(torch.equal, relevance(model, pictures(), texts), expected))
    assert all(part.training for part in model.modules())


def test_relevance_of_a_picture_that_is_not_square(model):
    batch, texts = pictures(3, high=16, wide=40), model.text_tower.tokenize(CAPTIONS)
    of_patches = relevance(model, batch, texts)[0]
    assert patch_grid(model.image_tower, batch["pixel_values"], of_patches).shape == (3, 2, 5)


# From tokens to patches and words


def test_pieces_are_merged_and_special_tokens_reported_apart():
    tower = read()
    ids = tower.tokenize(["Dogs near zebra buses", "cat"])["input_ids"]
    pieces = tower.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    assert pieces == ["[CLS]", "dog", "##s", "near", "[UNK]", "bus", "##es", "[SEP]"]
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0.5, 1, 0.5, 99, 99, 99, 99, 99]])
    first, second = word_scores(tower, ids, scores)
    assert first.words == ["dogs", "near", "[UNK]", "buses"] and first.scores.tolist() == [
        5,
        4,
        5,
        13,
    ]
    assert first.special == pytest.approx((1 + 8) / 36)
    assert (
        second.words == ["cat"]
        and second.scores.tolist() == [1]
        and second.special == pytest.approx(0.5)
    )
    total = scores[0].sum().item()
    assert first.scores.sum().item() + first.special * total == pytest.approx(total)


def test_scores_that_are_all_zero_have_no_share():
    tower = read()
    ids = tower.tokenize(["a dog"])["input_ids"]
    (words,) = word_scores(tower, ids, torch.zeros(ids.shape))
    assert words.words == ["a", "dog"] and words.scores.tolist() == [0, 0] and words.special == 0


def test_patch_grid_reads_row_by_row_and_leaves_cls_out():
    tower = see()
    scores = torch.arange(2 * 11).view(2, 11)
    grid = patch_grid(tower, pictures(2, high=16, wide=40)["pixel_values"], scores)
    assert grid.tolist()[0] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]] and grid[1, 0, 0] == 12


@pytest.mark.parametrize("make", [see, read])
def test_look_reads_what_was_recorded(make):
    tower = make()
    batch = batch_of(tower)
    attentions = record(tower, batch)
    start = pooling(batch, attentions.shape[-1])
    token = one_token(1, 3, attentions.shape[-1])
    assert torch.equal(
        look(tower, batch, "raw", layer=0, head=1), raw_attention(attentions, start, 0, 1)
    )
    assert torch.equal(look(tower, batch, "raw", source=1), raw_attention(attentions, token))
    assert torch.equal(
        look(tower, batch, "rollout", fuse="max"), rollout(attentions, start, fuse="max")
    )
    assert torch.equal(
        look(tower, batch, "rollout", slice(0, 2), 1), rollout(attentions[:2], token)
    )
    assert torch.equal(
        look(tower, batch, "flow", residual=False), attention_flow(attentions, start, residual=False)
    )
    assert torch.equal(look(tower, batch, "flow", slice(1, None), 1), attention_flow(attentions[1:], token))


@pytest.mark.parametrize("method", ["relevance", "gradcam"])
def test_a_tower_alone_has_three_readings(method):
    with pytest.raises(ValueError, match=f"method is '{method}'.*raw, rollout, flow.*relevance"):
        look(see(), pictures(), method)


OPTIONS = {
    "raw": {"head": 1, "layer": 0},
    "rollout": {"fuse": "max", "discard": 0.2},
    "flow": {"residual": False},
}


@pytest.mark.parametrize("method", METHODS)
def test_explain_maps_pictures_and_words(model, method):
    images = [
        Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in pictures()["pixel_values"]
    ]
    options = OPTIONS.get(method, {})
    grids, words = explain(model, images, CAPTIONS, method, **options)
    assert grids.shape == (3, 4, 4) and [told.words for told in words] == [
        caption.split() for caption in CAPTIONS
    ]
    texts = model.text_tower.tokenize(CAPTIONS)
    if method == "relevance":
        of_patches, of_tokens, _ = relevance(model, pictures(), texts)
    else:
        of_patches = look(model.image_tower, pictures(), method, **options)
        of_tokens = look(model.text_tower, texts, method, **options)
    assert torch.equal(grids.flatten(1), of_patches[:, 1:])
    for told, expected in zip(
        words, word_scores(model.text_tower, texts["input_ids"], of_tokens), strict=True
    ):
        assert torch.equal(told.scores, expected.scores) and told.special == expected.special
    last, of_last = explain(model, images, CAPTIONS, method, slice(1, 2), **options)
    assert last.shape == (3, 4, 4) and not torch.allclose(last, grids)
    assert not torch.allclose(of_last[0].scores, words[0].scores)


def test_explain_refuses_an_unknown_method(model):
    with pytest.raises(ValueError, match="method is 'gradcam'.*raw, rollout, flow.*relevance"):
        explain(model, [Image.new("RGB", (32, 32))], ["a dog"], "gradcam")
