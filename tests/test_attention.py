"""Attention: recorded without a trace, and its readings against loops, networkx and gradients."""

import copy

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import attention, max_flow
from helpers.attention import attention_flow, explain, pooling, raw_attention, record, rollout
from tests.tiny import deep_model

CAPTIONS = ["two dogs on the beach", "a cat", "a small red bus near the street and a big dog"]
UNIT = 2**30  # capacities are whole multiples of 1 / UNIT


def pixels(count=3, high=32, wide=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, high, wide)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return {"pixel_values": values}


IMAGES = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pixels()["pixel_values"]]


@pytest.fixture
def model():
    return deep_model()


@pytest.fixture(params=["image_tower", "text_tower"])
def tower(request, model):
    return getattr(model, request.param)


def batch_of(tower):
    return tower.tokenize(CAPTIONS) if hasattr(tower, "tokenizer") else pixels()


def own_outputs(tower, batch):
    """The model's own forward with attention, on a copy that nobody else sees."""
    alone = copy.deepcopy(tower.model).eval()
    alone.set_attn_implementation("eager")
    if "pixel_values" in batch:
        batch = {"pixel_values": tower.normalise(batch["pixel_values"])}
    return alone(**batch, output_attentions=True)


# Recording


def test_record_is_the_models_own_attention(tower):
    batch = batch_of(tower)
    expected = torch.stack(own_outputs(tower, batch).attentions).detach()  # [L, B, H, N, N]
    tokens = expected.shape[-1]
    real = batch.get("attention_mask", torch.ones(3, tokens))[:, None].expand(-1, 2, -1).bool()
    recorded = record(tower.train(), batch)  # and yet without dropout
    assert recorded.shape == expected.shape == (3, 3, 2, tokens, tokens)
    for layer, other in zip(recorded, expected, strict=True):
        torch.testing.assert_close(layer[real], other[real])
        torch.testing.assert_close(layer[real].sum(dim=-1), torch.ones(int(real.sum())))
        assert not layer[~real].any()
    assert recorded.std() > 0.05, "the model attends to nothing in particular: not worth a test"


def state(tower):
    """What a look at a tower must not change."""
    parts, tensors = tower.model.modules(), [*tower.parameters(), *tower.buffers()]
    return [
        tower.model.config._attn_implementation,
        [(part.training, len(part._forward_hooks)) for part in parts],
        [(t._version, t.requires_grad, t.grad is None) for t in tensors],
    ]


def relevances(model, images, texts, layers=slice(None)):
    """Relevance of image tokens and of text tokens, and the similarity."""
    *sides, similarity = attention.forward_both(model, images, texts)
    scores = [attention.relevance(a[layers], source, similarity) for a, source in sides]
    return *scores, similarity.detach()


LOOKS = {
    "image": lambda model: record(model.image_tower, pixels()),
    "text": lambda model: record(model.text_tower, model.text_tower.tokenize(CAPTIONS)),
    "pair": lambda model: relevances(model, pixels(), model.text_tower.tokenize(CAPTIONS)),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LOOKS)
def test_a_look_leaves_the_model_as_it_was(model, name, implementation):
    towers = model.image_tower, model.text_tower
    for tower in towers:
        tower.model.set_attn_implementation(implementation)
        for i, weight in enumerate(tower.parameters()):  # a state that is nobody's default
            weight.requires_grad_(i % 2 > 0)
    model.image_tower.train()
    before = [state(tower) for tower in towers]
    LOOKS[name](model)
    assert [state(tower) for tower in towers] == before


