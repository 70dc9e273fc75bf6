"""The two pretrained towers: a ViT that reads images and a BERT that reads captions.

A tower turns its input into one vector: an image into the last layer's CLS token, a caption into
the mean over the last layer's real (unpadded) tokens. Their relatives, which storage/towers.json
lists, may bring a pooling of their own. Nothing here is trained; projection heads come in model.py.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from helpers.config import Profile
from helpers.storage import hub, towers
from helpers.storage.files import replace_when_complete


def masked_mean(states: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over real tokens: states [B, T, D] and their mask [B, T] to [B, D].

    Taught in notebook 02, "The text tower, step by step".
    """
    mask = attention_mask.unsqueeze(-1).to(states.dtype)  # [B, T, 1]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


class ImageTower(nn.Module):
    """A ViT, or a relative of it, and the preprocessing that it was trained with.

    size: height and width of its input in pixels; resize: how an image comes to that size; dim:
    width D of its embedding; prefix: the number of tokens before the patches.
    Taught in notebook 02, "The image tower, step by step".
    """

    pooling = "CLS of last_hidden_state"

    def __init__(self, model: PreTrainedModel, size: int, mean, std, resize=towers.SQUASH):
        super().__init__()
        self.model = model
        self.size = size
        self.resize = resize
        self.dim = model.config.hidden_size
        self.prefix = towers.KINDS["image"][model.config.model_type]["prefix"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def visible(self, size: tuple[int, int]) -> tuple:
        """The part of an image (width, height) that the tower sees: left, upper, right, lower."""
        full, cut = self.resize.plan((0, 0, *size), self.size)
        return tuple(x * side / pixels for x, side, pixels in zip(cut, size * 2, full * 2))

    def preprocess(self, image: Image.Image, box: tuple | None = None) -> Tensor:
        """Bring an image to the tower's input size: uint8 [3, size, size].

        box: the part to take, as (left, upper, right, lower) in pixels; None takes all of it.
        """
        box = box or (0, 0, *image.size)
        full, cut = self.resize.plan(box, self.size)  # squashed: nothing is cut off
        resized = image.convert("RGB").resize(full, self.resize.resample, box).crop(cut)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)

    def normalise(self, pixel_values: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to the float32 range that the ViT was trained on."""
        return (pixel_values.float() / 255 - self.mean) / self.std

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed images: [B, 3, H, W], uint8 from `preprocess` or float from `normalise`: [B, D]."""
        if pixel_values.dtype == torch.uint8:
            pixel_values = self.normalise(pixel_values)
        return self.pool(self.model(pixel_values))

    def pool(self, output) -> Tensor:
        """What the model returns to its embedding [B, D]: CLS, or the model's own pooling."""
        own = output.get("pooler_output")
        cls = output.last_hidden_state[:, : self.prefix]  # [B, 1, D]; a DeiT has two
        return cls.mean(dim=1) if own is None else own


class TextTower(nn.Module):
    """A BERT, or a relative of it, and its tokenizer.

    max_length: captions are cut to so many tokens, [CLS] and [SEP] among them; dim: width D of its
    embedding; together: how many captions of similar length a CPU embeds at a time.
    Taught in notebook 02, "The text tower, step by step".
    """

    pooling = "masked mean of last_hidden_state"
    together = 32

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_length: int):
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
        return self.pool(output, attention_mask)

    def pool(self, output, attention_mask: Tensor) -> Tensor:
        """What the model returns to its embedding [B, D]: the mean, or the model's own pooling."""
        own = output.get("pooler_output")
        return masked_mean(output.last_hidden_state, attention_mask) if own is None else own

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


class FixedLengthTextTower(TextTower):
    """A SigLIP's text tower: every caption is padded to one length, and the padding is read."""

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        limits = {"padding": "max_length", "truncation": True, "max_length": self.max_length}
        ids = self.tokenizer(list(texts), **limits, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def load_towers(profile: Profile) -> tuple[ImageTower, TextTower]:
    """Both towers of a profile."""
    return load_image_tower(profile), load_text_tower(profile)


def load_image_tower(profile: Profile) -> ImageTower:
    """The profile's image tower without its classifier, in eval mode, on the CPU.

    Raises OSError where the model is missing and cannot be fetched, and ValueError for a model
    of another kind, or one that lacks weights.
    """
    return read_image_tower(hub.model_folder(profile.image_model))


def load_text_tower(profile: Profile) -> TextTower:
    """The profile's text tower without its pooler, in eval mode, on the CPU.

    Raises as `load_image_tower` does, and ValueError for a MiniLM that is not the published one.
    """
    folder = hub.model_folder(profile.text_model)
    return read_text_tower(folder, profile.max_length)


def read_image_tower(folder: Path) -> ImageTower:
    """The image tower of a folder in Hugging Face format, which may hold a whole CLIP or SigLIP."""
    model = towers.read_model(folder, "image")
    return ImageTower(model, *towers.read_preprocessing(folder)).eval()


def read_text_tower(folder: Path, max_length: int) -> TextTower:
    """The text tower of a folder in Hugging Face format."""
    model = towers.read_model(folder, "text")
    unused = towers.KINDS["text"][model.config.model_type]["unused_positions"]
    max_length = min(max_length, model.config.max_position_embeddings - unused)
    return TextTower(model, towers.read_tokenizer(folder), max_length).eval()


def save_tower(tower: ImageTower | TextTower, folder: Path) -> None:
    """Write a tower as transformers does; `read_image_tower` and `read_text_tower` read it."""
    with replace_when_complete(folder) as partial:
        tower.model.save_pretrained(partial)
        if hasattr(tower, "tokenizer"):
            tower.tokenizer.save_pretrained(partial)
        else:
            towers.save_preprocessing(partial, tower.size, *_statistics(tower), tower.resize)


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
    resize = "bilinear, squashed" if tower.resize == towers.SQUASH else list(tower.resize)
    return {**result, "size": tower.size, "mean": mean, "std": std, "resize": resize}


def _statistics(tower: ImageTower) -> tuple[list[float], list[float]]:
    return tower.mean.flatten().tolist(), tower.std.flatten().tolist()
