"""Heads, the dual encoder around stand-in towers, and its files."""

import copy
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn

from helpers import load_or_build
from helpers import model as dual_encoder
from helpers.config import ROOT, get_profile
from helpers.model import CLIP, average_weights, load_heads, load_model, save_heads, save_model
from helpers.storage.checkpoints import weights_digest
from tests.tiny import image_tower, text_tower


@pytest.fixture
def model():
    """Tiny towers with dropout, so that a mode shows."""
    return CLIP(16, 16, 8, image_tower(hidden_dropout_prob=0.5), text_tower()).eval()


@pytest.fixture
def files(model, tmp_path):
    """A folder with saved heads."""
    save_heads(model, tmp_path, {"run": 1, "name": "naïve"})
    return tmp_path


def pictures(n=5):
    return [Image.new("RGB", (20 + i, 30), (40 * i, 10, 200)) for i in range(n)]


def test_scale_and_bias_start_where_the_papers_say_and_are_trained(tmp_path):
    heads, siglip = CLIP(3, 4, 8), CLIP(3, 4, 8, **dual_encoder.SIGLIP_START)
    assert heads.logits()["logit_scale"].item() == pytest.approx(math.log(1 / 0.07))
    assert heads.logit_bias is None and set(heads.logits()) == {"logit_scale"}
    start = {name: p.item() for name, p in siglip.named_parameters() if name.startswith("logit_")}
    assert start == pytest.approx({"logit_scale": math.log(10), "logit_bias": -10})
    assert siglip.logits().keys() == start.keys()
    siglip.logit_bias.data.fill_(-3.5)
    save_heads(siglip, tmp_path, {})
    assert load_heads(tmp_path)[0].logit_bias.item() == -3.5


def test_encoding_takes_one_or_many_paths_images_and_sentences(model, tmp_path):
    images = pictures()
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    embeds = model.encode_images(images, batch_size=2)
    assert embeds.shape == (5, 8) and embeds.dtype == torch.float32
    mixed = [*paths[:2], *images[2:]]
    for same in (tuple(images), paths, [str(path) for path in paths], mixed):
        torch.testing.assert_close(model.encode_images(same), embeds)
    for one in (images[0], paths[0], str(paths[0])):
        torch.testing.assert_close(model.encode_images(one), embeds[:1])
    texts = ["a dog", "a red cat on the beach", "two"]
    embeds = model.encode_texts(texts)
    torch.testing.assert_close(model.encode_texts(tuple(texts), batch_size=1), embeds)
    torch.testing.assert_close(model.encode_texts("a dog"), embeds[:1])
    assert model.encode_texts([]).shape == model.encode_images([]).shape == (0, 8)
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        model.encode_images("none.jpg")
    nn.Linear(8, 2)(embeds).sum().backward()  # ordinary tensors: a linear probe is trained on them


def test_modes_come_back_part_by_part(model):
    model.train()
    model.image_tower.eval()
    before = [part.training for part in model.modules()]
    model.encode_images(pictures(2))
    assert [part.training for part in model.modules()] == before
    with pytest.raises(KeyError), dual_encoder.evaluating(model):
        assert not any(part.training for part in model.modules()) and not torch.is_grad_enabled()
        raise KeyError
    with dual_encoder.training_mode(model):
        assert all(part.training for part in model.modules()) and torch.is_grad_enabled()
    assert [part.training for part in model.modules()] == before


def test_averaged_weights_lie_between_two_models_and_change_neither(model):
    after = copy.deepcopy(model).train()
    for part in (after.image_tower, after.image_head):
        for p in part.parameters():
            p.data += torch.randn_like(p)
    both = [weights_digest(model), weights_digest(after)]
    assert [weights_digest(average_weights(model, after, alpha)) for alpha in (0, 1)] == both
    averaged = average_weights(model, after, 0.3)
    for p, start, end in zip(*(m.parameters() for m in (averaged, model, after)), strict=True):
        torch.testing.assert_close(p, 0.7 * start + 0.3 * end)
        assert p.equal(end) == start.equal(end)  # the text tower, which was not tuned
    assert [weights_digest(model), weights_digest(after)] == both and after.training
    assert not any(part.training for part in averaged.modules())
    other = CLIP(16, 16, 8, model.image_tower, model.text_tower, **dual_encoder.SIGLIP_START)
    for pair in ((model, other), (other, model)):
        with pytest.raises(ValueError, match="logit_bias is missing or of another shape"):
            average_weights(*pair, 0.5)


