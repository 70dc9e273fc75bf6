"""The dual encoder: two towers that may be left out, and two small heads that map both into one space."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from helpers.encoders import read_image_tower, read_text_tower, weights_digest
from helpers.storage.files import atomic_write

LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's starts
MAX_LOGIT_SCALE = math.log(100)  # cosines are never multiplied by more than 100
SIGLIP_START = {"logit_scale": math.log(10), "logit_bias": -10.0}  # Zhai et al. 2023, section 3.2


class ProjectionHead(nn.Sequential):
    """LayerNorm, Linear, GELU, Dropout, Linear: features [B, in_dim] to [B, embed_dim], not normalised.

    The hidden layer is as wide as the output, and dropout drops hidden units: with frozen towers the heads see the
    same features again and again, and unseen images gain from it.
    """

    def __init__(self, in_dim, embed_dim, dropout=0.1):
        super().__init__(
            nn.LayerNorm(in_dim),
            nn.Linear(in_dim, embed_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(embed_dim, embed_dim),
        )


class CLIP(nn.Module):
    """Two heads and a temperature, with the towers in front of them when they are given.

    image_dim, text_dim: widths of the features; embed_dim: width E of the common space. `logit_scale` is the logarithm
    of the factor on the cosines and starts at ln(1 / 0.07). Radford et al. 2021, section 2.4. With a `logit_bias` it is
    a SigLIP model (see SIGLIP_START); without one there is no such parameter.
    """

    def __init__(
        self,
        image_dim,
        text_dim,
        embed_dim=256,
        image_tower=None,
        text_tower=None,
        logit_scale=LOGIT_SCALE,
        logit_bias=None,
    ):
        super().__init__()
        for kind, tower, dim in (("image", image_tower, image_dim), ("text", text_tower, text_dim)):
            if tower is not None and tower.dim != dim:
                raise ValueError(
                    f"the {kind} tower is {tower.dim} wide, its head {dim}: use the tower of this head"
                )
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_head = ProjectionHead(image_dim, embed_dim)
        self.text_head = ProjectionHead(text_dim, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.dims = {"image_dim": image_dim, "text_dim": text_dim, "embed_dim": embed_dim}

    def project_image(self, features):
        """Image features [B, image_dim] to unit vectors [B, E]."""
        return F.normalize(self.image_head(features), dim=-1)

    def project_text(self, features):
        """Text features [B, text_dim] to unit vectors [B, E]."""
        return F.normalize(self.text_head(features), dim=-1)

    def encode_image(self, pixel_values):
        """Pixels [B, 3, H, W] to unit vectors [B, E]."""
        return self.project_image(self.image_tower(pixel_values))

    def encode_text(self, input_ids, attention_mask):
        """Tokens [B, T] to unit vectors [B, E]."""
        return self.project_text(self.text_tower(input_ids, attention_mask))

    def logits(self):
        """What the loss takes besides the embeddings: logit_scale [] and, for SigLIP, logit_bias []."""
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {"logit_scale": self.logit_scale, **bias}

    def forward(self, batch):
        """A batch to what the losses take. Each side is raw, or as features [B, D] that a frozen tower has made.

        pixel_values [B, 3, H, W] or image_features; input_ids and attention_mask [B, T] or text_features.
        """
        if "image_features" in batch:
            image_embeds = self.project_image(batch["image_features"])
        else:
            image_embeds = self.encode_image(batch["pixel_values"])
        if "text_features" in batch:
            text_embeds = self.project_text(batch["text_features"])
        else:
            text_embeds = self.encode_text(batch["input_ids"], batch["attention_mask"])
        return {"image_embeds": image_embeds, "text_embeds": text_embeds, **self.logits()}

    def encode_images(self, images, batch_size=64):
        """A list of PIL images to unit vectors [N, E] on the CPU, in evaluation mode."""

        def encode(batch):
            pixel_values = torch.stack([self.image_tower.preprocess(image) for image in batch])
            return self.encode_image(pixel_values.to(self.logit_scale.device))

        return self._encode_batches(encode, images, batch_size)

    def encode_texts(self, texts, batch_size=64):
        """A list of sentences to unit vectors [N, E] on the CPU, in evaluation mode."""
        if isinstance(texts, str):
            raise TypeError(f"encode_texts takes a list of sentences: write [{texts!r}]")

        def encode(batch):
            tokens = self.text_tower.tokenize(batch)
            return self.encode_text(
                **{name: ids.to(self.logit_scale.device) for name, ids in tokens.items()}
            )

        return self._encode_batches(encode, texts, batch_size)

    def _encode_batches(self, encode, items, batch_size):
        with evaluating(self):
            parts = [
                encode(items[i : i + batch_size]).float().cpu()
                for i in range(0, len(items), batch_size)
            ]
        # Joined outside, so that the result is an ordinary tensor that a probe can be trained on.
        return torch.cat([torch.empty(0, self.dims["embed_dim"]), *parts])


@contextmanager
def training_mode(module, mode=True):
    """Training mode inside; afterwards each part of the module is back in its own mode, frozen towers too."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(mode)
    try:
        yield
    finally:
        for part, before in modes:
            part.training = before


