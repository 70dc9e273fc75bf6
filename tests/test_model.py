"""Heads, the dual encoder around stand-in towers, and its files."""

import hashlib
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers import BertModel, BertTokenizerFast, ViTImageProcessor, ViTModel

from helpers.model import (
    CLIP,
    SIGLIP_START,
    ProjectionHead,
    evaluating,
    head_state,
    load_heads,
    load_model,
    save_heads,
    save_model,
    training_mode,
)
from tests.tiny import image_tower, text_tower


class Pixels(nn.Module):
    """An image tower: a number instead of a picture, dropout to see modes."""

    dim = 3

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(12, 3), nn.Dropout(0.5)

    def preprocess(self, image):
        return torch.full((3, 2, 2), image, dtype=torch.uint8)

    def forward(self, pixel_values):
        return self.dropout(self.linear(pixel_values.flatten(1) / 255))


class Letters(nn.Module):
    """A text tower: one token a letter, masked mean of their vectors."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(128, 4)

    def tokenize(self, texts):
        longest = max(map(len, texts))
        input_ids = torch.tensor(
            [[*map(ord, text), *[0] * (longest - len(text))] for text in texts]
        )
        return {"input_ids": input_ids, "attention_mask": (input_ids > 0).long()}

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[:, :, None]
        return (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CLIP(3, 4, embed_dim=8, image_tower=Pixels(), text_tower=Letters())


def test_a_head_maps_widths_and_does_not_normalise():
    output = ProjectionHead(5, 7)(torch.randn(2, 5))
    assert output.shape == (2, 7)
    assert not torch.allclose(output.norm(dim=-1), torch.ones(2))


def test_projections_are_unit_vectors():
    model = CLIP(3, 4, embed_dim=8)
    for embeds in (model.project_image(torch.randn(6, 3)), model.project_text(torch.randn(6, 4))):
        assert embeds.shape == (6, 8)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(6))


def test_the_scale_starts_where_clip_starts_and_is_trained(model):
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert "logit_scale" in dict(model.named_parameters())


def test_forward_takes_a_collated_batch(model):
    batch = {
        "pixel_values": torch.zeros(2, 3, 2, 2, dtype=torch.uint8),
        **model.text_tower.tokenize(["a cat", "dog"]),
    }
    outputs = model({**batch, "image_ids": torch.arange(2)})
    assert set(outputs) == {"image_embeds", "text_embeds", "logit_scale"}
    assert outputs["image_embeds"].shape == outputs["text_embeds"].shape == (2, 8)
    assert outputs["logit_scale"] is model.logit_scale


def test_encoding_lists_is_batched_and_deterministic(model):
    images = model.encode_images([1, 50, 200, 255, 7], batch_size=2)
    assert images.shape == (5, 8) and images.dtype == torch.float32
    torch.testing.assert_close(images, model.encode_images([1, 50, 200, 255, 7], batch_size=5))
    texts = model.encode_texts(["a", "a longer one", "cat"], batch_size=1)
    torch.testing.assert_close(texts, model.encode_texts(["a", "a longer one", "cat"]))
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, 8)


def test_encoded_lists_are_ordinary_tensors(model):
    """A linear probe is trained on them."""
    nn.Linear(8, 2)(model.encode_images([1, 2])).sum().backward()


def test_one_sentence_is_not_a_list_of_letters(model):
    with pytest.raises(TypeError, match=r"\['a cat'\]"):
        model.encode_texts("a cat")


def test_modes_come_back_part_by_part(model):
    model.train()
    model.image_tower.eval()
    before = [part.training for part in model.modules()]
    model.encode_images([1, 2])
    assert [part.training for part in model.modules()] == before
    with pytest.raises(KeyError), evaluating(model):
        assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    with training_mode(model):
        assert all(part.training for part in model.modules()) and torch.is_grad_enabled()
    assert [part.training for part in model.modules()] == before


def test_a_tower_of_another_width_is_refused():
    with pytest.raises(ValueError, match="text tower is 4 wide, its head 5"):
        CLIP(3, 5, text_tower=Letters())


def test_saved_heads_come_back_equal(model, tmp_path):
    model.logit_scale.data.fill_(3.5)
    save_heads(model, tmp_path / "new" / "folder", {"profile": "mini", "name": "naïve"})
    loaded, meta = load_heads(tmp_path / "new" / "folder", model.image_tower, model.text_tower)
    assert meta == {"profile": "mini", "name": "naïve"}
    assert not loaded.training and loaded.dims == model.dims
    saved = head_state(model)
    assert all(tensor.equal(saved[name]) for name, tensor in head_state(loaded).items())
    assert loaded.encode_texts(["a cat"]).equal(model.encode_texts(["a cat"]))
    assert load_heads(tmp_path / "new" / "folder")[0].image_tower is None


def test_files_hold_heads_only_and_nothing_else_is_left(model, tmp_path):
    for _ in range(2):
        save_heads(model, tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["heads.json", "heads.safetensors"]
    names = load_file(tmp_path / "heads.safetensors").keys()
    assert "logit_scale" in names and not any("tower" in name for name in names)


def test_the_same_heads_give_the_same_bytes(model, tmp_path):
    for folder in ("a", "b"):
        save_heads(model, tmp_path / folder, {"b": 1, "a": 2})
    for name in ("heads.json", "heads.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_failed_save_leaves_the_old_file(model, tmp_path, monkeypatch):
    save_heads(model, tmp_path, {"run": 1})

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_heads(CLIP(3, 4, embed_dim=8), tmp_path, {"run": 2})
    assert load_heads(tmp_path)[1] == {"run": 1}


@pytest.mark.parametrize("missing", ["heads.json", "heads.safetensors"])
def test_a_missing_file_is_named(model, tmp_path, missing):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_heads(tmp_path / "nowhere")
    save_heads(model, tmp_path, {})
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        load_heads(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04" + bytes(100)])
def test_what_is_no_safetensors_file_is_refused(model, tmp_path, content):
    save_heads(model, tmp_path, {})
    (tmp_path / "heads.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="heads.safetensors is not a safetensors file"):
        load_heads(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"image_dim": "wide", "text_dim": 4, "embed_dim": 8}']
)
def test_what_does_not_describe_heads_is_refused(model, tmp_path, content):
    save_heads(model, tmp_path, {})
    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(ValueError, match="heads.json does not describe heads"):
        load_heads(tmp_path)


def test_wrong_shapes_and_missing_tensors_are_named(model, tmp_path):
    save_heads(model, tmp_path, {})
    about = json.loads((tmp_path / "heads.json").read_text())
    (tmp_path / "heads.json").write_text(json.dumps({**about, "text_dim": 5}))
    with pytest.raises(ValueError, match=r"text_head.0.bias is \[4\], .*heads.json asks for \[5\]"):
        load_heads(tmp_path)
    state = head_state(model)
    del state["logit_scale"]
    (tmp_path / "heads.json").write_text(json.dumps(about))
    save_file(state, tmp_path / "heads.safetensors")
    with pytest.raises(ValueError, match="logit_scale is None"):
        load_heads(tmp_path)


def test_weights_of_another_save_are_refused(model, tmp_path):
    """A save that was killed between its two files."""
    save_heads(model, tmp_path, {})
    other = save(head_state(CLIP(3, 4, embed_dim=8)))
    assert hashlib.sha256(other).hexdigest() not in (tmp_path / "heads.json").read_text()
    (tmp_path / "heads.safetensors").write_bytes(other)
    with pytest.raises(ValueError, match="not the file that"):
        load_heads(tmp_path)


# SigLIP's bias, features in place of pictures and words, the whole model as one folder


def test_only_a_siglip_model_has_a_bias(tmp_path):
    assert CLIP(3, 4, 8).logit_bias is None and "logit_bias" not in CLIP(3, 4, 8).logits()
    model = CLIP(3, 4, 8, **SIGLIP_START)
    assert (model.logit_scale.item(), model.logit_bias.item()) == (
        pytest.approx(math.log(10)),
        -10.0,
    )
    assert set(model.logits()) == {"logit_scale", "logit_bias"} and "logit_bias" in dict(
        model.named_parameters()
    )
    model.logit_bias.data.fill_(-3.5)
    save_heads(model, tmp_path, {})
    assert load_heads(tmp_path)[0].logit_bias.item() == -3.5


def test_forward_takes_features_of_a_frozen_tower(model):
    model.eval()
    batch = {"pixel_values": torch.rand(2, 3, 2, 2), **model.text_tower.tokenize(["ab", "c"])}
    whole = model(batch)
    image_features = model.image_tower(batch["pixel_values"])
    text_features = model.text_tower(batch["input_ids"], batch["attention_mask"])
    halves = model({"image_features": image_features, "text_features": text_features})
    for name, tensor in whole.items():
        assert halves[name].equal(tensor)


def tuned_model():
    torch.manual_seed(0)
    return CLIP(16, 16, embed_dim=8, image_tower=image_tower(), text_tower=text_tower()).eval()


def test_the_whole_model_is_one_folder_that_transformers_reads_too(tmp_path):
    model = tuned_model()
    save_model(model, tmp_path, {"run": 1})
    loaded, meta = load_model(tmp_path, max_length=12)
    assert (meta["run"], meta["tuned"]) == (1, ["image_tower", "text_tower"])
    pictures, texts = (
        torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8),
        ["a red dog", "two cats"],
    )
    with torch.no_grad():
        assert loaded.encode_image(pictures).equal(model.encode_image(pictures))
        assert loaded.encode_texts(texts).equal(model.encode_texts(texts))
        vit = ViTModel.from_pretrained(tmp_path / "image_tower", add_pooling_layer=False).eval()
        bert = BertModel.from_pretrained(tmp_path / "text_tower", add_pooling_layer=False).eval()
        processor = ViTImageProcessor.from_pretrained(tmp_path / "image_tower")
        tokens = BertTokenizerFast.from_pretrained(tmp_path / "text_tower")(
            texts, padding=True, return_tensors="pt"
        )
        pixels = processor(list(pictures), do_resize=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(vit(pixels).last_hidden_state[:, 0], model.image_tower(pictures))
        states = bert(
            tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        by_hand = (states * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(
            by_hand, model.text_tower(tokens["input_ids"], tokens["attention_mask"])
        )


def test_a_tower_that_was_not_tuned_has_to_be_given(tmp_path):
    model = tuned_model()
    save_model(model, tmp_path, {}, tuned=["image_tower"])
    assert not (tmp_path / "text_tower").exists()
    with pytest.raises(ValueError, match="holds no text_tower"):
        load_model(tmp_path)
    loaded, _ = load_model(tmp_path, text_tower=model.text_tower)
    assert loaded.encode_texts(["a dog"]).equal(model.encode_texts(["a dog"]))


@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_a_tower_with_a_flipped_bit_is_refused(tmp_path, tower):
    save_model(tuned_model(), tmp_path, {})
    path = tmp_path / tower / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{tower} does not hold the weights that .*delete"):
        load_model(tmp_path, max_length=12)


def test_saving_over_a_model_replaces_it(tmp_path):
    save_model(tuned_model(), tmp_path, {"run": 1})
    torch.manual_seed(1)
    other = CLIP(
        16, 16, embed_dim=8, image_tower=image_tower(seed=1), text_tower=text_tower(seed=1)
    ).eval()
    save_model(other, tmp_path, {"run": 2})
    loaded, meta = load_model(tmp_path)
    assert meta["run"] == 2 and not list(tmp_path.glob(".*"))
    for name, tensor in other.image_tower.state_dict().items():
        assert loaded.image_tower.state_dict()[name].equal(tensor)