def test_a_changed_patch_is_located_in_an_image_that_is_not_square(model):
    """In the first layer a token's logits are its own: only the changed patch's column changes."""
    tower, batch = model.image_tower, pixels(2, high=16, wide=40)
    changed = {"pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][:, :, 8:16, 24:32] = 0  # the patch in row 1, column 3
    # [B, N]: from CLS, one head
    first, other = (record(tower, b)[0].log()[:, 0, 0] for b in (batch, changed))
    moved = ((other - other[:, :1]) - (first - first[:, :1])).abs() > 1e-3
    grid = attention.patch_grid(tower, batch["pixel_values"], moved)
    assert grid.shape == (2, 2, 5) and grid.nonzero().tolist() == [[0, 1, 3], [1, 1, 3]]


def test_padding_changes_nothing_for_real_tokens(model):
    tower = model.text_tower
    together = tower.tokenize(CAPTIONS)
    attentions = record(tower, together)
    source = pooling(tower, together)
    assert not together["attention_mask"].all()
    for b, caption in enumerate(CAPTIONS):
        batch = tower.tokenize([caption])
        alone, n = record(tower, batch), batch["input_ids"].shape[1]
        torch.testing.assert_close(attentions[:, b, :, :n, :n], alone[:, 0])
        assert not attentions[:, b, :, n:].any() and not attentions[:, b, :, :, n:].any()
        for reading in (raw_attention, rollout, attention_flow):
            scores = reading(attentions, source)[b]
            torch.testing.assert_close(scores[:n], reading(alone, pooling(tower, batch))[0])
            assert scores.dtype == attentions.dtype and not scores[n:].any()


def test_pooling_is_the_towers_own(tower):
    batch = batch_of(tower)
    states = own_outputs(tower, batch).last_hidden_state
    weights = pooling(tower, batch)
    assert weights.shape == states.shape[:2]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    torch.testing.assert_close(torch.einsum("bn,bnd->bd", weights, states), tower(**batch))


# Readings of attention, against plain loops


def some_attention(layers=3, examples=2, heads=3, tokens=5, seed=0, sharpness=2.0):
    """Random attention [L, B, H, N, N] in float64: the softmax of normal logits."""
    shape = (layers, examples, heads, tokens, tokens)
    logits = np.random.default_rng(seed).standard_normal(shape)
    return torch.from_numpy(logits * sharpness).softmax(dim=-1)


def some_source(examples, tokens, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.ones(tokens), examples))


def slow_fused(matrices, residual=True):
    """One layer of one example, heads [H][N][N] as lists, to one matrix, as published."""
    heads, n = len(matrices), len(matrices[0])
    fused = [[sum(head[i][j] for head in matrices) / heads for j in range(n)] for i in range(n)]
    if residual:
        fused = [[0.5 * fused[i][j] + 0.5 * (i == j) for j in range(n)] for i in range(n)]
    return [[value / sum(row) if sum(row) else 0.0 for value in row] for row in fused]


@pytest.mark.parametrize("residual", [True, False])
def test_heads_are_fused_as_published(residual):
    attentions = some_attention()
    attentions[0, 0, :, 1] = 0.0  # padding looks at nothing
    before = attentions.clone()
    fused = attention.fuse_heads(attentions, residual)
    expected = [[slow_fused(example, residual) for example in x] for x in attentions.tolist()]
    torch.testing.assert_close(fused, torch.tensor(expected, dtype=torch.float64))
    assert torch.equal(attentions, before)
    sums = fused.sum(dim=-1)
    # A row of padding has nothing to be divided by, unless its residual half is there.
    assert sums[0, 0, 1] == int(residual)
    sums[0, 0, 1] = 1
    assert ((sums - 1).abs() < 1e-9).all()


@pytest.mark.parametrize("layer, head", [(0, None), (1, 2), (-1, 0), (-1, None)])
def test_raw_attention_is_one_layers_rows_weighted_by_the_source(layer, head):
    attentions, source = some_attention(), some_source(2, 5)
    scores = raw_attention(attentions, source, layer, head)
    heads = range(3) if head is None else [head]
    for b, j in np.ndindex(2, 5):
        looks = [attentions[layer, b, h, i, j] * source[b, i] for h in heads for i in range(5)]
        assert scores[b, j].item() == pytest.approx(float(sum(looks)) / len(heads), abs=1e-12)