@contextmanager
def evaluating(module):
    """Evaluation mode without autograd inside; afterwards each part is back in its own mode."""
    with training_mode(module, False), torch.inference_mode():
        yield


def head_state(model):
    """Copies of the tensors that are trained over frozen towers: both heads, logit_scale and logit_bias, by name."""
    own = (
        item
        for item in model.state_dict().items()
        if not item[0].startswith(("image_tower.", "text_tower."))
    )
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in own
    }


def save_heads(model, folder, meta):
    """Write heads.safetensors and heads.json (dims, `meta`, digest of the weights) into `folder`, each atomically."""
    weights = save(head_state(model))
    about = {**model.dims, "sha256": hashlib.sha256(weights).hexdigest(), "meta": meta}
    atomic_write(Path(folder, "heads.safetensors"), weights)
    atomic_write(
        Path(folder, "heads.json"),
        json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
    )


def load_heads(folder, image_tower=None, text_tower=None):
    """Read what save_heads wrote: (CLIP in evaluation mode, meta).

    FileNotFoundError when a file is missing; ValueError when one is damaged, from another save, or of other shapes.
    """
    json_path, path = Path(folder) / "heads.json", Path(folder) / "heads.safetensors"
    fix = "delete the folder and save the heads again"
    for needed in (json_path, path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{needed} is missing: train heads in notebook 03 and keep them with save_heads"
            )
    try:
        about = json.loads(json_path.read_text(encoding="utf-8"))
        dims = {name: int(about[name]) for name in ("image_dim", "text_dim", "embed_dim")}
        meta, digest = about["meta"], about["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{json_path} does not describe heads ({error!r}): {fix}") from error
    weights = path.read_bytes()
    try:
        state = load(weights)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}): {fix}") from error
    start = {"logit_bias": 0.0} if "logit_bias" in state else {}
    model = CLIP(**dims, image_tower=image_tower, text_tower=text_tower, **start)
    asked = {name: list(tensor.shape) for name, tensor in head_state(model).items()}
    found = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in sorted(asked.keys() | found.keys()):
        if asked.get(name) != found.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name)}, {json_path} asks for {asked.get(name)}: {fix}"
            )
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ValueError(f"{path} is not the file that {json_path} was saved with: {fix}")
    model.load_state_dict(
        state, strict=False
    )  # copies into aligned memory; the towers bring their own weights
    return model.eval(), meta


def save_model(model, folder, meta, tuned=("image_tower", "text_tower")):
    """The whole model as one folder: the heads, and each tower of `tuned` in a folder that transformers reads too."""
    for name in tuned:
        getattr(model, name).save(Path(folder, name))
    digests = {name: weights_digest(getattr(model, name)) for name in tuned}
    save_heads(model, folder, meta | {"tuned": list(tuned), "digests": digests})


def load_model(folder, image_tower=None, text_tower=None, max_length=64):
    """Read what save_model wrote: (CLIP in evaluation mode, meta). A tower that was not tuned has to be given.

    ValueError, with the file and the fix, when a tower is neither there nor given, damaged, or from another save.
    """
    read = {
        "image_tower": read_image_tower,
        "text_tower": partial(read_text_tower, max_length=max_length),
    }
    towers = {"image_tower": image_tower, "text_tower": text_tower}
    fix = f"delete {folder} and train the model again"
    for name in towers:
        path = Path(folder, name)
        if path.is_dir():
            try:
                towers[name] = read[name](path)
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path / 'model.safetensors'} cannot be read ({error}): {fix}"
                ) from error
        if towers[name] is None:
            raise ValueError(
                f"{folder} holds no {name}, since it was not tuned: give the one that it was trained with"
            )
    model, meta = load_heads(folder, **towers)
    for name, digest in meta.get("digests", {}).items():
        if weights_digest(towers[name]) != digest:
            raise ValueError(
                f"{Path(folder, name)} does not hold the weights that {folder} was saved with: {fix}"
            )
    return model, meta
