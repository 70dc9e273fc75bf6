"""The two pretrained towers: a ViT that reads images and a BERT that reads captions.

A tower turns its input into one vector: an image into the last layer's CLS token, a caption into
the mean over the last layer's real (unpadded) tokens. Nothing here is trained; projection heads
come in model.py.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertModel, BertTokenizerFast, ViTImageProcessor, ViTModel
from transformers.utils import logging

from helpers.config import Profile
from helpers.storage import hub
from helpers.storage.files import replace_when_complete

# transformers draws bars and reports the layers that we leave out; what is missing raises below.
logging.set_verbosity_error()
logging.disable_progress_bar()


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over real tokens: states [B, T, D] and their mask [B, T] to [B, D].

    Taught in notebook 02, "The text tower, step by step".
    """
    mask = attention_mask.unsqueeze(-1).to(states.dtype)  # [B, T, 1]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


class ImageTower(nn.Module):
    """A ViT and the preprocessing that it was trained with.

    size: height and width of its input in pixels; dim: width D of its embedding.
    Taught in notebook 02, "The image tower, step by step".
    """

    pooling = "CLS of last_hidden_state"

    def __init__(self, model: ViTModel, size: int, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.size = size
        self.dim = model.config.hidden_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def preprocess(self, image: Image.Image, box: tuple | None = None) -> Tensor:
        """Squash an image to the tower's input size: uint8 [3, size, size].

        box: the part to squash, as (left, top, right, bottom) in pixels; None takes all of it.
        """
        size = (self.size, self.size)
        squashed = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box)
        return torch.from_numpy(np.array(squashed)).permute(2, 0, 1)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the float32 range that the ViT was trained on."""
        return (pixel_values.float() / 255 - self.mean) / self.std

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images: [B, 3, H, W], uint8 from `preprocess` or float from `normalise`: [B, D]."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.normalise(pixel_values)
        return self.model(pixel_values).last_hidden_state[:, 0]


class TextTower(nn.Module):
    """A BERT and its WordPiece tokenizer.

    max_length: captions are cut to so many tokens, [CLS] and [SEP] among them; dim: width D of its
    embedding; together: how many captions of similar length a CPU embeds at a time.
    Taught in notebook 02, "The text tower, step by step".
    """

    pooling = "masked mean of last_hidden_state"
    together = 32

    def __init__(self, model: BertModel, tokenizer: BertTokenizerFast, max_length: int):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.dim = model.config.hidden_size

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """Captions to {"input_ids", "attention_mask"}, int64 [B, T], padded to the longest."""
        limits = {"padding": True, "truncation": True, "max_length": self.max_length}
        kind = {"return_token_type_ids": False, "return_tensors": "pt"}
        return dict(self.tokenizer(list(texts), **limits, **kind))

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """All captions of the batch at once: [B, T] to [B, D]."""
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return masked_mean(output.last_hidden_state, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed captions: token ids [B, T] and their mask [B, T] to [B, D].

        On a CPU, captions of similar length go through together and their padding stays outside:
        half the work.
        """
        if input_ids.device.type != "cpu":
            return self.pooled(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1)
        order = lengths.argsort()
        parts = []
        for rows in order.split(self.together):
            width = lengths[rows[-1]]
            parts.append(self.pooled(input_ids[rows, :width], attention_mask[rows, :width]))
        return torch.cat(parts)[order.argsort()]


def load_towers(profile: Profile) -> tuple[ImageTower, TextTower]:
    """Both towers of a profile."""
    return load_image_tower(profile), load_text_tower(profile)


def load_image_tower(profile: Profile) -> ImageTower:
    """The profile's ViT without its classifier, in eval mode, on the CPU.

    Raises OSError where the model is missing and cannot be fetched, and ValueError for a model
    that is no ViT or lacks weights.
    """
    return read_image_tower(hub.model_folder(profile.image_model))


def load_text_tower(profile: Profile) -> TextTower:
    """The profile's BERT without its pooler, in eval mode, on the CPU.

    Raises as `load_image_tower` does, and ValueError for a MiniLM that is not the published one.
    """
    folder = hub.model_folder(profile.text_model)
    return read_text_tower(folder, profile.max_length)


def read_image_tower(folder: Path) -> ImageTower:
    """The ViT of a folder in Hugging Face format."""
    model = _pretrained(ViTModel, folder)
    settings = ViTImageProcessor.from_pretrained(folder, local_files_only=True)
    size = settings.size["height"]
    return ImageTower(model, size, settings.image_mean, settings.image_std).eval()


def read_text_tower(folder: Path, max_length: int) -> TextTower:
    """The BERT of a folder in Hugging Face format."""
    model = _pretrained(BertModel, folder)
    tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    return TextTower(model, tokenizer, max_length).eval()


def save_tower(tower: ImageTower | TextTower, folder: Path) -> None:
    """Write a tower as transformers does; `read_image_tower` and `read_text_tower` read it."""
    if hasattr(tower, "tokenizer"):
        preprocessing = tower.tokenizer
    else:
        size = {"height": tower.size, "width": tower.size}
        mean, std = _statistics(tower)
        preprocessing = ViTImageProcessor(size=size, image_mean=mean, image_std=std)
    with replace_when_complete(folder) as partial:
        tower.model.save_pretrained(partial)
        preprocessing.save_pretrained(partial)


def settings(tower: ImageTower | TextTower) -> dict:
    """All that shapes an embedding besides the weights and the data; part of the cache's key."""
    # Where the model came from, and what it is asked to return besides.
    aside = ["_name_or_path", "transformers_version", "architectures"]
    aside += ["output_attentions", "output_hidden_states"]
    config = {k: v for k, v in tower.model.config.to_dict().items() if k not in aside}
    result = {"config": config, "pooling": tower.pooling}
    if hasattr(tower, "tokenizer"):
        tokenizer = json.loads(tower.tokenizer.backend_tokenizer.to_str())
        # Whatever the last call left there.
        del tokenizer["truncation"], tokenizer["padding"]
        digest = hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest()
        return {**result, "tokenizer": digest, "max_length": tower.max_length}
    mean, std = _statistics(tower)
    resize = "bilinear, squashed"
    return {**result, "size": tower.size, "mean": mean, "std": std, "resize": resize}


def _statistics(tower: ImageTower) -> tuple[list[float], list[float]]:
    return tower.mean.flatten().tolist(), tower.std.flatten().tolist()


def _pretrained(kind: type, folder: Path) -> nn.Module:
    """The ViTModel or BertModel of a folder, float32; weights from safetensors only.

    transformers fills what it does not find with random numbers and only logs it. Here that is a
    ValueError, and so is a model of another type.
    """
    model_type = json.loads(Path(folder, "config.json").read_text()).get("model_type")
    wanted = kind.config_class.model_type
    if model_type != wanted:
        raise ValueError(
            f"{folder}/config.json says model_type {model_type!r}, and this tower has to be a "
            f"{wanted!r}: name another model in the profile."
        )
    strict = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, report = kind.from_pretrained(
        folder, add_pooling_layer=False, dtype=torch.float32, **strict
    )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}/model.safetensors lacks {len(missing)} of {len(model.state_dict())} weights "
            f"({', '.join(missing[:3])} …): is it the file of another model? Save this one again."
        )
    return model
