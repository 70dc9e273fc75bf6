"""The two pretrained towers: a ViT that reads pictures and a BERT that reads captions, each with its preprocessing.

A tower turns its input into one vector: a picture into the last layer's CLS token, a caption into the mean over the
last layer's real (unpadded) tokens. Nothing here is trained; projection heads come in model.py.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast, ViTImageProcessor, ViTModel
from transformers.utils import logging

from helpers.config import ROOT, Profile
from helpers.storage import hub
from helpers.storage.files import replace_when_complete

LOCAL = {"local_files_only": True, "use_safetensors": True}
TOGETHER = 32  # captions of similar length that a CPU embeds at a time


class ImageTower(nn.Module):
    """A ViT and the preprocessing it was trained with.

    size: height and width of its input in pixels; dim: width D of its embedding.
    """

    pooling = "CLS of last_hidden_state"

    def __init__(self, model: ViTModel, size: int, mean: list[float], std: list[float]):
        super().__init__()
        self.model, self.size, self.dim = model, size, model.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, image: Image.Image, box: tuple | None = None) -> Tensor:
        """Squash a picture to the tower's input size, bilinear, as ViTImageProcessor does: uint8 [3, size, size].

        box: the part to squash, as (left, top, right, bottom) in pixels; None takes the whole picture.
        """
        pixels = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the float32 range that the ViT was trained on."""
        return (pixel_values.float() / 255 - self.mean) / self.std

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed pictures: [B, 3, H, W], uint8 from `preprocess` or float from `normalise`, to [B, D]."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.normalise(pixel_values)
        return self.model(pixel_values).last_hidden_state[:, 0]

    def save(self, folder: Path) -> None:
        """Write the ViT and its preprocessing as transformers does; `read_image_tower` and ViTModel both read it."""
        size = {"height": self.size, "width": self.size}
        mean, std = self.mean.flatten().tolist(), self.std.flatten().tolist()
        _save(folder, self.model, ViTImageProcessor(size=size, image_mean=mean, image_std=std))

    def settings(self) -> dict:
        """All that shapes an embedding besides the weights and the picture; part of the cache's key."""
        return {
            "config": _config(self.model),
            "size": self.size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "resize": "bilinear, squashed",
            "pooling": self.pooling,
        }


class TextTower(nn.Module):
    """A BERT and its WordPiece tokenizer.

    max_length: captions are cut to so many tokens, [CLS] and [SEP] among them; dim: width D of its embedding.
    """

    pooling = "masked mean of last_hidden_state"

    def __init__(self, model: BertModel, tokenizer: BertTokenizerFast, max_length: int):
        super().__init__()
        self.model, self.tokenizer, self.max_length, self.dim = (
            model,
            tokenizer,
            max_length,
            model.config.hidden_size,
        )

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Captions to {"input_ids", "attention_mask"}, both int64 [B, T], padded to the longest of these captions."""
        tokens = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        return dict(tokens)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions: token ids [B, T] and their mask [B, T] to [B, D]; padding has no say in the mean.

        On a CPU, captions of similar length go through together and their padding stays outside: half the work.
        """
        if input_ids.device.type != "cpu":
            return self.pooled(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1)
        order = lengths.argsort()
        features = [
            self.pooled(
                input_ids[rows, : lengths[rows[-1]]], attention_mask[rows, : lengths[rows[-1]]]
            )
            for rows in order.split(TOGETHER)
        ]
        return torch.cat(features)[order.argsort()]

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean over the last layer's real tokens."""
        states = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state  # [B, T, D]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)  # [B, T, 1]
        return (states * mask).sum(dim=1) / mask.sum(dim=1)

    def save(self, folder: Path) -> None:
        """Write the BERT and its tokenizer as transformers does; `read_text_tower` and BertModel both read it."""
        _save(folder, self.model, self.tokenizer)

    def settings(self) -> dict:
        """All that shapes an embedding besides the weights and the caption; part of the cache's key."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.pop("truncation"), tokenizer.pop("padding")  # whatever the last call left there
        return {
            "config": _config(self.model),
            "tokenizer": hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest(),
            "max_length": self.max_length,
            "pooling": self.pooling,
        }


def load_image_tower(profile: Profile) -> ImageTower:
    """The profile's ViT without its classifier, in eval mode, on the CPU; weights from safetensors only.

    Raises OSError, in one sentence with the fix, where the model is missing and cannot be fetched.
    """
    if profile.image_model in hub.REVISIONS:
        return read_image_tower(hub.fetch(profile.image_model, hub.IMAGE_FILES))
    return read_image_tower(
        _folder(profile.image_model, "make it with: python -m scripts.pretrain_vit")
    )


def load_text_tower(profile: Profile) -> TextTower:
    """The profile's BERT without its pooler, in eval mode, on the CPU; weights from safetensors only.

    Raises OSError as `load_image_tower` does, and ValueError for a MiniLM that is not the published one.
    """
    if profile.text_model == hub.MINILM_WHEEL:
        folder = hub.minilm()
    elif profile.text_model in hub.REVISIONS:
        folder = hub.fetch(profile.text_model, hub.TEXT_FILES)
    else:
        fix = "save a BertModel and its tokenizer there"
        return read_text_tower(_folder(profile.text_model, fix), profile.max_length)
    tokenizer = BertTokenizerFast(
        vocab=str(folder / "vocab.txt")
    )  # there may be other tokenizer files beside it
    return _text_tower(folder, tokenizer, profile.max_length)


def read_image_tower(folder: Path) -> ImageTower:
    """The ViT that `ImageTower.save` left in a folder."""
    with _quiet():
        model = ViTModel.from_pretrained(folder, add_pooling_layer=False, **LOCAL)
        processor = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
    return ImageTower(
        model, processor.size["height"], processor.image_mean, processor.image_std
    ).eval()


def read_text_tower(folder: Path, max_length: int) -> TextTower:
    """The BERT that `TextTower.save` left in a folder."""
    return _text_tower(
        folder, BertTokenizerFast.from_pretrained(folder, local_files_only=True), max_length
    )


def load_towers(profile: Profile) -> tuple[ImageTower, TextTower]:
    """Both towers of a profile."""
    return load_image_tower(profile), load_text_tower(profile)


def weights_digest(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all weights of a module."""

    def describe(item: tuple[str, Tensor]) -> str:
        name, weight = item
        data = weight.cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{name} {weight.dtype} {tuple(weight.shape)} {hashlib.sha256(data).hexdigest()}"

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock, and a BERT is 440 MB
        lines = pool.map(describe, sorted(module.state_dict().items()))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _text_tower(folder: Path, tokenizer: BertTokenizerFast, max_length: int) -> TextTower:
    with _quiet():
        model = BertModel.from_pretrained(folder, add_pooling_layer=False, **LOCAL)
    return TextTower(model, tokenizer, max_length).eval()


def _save(folder: Path, *parts) -> None:
    """Every part's save_pretrained into a new folder, which then takes the place of the old one."""
    with replace_when_complete(folder) as partial:
        for part in parts:
            part.save_pretrained(partial)


def _folder(name: str, fix: str) -> Path:
    """A model's folder in this repository."""
    folder = ROOT / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing: no pretrained model there; {fix}"
        )
    return folder


def _config(model: nn.Module) -> dict:
    """A model's configuration without where it came from and what it is asked to return besides."""
    aside = {
        "_name_or_path",
        "transformers_version",
        "architectures",
        "output_attentions",
        "output_hidden_states",
    }
    return {key: value for key, value in model.config.to_dict().items() if key not in aside}


@contextmanager
def _quiet():
    """Silence transformers' report of the layers we leave out, and its progress bars."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