@pytest.mark.parametrize("residual", [True, False])
def test_rollout_multiplies_from_the_last_layer_to_the_first(residual):
    attentions = some_attention(layers=4)
    whole = rollout(attentions, residual=residual)
    for b in range(2):
        product = np.eye(5)
        for layer in attentions.tolist():  # R_l = Â_l R_(l-1)
            product = np.array(slow_fused(layer[b], residual)) @ product
        torch.testing.assert_close(whole[b], torch.from_numpy(product))
    source = some_source(2, 5)
    mixture = torch.stack([sum(source[b, i] * whole[b, i] for i in range(5)) for b in range(2)])
    torch.testing.assert_close(rollout(attentions, source, residual), mixture)


# Flow, against networkx


def graph(matrices, source):
    """The layered graph, node (l, i) token i above layer l; capacities are rounded down."""
    layers, n = len(matrices), len(source)
    directed = nx.DiGraph()
    for i in range(n):
        directed.add_edge("source", (layers, i), capacity=int(source[i] * UNIT))
    for k, i, j in np.ndindex(layers, n, n):
        directed.add_edge((k + 1, i), (k, j), capacity=int(matrices[k][i][j] * UNIT))
    return directed


KARP = {"flow_func": nx.algorithms.flow.edmonds_karp}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 6),
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
        largest = attentions == attentions.amax(-1, keepdim=True)
        attentions = attentions * (torch.from_numpy(rng.random(attentions.shape) < 0.4) | largest)
        attentions = attentions / attentions.sum(dim=-1, keepdim=True)
    source = attention.one_token(int(rng.integers(tokens)), 1, tokens).double()
    if spread:  # over some of the tokens, as over a caption's
        shares = rng.dirichlet(np.ones(tokens)) * (rng.random(tokens) < 0.7)
        source = torch.from_numpy(shares)[None] + 0.1 * source
        source = source / source.sum()
    flow = attention_flow(attentions, source, residual)
    assert flow.shape == (1, tokens) and flow.dtype == torch.float64
    matrices = attention.fuse_heads(attentions, residual=residual)[:, 0].tolist()
    directed = graph(matrices, source[0].tolist())
    for j in rng.choice(tokens, 3, replace=False).tolist():
        value = nx.maximum_flow_value(directed, "source", (0, j), **KARP)
        assert flow[0, j].item() * UNIT == value, "they agree to the last unit"


def test_many_examples_in_several_processes_give_the_same_in_order():
    count = max_flow.MANY
    attentions, source = some_attention(examples=count), some_source(count, 5)
    alone = [attention_flow(attentions[:, [b]], source[[b]]) for b in range(count)]
    assert torch.equal(attention_flow(attentions, source), torch.cat(alone))
    assert torch.equal(attention_flow(attentions[:, :3], source[:3]), torch.cat(alone[:3]))


def test_more_capacity_than_int32_holds_does_not_wrap():
    """Twenty times 2³⁰ lead into token 0, while no more than 2³⁰ leaves the source."""
    attentions = torch.zeros(3, 1, 1, 20, 20, dtype=torch.float64)
    attentions[..., 0] = 1
    source = torch.full((1, 20), 1 / 20, dtype=torch.float64)
    flow = attention_flow(attentions, source, residual=False)[0]
    assert flow[0].item() == pytest.approx(1, abs=20 / UNIT) and not flow[1:].any()


# Relevance, against gradients of one pair at a time


