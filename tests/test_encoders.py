"""The two towers: preprocessing, pooling, and models that must not pass for others."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from helpers import encoders
from helpers.config import get_profile
from helpers.encoders import load_image_tower, load_text_tower, settings
from helpers.storage.checkpoints import weights_digest
from tests import tiny

MINI = dataclasses.replace(get_profile("mini"), max_length=16)


def noise(width, height, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="module")
def text_tower():
    return load_text_tower(MINI)


# The image tower


@pytest.mark.parametrize("width, height, mode", [(200, 120, "RGB"), (50, 333, "L")])
def test_preprocess_equals_transformers(width, height, mode):
    tower, image = tiny.image_tower(size=96, mean=0.4), noise(width, height, mode)
    ours = tower.preprocess(image)
    assert ours.shape == (3, 96, 96) and ours.dtype == torch.uint8
    processor = ViTImageProcessor(size={"height": 96, "width": 96}, image_mean=[0.4] * 3)
    theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    grey_levels = (tower.normalise(ours) - theirs).abs() * tower.std * 255
    assert grey_levels.max() < 1.01 and grey_levels.mean() < 0.3


def test_image_embedding_is_the_cls_token():
    tower = tiny.image_tower().eval()
    pixels = torch.stack([tower.preprocess(noise(20, 16)), tower.preprocess(noise(16, 50))])
    with torch.inference_mode():
        embeds = tower(pixels)
        states = tower.model(tower.normalise(pixels)).last_hidden_state
        assert torch.equal(embeds, states[:, 0]) and embeds.shape == (2, 16)
        assert torch.equal(embeds, tower(tower.normalise(pixels))), "floats are normalised already"
    assert not torch.allclose(embeds[0], embeds[1])


# The text tower


def test_text_embedding_is_the_masked_mean(text_tower):
    texts = ["A dog.", "Two cats sleep on a red sofa next to a window."]
    tokens = text_tower.tokenize(texts)
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape and len(tokens) == 2
    with torch.inference_mode():
        embeds = text_tower(**tokens)
        for text, embed in zip(texts, embeds, strict=True):
            # No padding at all.
            alone = text_tower.model(**text_tower.tokenize([text])).last_hidden_state[0]
            torch.testing.assert_close(embed, alone.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert embeds.shape == (2, 384) and text_tower.dim == 384


def test_a_cpu_embeds_captions_of_similar_length_together_and_in_their_own_order():
    tower, shapes = tiny.text_tower().eval(), []

    def count(module, args, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))

    tower.model.register_forward_pre_hook(count, with_kwargs=True)
    lengths = np.random.default_rng(0).integers(1, 10, 70)
    tokens = tower.tokenize([" ".join(["dog"] * length) for length in lengths])
    with torch.inference_mode():
        torch.testing.assert_close(tower(**tokens), tower.pooled(**tokens))
    assert [rows for rows, _ in shapes] == [32, 32, 6, 70]
    assert shapes[0][1] < shapes[2][1] == shapes[3][1], "padding of short captions stays outside"


def test_tokenize_is_bert_wordpiece_and_truncates(text_tower):
    ids = text_tower.tokenize(["A photo of a CAT!"])["input_ids"][0]
    pieces = text_tower.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert pieces == ["[CLS]", "a", "photo", "of", "a", "cat", "!", "[SEP]"]
    tokens = text_tower.tokenize(["word " * 100, "word"])
    assert tokens["input_ids"].shape == (2, 16)
    assert tokens["attention_mask"].sum(dim=1).tolist() == [16, 3]
    assert tokens["input_ids"][0, -1] == text_tower.tokenizer.sep_token_id


# Loading and saving


READERS = {
    "vit": encoders.read_image_tower,
    "bert": partial(encoders.read_text_tower, max_length=12),
}


@pytest.fixture(params=["vit", "bert"])
def saved(request, tmp_path):
    """(kind, folder, weights, tower): a tower's folder in Hugging Face format."""
    tower = {"vit": tiny.image_tower, "bert": tiny.text_tower}[request.param]()
    encoders.save_tower(tower, tmp_path / "tower")
    weights = load_file(tmp_path / "tower/model.safetensors")
    return request.param, tmp_path / "tower", weights, tower


def write(folder, weights, **config):
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**before, **config}))


def test_a_saved_tower_is_read_as_it_was_and_in_silence(saved, capfd):
    kind, folder, weights, tower = saved
    write(folder, {**weights, "pooler.dense.weight": torch.ones(16, 16)})  # nothing uses that
    again = READERS[kind](folder)
    assert weights_digest(again) == weights_digest(tower) and settings(again) == settings(tower)
    assert not again.training and capfd.readouterr() == ("", "")


def test_a_model_that_lacks_any_one_weight_or_all_is_refused(saved):
    kind, folder, weights, _ = saved
    count = len(weights)
    for absent in weights:
        write(folder, {name: weights[name] for name in weights if name != absent})
        with pytest.raises(ValueError, match=f"tower/model.safetensors lacks 1 of {count} "):
            READERS[kind](folder)
    write(folder, {f"backbone.{name}": weight for name, weight in weights.items()})
    with pytest.raises(ValueError, match=rf"lacks {count} of {count} weights \(embeddings\."):
        READERS[kind](folder)


@pytest.mark.parametrize("other", ["clip_text_model", None])
def test_other_model_types_are_refused_by_name(saved, other):
    kind, folder, weights, _ = saved
    write(folder, weights, model_type=other)
    message = rf"tower/config.json says model_type {other!r}, .* has to be one of {kind}, "
    with pytest.raises(ValueError, match=message):
        READERS[kind](folder)


def test_weights_in_half_precision_are_read_as_float32(saved):
    kind, folder, weights, _ = saved
    write(folder, {name: weight.half() for name, weight in weights.items()}, dtype="float16")
    assert {p.dtype for p in READERS[kind](folder).parameters()} == {torch.float32}


def test_missing_model_folder_says_how_to_make_it(tmp_path):
    profile = dataclasses.replace(MINI, image_model=str(tmp_path / "no-vit"))
    fix = r"no-vit/config\.json is missing.*python -m scripts\.pretrain_vit"
    with pytest.raises(FileNotFoundError, match=fix):
        load_image_tower(profile)
