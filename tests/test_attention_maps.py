"""Maps of one picture and one caption: what `explain` finds, by any setting, computed once."""

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import attention
from helpers.attention import (
    METHODS,
    UNREAD,
    Maps,
    depth,
    explain,
    limits,
    one_token,
    patch_grid,
    patches,
    raw_attention,
    record,
    rollout,
    word_scores,
    words_of,
)
from tests.tiny import deep_model

CAPTION, OTHER = "a red bus and two dogs", "a blue cat on the beach"
PICTURE, ANOTHER = map(
    Image.fromarray, np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), np.uint8)
)
# For each setting: two values of it, and a tower that is read with them.
SETTINGS = {
    "tower": ("image", "text", {"source": None, "head": 1}),
    "layer": (0, 2, {}),
    "layers": ((0, 3), (1, 2), {}),
    "head": (0, 1, {}),
    "source": (None, (1, 2), {}),
}


@pytest.fixture(scope="module")
def model():
    return deep_model()


@pytest.fixture
def looking(model):
    return Maps(model)


def same(a, b):
    return torch.equal(a.grid, b.grid) and torch.equal(a.words.scores, b.words.scores)


@pytest.mark.parametrize("method", METHODS)
def test_by_default_it_is_what_explain_finds(model, looking, method):
    seen = looking.see(PICTURE, CAPTION, method)
    grids, words = explain(model, [PICTURE], [CAPTION], method)
    torch.testing.assert_close(seen.grid, grids[0])
    torch.testing.assert_close(seen.words.scores, words[0].scores)
    assert seen.words.words == words[0].words and seen.grid.shape == (4, 4)
    cosine = model.encode_images([PICTURE])[0] @ model.encode_texts([CAPTION])[0]
    assert seen.cosine == pytest.approx(float(cosine), abs=1e-6)


def test_a_patch_of_one_head_of_one_layer(model, looking):
    batch = {"pixel_values": model.image_tower.preprocess(PICTURE)[None]}
    by_hand = record(model.image_tower, batch)[
        1, 0, 1, 1 + 4 * 2 + 3
    ]  # layer 1, head 1, row 2, column 3
    seen = looking.see(PICTURE, CAPTION, "raw", "image", layer=1, head=1, source=(2, 3))
    torch.testing.assert_close(seen.grid, by_hand[1:].view(4, 4))
    torch.testing.assert_close(
        seen.words.scores,
        looking.see(PICTURE, CAPTION, "raw").words.scores,
        msg="the other tower stays at its defaults",
    )


def test_a_word_of_several_pieces_is_read_from_all_of_them(model, looking):
    words = words_of(model.text_tower, CAPTION)
    assert words[-1] == ("dogs", [6, 7])
    batch = model.text_tower.tokenize([CAPTION])
    attentions = record(model.text_tower, batch)
    start = (one_token(6, 1, 9) + one_token(7, 1, 9)) / 2
    seen = looking.see(PICTURE, CAPTION, "rollout", "text", layers=(1, 3), source=len(words) - 1)
    by_hand = rollout(attentions[1:3], start)
    expected = word_scores(model.text_tower, batch["input_ids"], by_hand)[0]
    torch.testing.assert_close(seen.words.scores, expected.scores)


@pytest.mark.parametrize("caption", [CAPTION, "", "dogs", "zebra buses", "dogs " * 30])
def test_words_are_those_that_scores_are_told_of(model, caption):
    batch = model.text_tower.tokenize([caption])
    told = word_scores(model.text_tower, batch["input_ids"], torch.zeros(batch["input_ids"].shape))[
        0
    ]
    assert [word for word, _ in words_of(model.text_tower, caption)] == told.words


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_reads_what_it_is_said_to_read(looking, method, name):
    one, other, rest = SETTINGS[name]
    told = [
        looking.see(PICTURE, CAPTION, method, **{**rest, name: value}) for value in (one, other)
    ]
    unread = name in UNREAD[method] or (
        name == "tower" and method != "raw"
    )  # rollout and flow read no head
    assert same(*told) == unread
    assert all(setting in limits(method) for setting in UNREAD[method])


@pytest.mark.parametrize("method", METHODS)
def test_only_relevance_lets_the_caption_change_the_map(looking, method):
    seen = looking.see(PICTURE, CAPTION, method)
    grids = torch.equal(seen.grid, looking.see(PICTURE, OTHER, method).grid)
    words = torch.equal(seen.words.scores, looking.see(ANOTHER, CAPTION, method).words.scores)
    assert (grids, words) == (method != "relevance",) * 2
    assert ("The caption cannot change the map" in limits(method)) == grids


def test_nothing_is_computed_twice(looking, monkeypatch):
    calls = []
    for name in ("record", "relevance", "flow"):
        where = attention
        real = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k)
        )
    for _ in range(2):
        for method in METHODS:
            looking.see(PICTURE, CAPTION, method)
    assert sorted(calls) == ["flow", "flow", "record", "record", "relevance"], (
        "once a tower, for all methods"
    )
    looking.see(ANOTHER, CAPTION, "rollout")
    assert calls.count("record") == 3


def test_an_empty_caption_is_asked_for(looking):
    with pytest.raises(ValueError, match="Type a caption"):
        looking.see(PICTURE, "  ", "raw")


def test_depth_and_patches_are_the_models_own(model):
    assert depth(model.image_tower) == depth(model.text_tower) == (3, 2)
    assert patches(model.image_tower) == (4, 4)
    batch = {"pixel_values": model.image_tower.preprocess(PICTURE)[None]}
    seen = raw_attention(record(model.image_tower, batch), one_token(0, 1, 17))
    assert patch_grid(model.image_tower, batch["pixel_values"], seen).shape == (1, 4, 4)
