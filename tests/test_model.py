"""Heads, the dual encoder around stand-in towers, and its files."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from transformers import BertModel, BertTokenizerFast, ViTImageProcessor, ViTModel

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


def test_a_head_does_not_normalise_and_projections_do():
    features = dual_encoder.ProjectionHead(5, 7)(torch.randn(2, 5))
    assert not features.norm(dim=-1).isclose(torch.ones(2)).any()
    heads = CLIP(3, 4, embed_dim=8)
    for embeds in (heads.project_image(torch.randn(6, 3)), heads.project_text(torch.randn(6, 4))):
        assert embeds.shape == (6, 8)
        torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(6))


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


def test_forward_takes_a_batch_raw_or_as_features_of_frozen_towers(model):
    tokens = model.text_tower.tokenize(["a dog", "cat"])
    batch = {"pixel_values": torch.rand(2, 3, 16, 16), **tokens}
    whole = model({**batch, "image_ids": torch.arange(2)})
    assert whole["image_embeds"].shape == whole["text_embeds"].shape == (2, 8)
    assert whole["logit_scale"] is model.logit_scale
    image_features = model.image_tower(batch["pixel_values"])
    halves = model({"image_features": image_features, "text_features": model.text_tower(**tokens)})
    assert whole.keys() == halves.keys()
    assert all(halves[name].equal(tensor) for name, tensor in whole.items())


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
    towers = model.image_tower, model.text_tower
    others = {"logit_bias": CLIP(16, 16, 8, *towers, **dual_encoder.SIGLIP_START)}
    others |= {"image_head.1.weight": CLIP(16, 16, 9, *towers)}
    for name, other in others.items():
        for pair in ((model, other), (other, model)):
            with pytest.raises(ValueError, match=f"{name} is missing or of another shape"):
                average_weights(*pair, 0.5)


def test_saved_heads_come_back_equal(model, tmp_path):
    model.logit_scale.data.fill_(3.5)
    for folder in ("a", "b/c"):
        save_heads(model, tmp_path / folder, {"profile": "mini", "name": "naïve"})
    loaded, meta = load_heads(tmp_path / "b/c", model.image_tower, model.text_tower)
    assert meta == {"profile": "mini", "name": "naïve"}
    assert not loaded.training and loaded.dims == model.dims
    states = [dual_encoder.head_state(heads) for heads in (model, loaded)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert loaded.encode_texts("a cat").equal(model.encode_texts("a cat"))
    assert load_heads(tmp_path / "a")[0].image_tower is None
    names = load_file(tmp_path / "a/heads.safetensors").keys()
    assert "logit_scale" in names and not any("tower" in name for name in names)
    for name in ("heads.json", "heads.safetensors"):  # the same heads are the same bytes
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b/c" / name).read_bytes()
    assert len(list((tmp_path / "a").iterdir())) == 2


# A save that was killed between its two files.
OTHER = save({name: t + 1 for name, t in dual_encoder.head_state(CLIP(16, 16, 8)).items()})
NOT_OURS = "heads.safetensors is damaged, or not the file .* delete"


FAULTS = {
    "heads.safetensors": (NOT_OURS, [None, b"", b"\x80\x04N.", OTHER]),
    "heads.json": ("does not describe heads", [None, b"", b'{"image_dim": 16']),
}


@pytest.mark.parametrize(
    "name, content", [(name, content) for name in FAULTS for content in FAULTS[name][1]]
)
def test_files_that_are_missing_damaged_or_of_another_save_are_refused(files, name, content):
    path, problem = files / name, FAULTS[name][0]
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=f"No such file .*{path}|{problem}"):
        load_heads(files)


def test_shapes_that_do_not_fit_are_refused(model, files):
    about = json.loads((files / "heads.json").read_text())
    (files / "heads.json").write_text(json.dumps({**about, "text_dim": 5}))
    refused = partial(pytest.raises, ValueError, match="heads.safetensors holds other shapes than ")
    with refused():
        load_heads(files)
    del model.logit_scale  # a tensor too few must not stay what chance made it
    model.logit_scale = 1.0
    save_heads(model, files, {})
    with refused():
        load_heads(files)


def test_the_whole_model_is_one_folder_that_transformers_reads_too(model, tmp_path):
    save_model(CLIP(16, 16, 8, image_tower(seed=1), text_tower(seed=1)), tmp_path, {"run": 0})
    save_model(model, tmp_path, {"run": 1})  # in the place of the other
    loaded, meta = load_model(tmp_path, max_length=12)
    assert (meta["run"], meta["tuned"]) == (1, ["image_tower", "text_tower"])
    pixels, texts = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), ["a dog", "two cats"]
    with torch.no_grad():
        assert loaded.encode_image(pixels).equal(model.encode_image(pixels))
        assert loaded.encode_texts(texts).equal(model.encode_texts(texts))
        vit = ViTModel.from_pretrained(tmp_path / "image_tower", add_pooling_layer=False).eval()
        bert = BertModel.from_pretrained(tmp_path / "text_tower", add_pooling_layer=False).eval()
        processor = ViTImageProcessor.from_pretrained(tmp_path / "image_tower")
        tokenizer = BertTokenizerFast.from_pretrained(tmp_path / "text_tower")
        scaled = processor(list(pixels), do_resize=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(vit(scaled).last_hidden_state[:, 0], model.image_tower(pixels))
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][:, :, None]
        by_hand = (bert(**tokens).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        torch.testing.assert_close(by_hand, model.text_tower(tokens["input_ids"], mask[:, :, 0]))
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
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="a tower in .* cannot be read .*delete"):
        load_model(tmp_path, max_length=12)


def test_the_committed_models_load():
    for folder in (ROOT / "assets/heads").iterdir():
        loaded, meta = load_heads(folder)
        assert loaded.dims["embed_dim"] == 256 and len(meta["history"]) >= meta["epoch"]
    profile = get_profile("mini")
    tuned, pair = load_or_build.finetuned(profile), load_or_build.towers(profile)
    for tower, before in zip((tuned.image_tower, tuned.text_tower), pair, strict=True):
        assert weights_digest(tower) != weights_digest(before)