def slow_relevance(model, image, ids, layers=slice(None)):
    """Equations 5 and 6 of Chefer et al. written out for one pair: scores [N] and [T], cosine."""
    towers = model.image_tower, model.text_tower
    inputs = {"pixel_values": image[None]}, {"input_ids": ids[None]}
    runs = [own_outputs(tower, values) for tower, values in zip(towers, inputs)]
    heads = [copy.deepcopy(head).eval() for head in (model.image_head, model.text_head)]
    image = heads[0](runs[0].last_hidden_state[0, 0])
    text = heads[1](runs[1].last_hidden_state[0].mean(dim=0))
    cosine = image @ text / image.norm() / text.norm()
    relevances = []
    for run in runs:
        n = run.last_hidden_state.shape[1]
        gathered = torch.eye(n, dtype=torch.float64)
        for weights in run.attentions[layers]:
            (gradient,) = torch.autograd.grad(cosine, weights, retain_graph=True)
            gains = torch.zeros(n, n, dtype=torch.float64)
            for head in range(weights.shape[1]):
                gains += (gradient[0, head] * weights[0, head]).detach().clamp(min=0)
            gathered = gathered + gains / weights.shape[1] @ gathered
        relevances.append(gathered - torch.eye(n, dtype=torch.float64))
    return relevances[0][0], relevances[1].mean(dim=0), cosine.detach()


@pytest.mark.parametrize("layers", [slice(None), slice(-1, None), slice(1, 3)])
def test_relevance_is_equations_5_and_6(model, layers):
    model.double()
    texts = model.text_tower.tokenize(CAPTIONS)
    results = relevances(model, pixels(), texts, layers)
    of_patches, of_tokens, _ = results
    assert of_patches.shape == (3, 17) and of_tokens.shape == texts["input_ids"].shape
    for b, n in enumerate(texts["attention_mask"].sum(dim=1).tolist()):
        image, ids = pixels()["pixel_values"][b], texts["input_ids"][b, :n]
        expected = slow_relevance(model, image, ids, layers)
        own = of_patches[b], of_tokens[b, :n], results[2][b]
        for value, right in zip(own, expected, strict=True):
            torch.testing.assert_close(value.float(), right.float(), rtol=1e-5, atol=1e-8)
        assert not of_tokens[b, n:].any()
    assert of_patches.max() > 1e-3 and of_tokens.max() > 1e-3


@pytest.mark.parametrize("trainable", [True, False])
def test_relevance_asks_nothing_of_the_weights(model, trainable):
    model.requires_grad_(trainable)
    texts = model.text_tower.tokenize(CAPTIONS)
    expected = relevances(model, pixels(), texts)
    with torch.no_grad():
        inside = relevances(model, pixels(), texts)
        cosine = (model.encode_image(**pixels()) * model.encode_text(**texts)).sum(dim=-1)
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, expected, inside))
    torch.testing.assert_close(expected[2], cosine)
    assert not any(part.requires_grad for part in expected)
    model.train()
    assert all(map(torch.equal, relevances(model, pixels(), texts), expected)), "without dropout"


# From tokens to patches and words


def test_pieces_are_merged_and_special_tokens_reported_apart(model):
    tower, captions = model.text_tower, ["Dogs near zebra buses", "cat"]
    pieces = tower.tokenizer.tokenize(captions[0])
    assert pieces == ["dog", "##s", "near", "[UNK]", "bus", "##es"]
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8], [0.5, 1, 0.5, 0, 0, 0, 0, 0]])
    first, second = attention.word_scores(tower, captions, scores)
    assert first.words == captions[0].split()
    assert first.scores.tolist() == [5, 4, 5, 13]
    assert first.special == pytest.approx((1 + 8) / 36)
    assert second.words == ["cat"] and second.scores.tolist() == [1]
    assert second.special == pytest.approx(0.5)
    (words,) = attention.word_scores(tower, captions[1:], torch.zeros(1, 8))
    assert words.scores.tolist() == [0] and words.special == 0


# Images and captions, by any method


def same(maps, others):
    """Whether two results of `explain` are equal."""
    (grids, words), (other_grids, other_words) = maps, others
    close = torch.allclose(grids, other_grids, rtol=1e-4, atol=1e-7)
    scores = [torch.allclose(a.scores, b.scores, rtol=1e-4) for a, b in zip(words, other_words)]
    return close and all(scores) and [a.words for a in words] == [b.words for b in other_words]