def test_saved_heads_come_back_equal(model, tmp_path):
    model.logit_scale.data.fill_(3.5)
    save_heads(model, tmp_path / "b/c", {"profile": "mini", "name": "naïve"})
    loaded, meta = load_heads(tmp_path / "b/c", model.image_tower, model.text_tower)
    assert meta == {"profile": "mini", "name": "naïve"}
    assert not loaded.training and loaded.dims == model.dims
    states = [dual_encoder.head_state(heads) for heads in (model, loaded)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert loaded.encode_texts("a cat").equal(model.encode_texts("a cat"))
    assert load_heads(tmp_path / "b/c")[0].image_tower is None
    names = load_file(tmp_path / "b/c/heads.safetensors").keys()
    assert "logit_scale" in names and not any("tower" in name for name in names)


# A save that was killed between its two files.
OTHER = save({name: t + 1 for name, t in dual_encoder.head_state(CLIP(16, 16, 8)).items()})
FAULTS = [
    ("heads.safetensors", OTHER, "heads.safetensors is damaged, or not the file .* delete"),
    ("heads.json", b'{"image_dim": 16', "does not describe heads"),
]


@pytest.mark.parametrize("name, content, problem", FAULTS)
def test_files_that_are_damaged_or_of_another_save_are_refused(files, name, content, problem):
    (files / name).write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        load_heads(files)


def test_the_whole_model_is_one_folder(model, tmp_path):
    save_model(CLIP(16, 16, 8, image_tower(seed=1), text_tower(seed=1)), tmp_path, {"run": 0})
    save_model(model, tmp_path, {"run": 1})  # in the place of the other
    loaded, meta = load_model(tmp_path, max_length=12)
    assert (meta["run"], meta["tuned"]) == (1, ["image_tower", "text_tower"])
    pixels, texts = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), ["a dog", "two cats"]
    with torch.no_grad():
        assert loaded.encode_image(pixels).equal(model.encode_image(pixels))
        assert loaded.encode_texts(texts).equal(model.encode_texts(texts))
    assert not list(tmp_path.glob(".*"))


def test_a_tower_that_was_not_tuned_has_to_be_given(model, tmp_path):
    save_model(model, tmp_path, {}, tuned=["image_tower"])
    assert not (tmp_path / "text_tower").exists()
    with pytest.raises(ValueError, match="holds no text_tower"):
        load_model(tmp_path)
    loaded, _ = load_model(tmp_path, text_tower=model.text_tower)
    assert loaded.encode_texts("a dog").equal(model.encode_texts("a dog"))


@pytest.mark.parametrize("tower", ["image_tower", "text_tower"])
def test_a_tower_with_a_flipped_bit_is_refused(model, tmp_path, tower):
    save_model(model, tmp_path, {})
    path = tmp_path / tower / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{tower} does not hold the weights .*delete"):
        load_model(tmp_path, max_length=12)


def test_the_committed_models_load():
    for folder in (ROOT / "assets/heads").iterdir():
        loaded, meta = load_heads(folder)
        assert loaded.dims["embed_dim"] == 256 and len(meta["history"]) >= meta["epoch"]
    profile = get_profile("mini")
    tuned, pair = load_or_build.finetuned(profile), load_or_build.towers(profile)
    for tower, before in zip((tuned.image_tower, tuned.text_tower), pair, strict=True):
        assert weights_digest(tower) != weights_digest(before)
