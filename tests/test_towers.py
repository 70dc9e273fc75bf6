"""Towers of every kind, as the hub keeps them: read, pooled, shown, tuned, saved, or refused."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoImageProcessor

from helpers import encoders, training
from helpers.attention import METHODS, batches, explain, forward_both, forward_tower
from helpers.data import CaptionedImages
from helpers.encoders import read_image_tower, read_text_tower
from helpers.model import CLIP
from helpers.published_clip import published_clip
from helpers.storage import towers
from helpers.storage.checkpoints import weights_digest
from helpers.training import Examples
from helpers.training_context import some_patches
from tests.coco_files import write_captions, write_images
from tests.tiny import SMALL, SPECIAL, WORDS

VISION = {**SMALL, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
VISION |= {"initializer_range": 0.1, "initializer_factor": 3.0}  # attention far from uniform
MIDDLE = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}
WHOLE = {"size": {"height": 32, "width": 32}}
# The model as it is published, and what reads images for it.
IMAGE = {
    "vit": ("ViTForImageClassification", "ViT", WHOLE),
    "deit-plain": ("ViTForImageClassification", "DeiT", SQUARE),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiT", SQUARE),
    "dinov2": ("Dinov2Model", "Bit", MIDDLE),
    "clip_vision_model": ("CLIPVisionModel", "CLIP", MIDDLE),
    "clip": ("CLIPModel", "CLIP", MIDDLE),
    "siglip_vision_model": ("SiglipVisionModel", "Siglip", WHOLE),
    "siglip": ("SiglipModel", "Siglip", WHOLE),
}
TEXT = {
    "bert": ("BertForMaskedLM", "BertTokenizer", 32),
    "distilbert": ("DistilBertForMaskedLM", "BertTokenizer", 32),
    "roberta": ("RobertaForMaskedLM", "RobertaTokenizer", 34),
    "mpnet": ("MPNetForMaskedLM", "MPNetTokenizer", 34),
}
CAPTIONS = ["two dogs on the beach", "a cat", "a small red bus near the street and a big dog"]


def tokenizer_of(kind):
    special = SPECIAL if kind == "BertTokenizer" else ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    pieces, merges = [*special, *WORDS, "##s"], []
    letters = sorted(ByteLevel.alphabet())
    if kind == "RobertaTokenizer":  # words are built letter by letter
        words = [*WORDS, *(f"Ġ{word}" for word in WORDS)]
        merges = [(word[:k], word[k]) for word in words for k in range(1, len(word))]
        pieces = [*special[:3], "<unk>", "<mask>", *letters, *map("".join, merges)]
    if kind == "CLIPTokenizer":
        ends = ["<|startoftext|>", "<|endoftext|>"]
        pieces = [*letters, *(f"{letter}</w>" for letter in letters), *ends]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    merges = {"merges": list(dict.fromkeys(merges))} if kind[0] in "RC" else {}
    return getattr(transformers, kind)(vocab=vocab, **merges)


def write_image(folder, name):
    kind, processor, sizes = IMAGE[name]
    torch.manual_seed(0)
    kind = getattr(transformers, kind)
    if name in ("clip", "siglip"):
        ends = {"bos_token_id": 512, "eos_token_id": 513}  # CLIPTokenizer's
        text = {**SMALL, **ends, "vocab_size": 514, "max_position_embeddings": 16}
        config = kind.config_class(vision_config=VISION, text_config=text, projection_dim=8)
    else:
        config = kind.config_class(**VISION)
    kind(config).save_pretrained(folder)
    getattr(transformers, f"{processor}ImageProcessor")(**sizes).save_pretrained(folder)
    return folder


def write_text(folder, name):
    kind, tokenizer, positions = TEXT[name]
    kind, tokenizer = getattr(transformers, kind), tokenizer_of(tokenizer)
    shape = {**SMALL, "num_hidden_layers": 2, "max_position_embeddings": positions}
    if name == "distilbert":
        shape |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
    torch.manual_seed(0)
    config = kind.config_class(**shape, vocab_size=len(tokenizer), initializer_range=0.1)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pictures(*sizes):
    """Noise of several grains, wide, tall and small."""
    rng, images = np.random.default_rng(0), []
    for width, height in sizes or ((301, 150), (97, 170), (21, 16)):
        grain = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        images.append(Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC))
    return images


def same_when_saved(tower, read, folder):
    encoders.save_tower(tower, folder)
    again = read(folder)
    assert weights_digest(again) == weights_digest(tower)
    assert encoders.settings(again) == encoders.settings(tower)


@pytest.mark.parametrize("name", IMAGE)
def test_an_image_tower_reads_and_pools_as_published(tmp_path, name):
    folder, images = write_image(tmp_path / "hub", name), pictures()
    tower = read_image_tower(folder)
    pixels = torch.stack([tower.preprocess(image) for image in images])
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    assert ((tower.normalise(pixels) - theirs).abs() * tower.std * 255).max() < 0.01
    published = type(tower.model).from_pretrained(folder).eval()
    with torch.no_grad():
        output = published(tower.normalise(pixels))
        states, expected = output.last_hidden_state, output.pooler_output
        if name.startswith(("vit", "deit")):  # not the pooler of their own, which nothing trained
            expected = states[:, :2].mean(dim=1) if name == "deit" else states[:, 0]
        torch.testing.assert_close(tower(pixels), expected, atol=1e-5, rtol=0)
        with some_patches(tower, 0.5):
            seen = tower.model(tower.normalise(pixels)).last_hidden_state
            half = tower(pixels)
    assert seen.shape[1] == tower.prefix + 8 and half.isfinite().all()
    assert not torch.allclose(half, expected)
    same_when_saved(tower, read_image_tower, tmp_path / "saved")


def test_what_a_tower_sees_is_a_box_in_the_images_own_pixels(tmp_path):
    whole, middle, square = (
        read_image_tower(write_image(tmp_path / name, name)) for name in ("vit", "clip", "deit")
    )
    assert whole.visible((200, 100)) == (0, 0, 200, 100)
    assert middle.visible((200, 100)) == (60, 10, 140, 90), "32 of 80 and of 40 pixels"
    assert square.visible((200, 100)) == (20, 10, 180, 90), "32 of 40 and of 40"
    (image,) = pictures((200, 120))
    part = image.crop((40, 20, 140, 90))
    gap = middle.preprocess(part).float() - middle.preprocess(image, (40, 20, 140, 90))
    assert gap[:, 3:-3, 3:-3].abs().max() <= 2, "a box is treated as an image is"


@pytest.mark.parametrize("name", TEXT)
def test_a_text_tower_is_the_masked_mean_and_cuts_at_its_limit(tmp_path, name, capsys):
    folder = write_text(tmp_path / "hub", name)
    tower = read_text_tower(folder, max_length=64)
    published = type(tower.model).from_pretrained(folder).eval()
    with torch.no_grad():
        for text, embed in zip(CAPTIONS, tower(**tower.tokenize(CAPTIONS))):
            ids = tower.tokenizer([text], return_tensors="pt")["input_ids"]
            states = published(input_ids=ids).last_hidden_state[0]
            torch.testing.assert_close(embed, states.mean(dim=0), atol=1e-5, rtol=0)
        long = tower.tokenize(["dog " * 40])
        assert long["input_ids"].shape == (1, 32) and tower(**long).isfinite().all()
    towers.report_cut_captions(tower, CAPTIONS)
    assert capsys.readouterr().out == ""
    towers.report_cut_captions(tower, [*CAPTIONS, "dog " * 40])
    assert capsys.readouterr().out.startswith("1 of 4 captions are cut: more than 32 ")
    for text in CAPTIONS:
        words, places = zip(*towers.whole_words(tower, text))
        assert list(words) == text.split()
        used = [k for part in places for k in part]
        assert used == list(range(1, len(used) + 1)), "all but the ends and the padding"
    same_when_saved(tower, lambda folder: read_text_tower(folder, 64), tmp_path / "saved")


# In a pair


@pytest.fixture(scope="module")
def sixteen(tmp_path_factory):
    root = tmp_path_factory.mktemp("sixteen")
    captions = {100 + i: [f"{WORDS[i]} {WORDS[(3 * i + 1) % 16]}"] for i in range(16)}
    write_captions(root, captions)
    write_images(root, captions)
    return Examples(CaptionedImages(root))


PAIRS = list(zip(IMAGE, ["bert", "distilbert", "mpnet", *TEXT, "roberta"]))


def pair(folder, image, text):
    image_tower = read_image_tower(write_image(folder / "image", image))
    text_tower = read_text_tower(write_text(folder / "text", text), 64)
    torch.manual_seed(0)
    return CLIP(image_tower.dim, text_tower.dim, 16, image_tower, text_tower)


def shows_where_it_looks(model, images, captions):
    pixels, tokens = batches(model, images, captions)
    for tower, batch in ((model.image_tower, pixels), (model.text_tower, tokens)):
        attentions, source, embedding = forward_tower(tower, batch)
        assert attentions[0].shape[-1] == source.shape[1] and (source >= 0).all()
        torch.testing.assert_close(source.sum(dim=1), torch.ones(len(images)))
        torch.testing.assert_close(embedding, tower(**batch), atol=1e-5, rtol=1e-4)
    cosines = (model.encode_images(images) * model.encode_texts(captions)).sum(dim=1)
    similarity = forward_both(model, pixels, tokens)[2].detach()
    torch.testing.assert_close(similarity, cosines, atol=1e-5, rtol=0)
    for method in METHODS:
        grids, words = explain(model, images, captions, method)
        assert grids.shape == (3, 4, 4) and grids.isfinite().all() and grids.max() > 0
        assert [row.words for row in words] == [caption.split() for caption in captions]


RATES = {"lr": 3e-3, "image_lr": 2e-3, "text_lr": 2e-3, "batch_size": 16, "precision": "no"}


@pytest.mark.parametrize("image, text", PAIRS)
def test_every_kind_learns_and_shows_where_it_looks(tmp_path, sixteen, image, text):
    model = pair(tmp_path, image, text)
    before = weights_digest(model.image_tower), weights_digest(model.text_tower)
    pixels, tokens = batches(model, pictures(), CAPTIONS)
    (model.image_tower(**pixels).sum() + model.text_tower(**tokens).sum()).backward()
    towers_only = [*model.image_tower.named_parameters(), *model.text_tower.named_parameters()]
    assert [name for name, p in towers_only if p.grad is None] == [], "would stop several processes"
    history = training.fit(model, sixteen, sixteen, epochs=50, patch_keep_ratio=0.75, **RATES)
    best = min(row["dev_loss"] for row in history)
    assert best < 2.4 < np.log(16) < history[0]["dev_loss"], "below what a guess has"
    after = weights_digest(model.image_tower), weights_digest(model.text_tower)
    assert not set(before) & set(after)
    shows_where_it_looks(model, pictures(), CAPTIONS)


# What is refused


# What test_encoders.py does not refuse already: a model, the file that it lacks, what is said.
REFUSED = [
    ("vit", "model.safetensors", "has no safetensors, and nothing else is opened"),
    ("vit", "preprocessor_config.json", "preprocessor_config.json"),
    ("roberta", "tokenizer.json", "no tokenizer.json and no vocabulary: copy"),
]


@pytest.mark.parametrize("name, file, message", REFUSED)
def test_a_tower_without_one_of_its_files_is_refused(tmp_path, name, file, message):
    folder = write_text(tmp_path, name) if name in TEXT else write_image(tmp_path, name)
    (folder / file).rename(folder / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match=message):
        read_text_tower(folder, 64) if name in TEXT else read_image_tower(folder)


def test_what_makes_no_squares_is_refused(tmp_path):
    path = write_image(tmp_path, "clip") / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_center_crop": False}))
    with pytest.raises(ValueError, match="makes no squares .*shortest_edge=40"):
        read_image_tower(tmp_path)


# A published CLIP


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_published_clip_embeds_as_published_and_shows_where_it_looks(tmp_path, monkeypatch, name):
    folder = write_image(tmp_path, name)
    tokenizer_of("CLIPTokenizer" if name == "clip" else "BertTokenizer").save_pretrained(folder)
    monkeypatch.setenv("CLIP_PRETRAINED", str(folder))
    model = published_clip().cpu()
    published = getattr(transformers, IMAGE[name][0]).from_pretrained(folder).eval()
    images, few = pictures(), ["a cat", "two dogs", "red bus"]
    pixels, tokens = batches(model, images, few)
    with torch.no_grad():
        normalised = model.image_tower.normalise(pixels["pixel_values"])
        expected = published.get_image_features(normalised).pooler_output
        padding = {"padding": "max_length" if name == "siglip" else True, "truncation": True}
        ids = model.text_tower.tokenizer(few, max_length=16, **padding, return_tensors="pt")[
            "input_ids"
        ]
        texts = published.get_text_features(ids).pooler_output
    for ours, theirs in ((model.encode_images(images), expected), (model.encode_texts(few), texts)):
        torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.text_tower(**tokens), model.text_tower.pooled(**tokens))
    assert all(v == getattr(published, k) for k, v in model.logits().items())
    assert (model.logit_bias is None) == (name == "clip")
    shows_where_it_looks(model, images, few)