@pytest.mark.parametrize("method", attention.METHODS)
def test_explain_is_the_reading_of_both_towers(model, method):
    grids, words = explain(model, IMAGES, CAPTIONS, method)
    images, texts = attention.batches(model, IMAGES, CAPTIONS)
    if method == "relevance":
        scores = relevances(model, images, texts)[:2]
    else:
        reading = {"raw": raw_attention, "rollout": rollout, "flow": attention_flow}[method]
        both = (model.image_tower, images), (model.text_tower, texts)
        attentions = [record(tower, batch) for tower, batch in both]
        sources = [pooling(*pair) for pair in both]
        scores = [reading(*side) for side in zip(attentions, sources)]
    assert torch.equal(grids.flatten(1), scores[0][:, 1:]) and grids.shape == (3, 4, 4)
    assert [row.words for row in words] == [caption.split() for caption in CAPTIONS]
    expected = attention.word_scores(model.text_tower, CAPTIONS, scores[1])
    for row, other in zip(words, expected):
        assert torch.equal(row.scores, other.scores) and row.special == other.special


@pytest.mark.parametrize("method", ["raw", "relevance"])
@pytest.mark.parametrize("images, captions", [(1, 3), (3, 1), (3, 3), (1, 1)])
def test_equal_numbers_pair_up_and_one_meets_each_of_the_other(model, images, captions, method):
    images, captions = IMAGES[:images], CAPTIONS[:captions]
    grids, words = explain(model, images, captions, method)
    count = max(len(images), len(captions))
    assert len(grids) == len(words) == count
    for b in range(count):
        pair = [images[min(b, len(images) - 1)]], [captions[min(b, len(captions) - 1)]]
        assert same(explain(model, *pair, method), (grids[[b]], [words[b]]))


def test_likely_mistakes_are_named(model):
    for images, captions in ((2, 3), (3, 2), (0, 1), (1, 0), (0, 0)):
        with pytest.raises(ValueError, match=f"{images} images and {captions} captions make no "):
            explain(model, IMAGES[:images], CAPTIONS[:captions])
    with pytest.raises(TypeError, match=r"write \['a dog'\]"):
        explain(model, IMAGES[:1], "a dog")
    with pytest.raises(ValueError, match="method is 'gradcam'.*raw, rollout, flow, relevance"):
        explain(model, IMAGES[:1], ["a dog"], "gradcam")


# For each option two values, and the methods that read it.
OPTIONS = {
    "layer": (0, 2, {"raw"}),
    "head": (0, 1, {"raw"}),
    "layers": (slice(None), slice(1, 2), {"rollout", "flow", "relevance"}),
    "source": (None, attention.one_token(7, 1, 17), {"raw", "rollout", "flow"}),
    "tower": ("image", "text", {"raw"}),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("method", attention.METHODS)
def test_a_method_reads_what_it_is_said_to_read(model, method, name):
    one, other, methods = OPTIONS[name]
    comparison = attention.compare(model, IMAGES[:1], CAPTIONS[:1])
    rest = {"head": 1} if name == "tower" else {"tower": "image"}
    results = [attention.read_maps(comparison, method, **rest, **{name: x}) for x in (one, other)]
    assert same(*results) == (method not in methods)


def test_a_source_and_a_head_of_one_tower_leave_the_other_alone(model):
    comparison = attention.compare(model, IMAGES[:1], CAPTIONS[:1])
    patch = 1 + 4 * 2 + 3  # row 2, column 3
    options = {"layer": 1, "head": 1, "source": attention.one_token(patch, 1, 17)}
    grids, words = attention.read_maps(comparison, "raw", "image", **options)
    by_hand = record(model.image_tower, comparison.images)[1, 0, 1, patch]
    assert torch.equal(grids[0].flatten(), by_hand[1:])
    assert torch.equal(words[0].scores, attention.read_maps(comparison, "raw")[1][0].scores)
