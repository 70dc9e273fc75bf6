"""The dual encoder: two towers, which may be left out, and two small heads into one space."""

import copy
import hashlib
import json
import math
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from helpers.encoders import read_image_tower, read_text_tower, save_tower
from helpers.storage.checkpoints import weights_digest
from helpers.storage.files import atomic_write
from helpers.storage.images import open_image

LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's starts
MAX_LOGIT_SCALE = math.log(100)  # cosines are never multiplied by more than 100
SIGLIP_START = {"logit_scale": math.log(10), "logit_bias": -10.0}  # Zhai et al. 2023, section 3.2


@contextmanager
def temporarily(changes):
    """Attributes set inside, each (object, name, value), and put back as they were afterwards."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def training_mode(module, mode=True):
    """Training mode inside; afterwards each part of the module is back in its own mode."""
    return temporarily([(part, "training", mode) for part in module.modules()])


@contextmanager
def evaluating(module):
    """Evaluation mode without autograd inside; afterwards each part is back in its own mode."""
    with training_mode(module, False), torch.inference_mode():
        yield


class ProjectionHead(nn.Sequential):
    """LayerNorm, Linear, GELU, Dropout, Linear: features [B, in_dim] to [B, embed_dim].

    The output is not normalised. The hidden layer is as wide as the output, and dropout drops
    hidden units: with frozen towers the heads see the same features again and again, and unseen
    images gain from it.

    Taught in notebook 03, "The model".
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
    """Two heads and a temperature, with the towers in front of them where they are given.

    image_dim, text_dim: widths of the features; embed_dim: width E of the common space.
    `logit_scale` is the logarithm of the factor on the cosines and starts at ln(1 / 0.07). Radford
    et al. 2021, section 2.4. With a `logit_bias` it is a SigLIP model (see SIGLIP_START); without
    one there is no such parameter.

    Taught in notebook 03, "The model".
    """

    def __init__(self, image_dim, text_dim, embed_dim=256, image_tower=None, text_tower=None,
                 logit_scale=LOGIT_SCALE, logit_bias=None):  # fmt: skip
        super().__init__()
        self.dims = {"image_dim": image_dim, "text_dim": text_dim, "embed_dim": embed_dim}
        self.image_tower, self.text_tower = image_tower, text_tower
        self.image_head = ProjectionHead(image_dim, embed_dim)
        self.text_head = ProjectionHead(text_dim, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    def project_image(self, features):  # [B, image_dim] -> [B, E], unit vectors
        return F.normalize(self.image_head(features), dim=-1)

    def project_text(self, features):  # [B, text_dim] -> [B, E], unit vectors
        return F.normalize(self.text_head(features), dim=-1)

    def encode_image(self, pixel_values):  # [B, 3, H, W] -> [B, E]
        return self.project_image(self.image_tower(pixel_values))

    def encode_text(self, input_ids, attention_mask):  # [B, T] -> [B, E]
        return self.project_text(self.text_tower(input_ids, attention_mask))

    def logits(self):
        """What the loss takes besides the embeddings: logit_scale [], for SigLIP logit_bias []."""
        bias = {} if self.logit_bias is None else {"logit_bias": self.logit_bias}
        return {"logit_scale": self.logit_scale, **bias}

    def forward(self, batch):
        """A batch to what the losses take. Each side is raw, or the features of a frozen tower.

        pixel_values [B, 3, H, W] or image_features [B, D]; input_ids and attention_mask [B, T] or
        text_features [B, D].
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
        """A path, a PIL image or a list of either to unit vectors [N, E] on the CPU."""

        def encode(batch):
            opened = [open_image(item) if isinstance(item, (str, Path)) else item for item in batch]
            pixels = torch.stack([self.image_tower.preprocess(image) for image in opened])
            return self.encode_image(pixels.to(self.logit_scale.device))

        single = isinstance(images, (str, Path, Image.Image))
        return self.in_batches(encode, [images] if single else images, batch_size)

    def encode_texts(self, texts, batch_size=64):
        """A sentence or a list of sentences to unit vectors [N, E] on the CPU."""

        def encode(batch):
            tokens = self.text_tower.tokenize(batch)
            device = self.logit_scale.device
            return self.encode_text(**{name: ids.to(device) for name, ids in tokens.items()})

        return self.in_batches(encode, [texts] if isinstance(texts, str) else texts, batch_size)

    def in_batches(self, encode, items, batch_size):
        """encode(items) batch by batch, in evaluation mode."""
        with evaluating(self):
            starts = range(0, len(items), batch_size)
            parts = [encode(items[i : i + batch_size]).float().cpu() for i in starts]
        # Joined outside, so that the result is an ordinary tensor that a probe can be trained on.
        return torch.cat([torch.empty(0, self.dims["embed_dim"]), *parts])


@torch.no_grad()
def average_weights(before, after, alpha):
    """A new CLIP with the weights (1 - alpha) · before + alpha · after, in evaluation mode.

    before, after: two models of the same shapes; neither is changed. The device and the buffers
    are those of `after`. An alpha of 0 or 1 gives one of the two exactly, and what is equal in both
    stays as it is, such as a tower that was not tuned. WiSE-FT, Wortsman et al. 2021 (2109.01903).
    ValueError names the first parameter that one of them lacks or has in another shape.

    Taught in notebook 04, "Averaged weights".
    """
    averaged = copy.deepcopy(after).eval()
    starts, weights = dict(before.named_parameters()), dict(averaged.named_parameters())
    for name in starts | weights:
        start, weight = starts.get(name), weights.get(name)
        if start is None or weight is None or start.shape != weight.shape:
            raise ValueError(f"{name} is missing or of another shape: average models alike")
        weight.copy_(torch.lerp(start.to(weight.device), weight, alpha))
    return averaged


def head_state(model):
    """Copies of the tensors that are trained over frozen towers: both heads, scale and bias."""
    own = {name: t for name, t in model.state_dict().items() if "_tower." not in name}
    return {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in own.items()}


def save_heads(model, folder, meta):
    """Write heads.safetensors and heads.json (dims, `meta`, digest of the weights), atomically."""
    weights = save(head_state(model))
    about = {**model.dims, "sha256": hashlib.sha256(weights).hexdigest(), "meta": meta}
    text = json.dumps(about, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    atomic_write(Path(folder, "heads.safetensors"), weights)
    atomic_write(Path(folder, "heads.json"), text)


def load_heads(folder, image_tower=None, text_tower=None):
    """Read what save_heads wrote: (CLIP in evaluation mode, meta).

    FileNotFoundError when a file is missing; ValueError when one is damaged or from another save.
    """
    json_path, path = Path(folder, "heads.json"), Path(folder, "heads.safetensors")
    fix = "delete the folder and train the heads again"
    try:
        about = json.loads(json_path.read_text(encoding="utf-8"))
        dims = [about[name] for name in ("image_dim", "text_dim", "embed_dim")]
        meta, digest = about["meta"], about["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{json_path} does not describe heads ({error!r}): {fix}") from error
    weights = path.read_bytes()
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ValueError(f"{path} is damaged, or not the file that {json_path} belongs to: {fix}")
    state = load(weights)
    start = {"logit_bias": 0.0} if "logit_bias" in state else {}
    model = CLIP(*dims, image_tower, text_tower, **start)
    model.load_state_dict(state, strict=False)  # the towers bring their own weights
    return model.eval(), meta


def save_model(model, folder, meta, tuned=("image_tower", "text_tower")):
    """The model as one folder: its heads, and each tower of `tuned` as transformers reads it."""
    for name in tuned:
        save_tower(getattr(model, name), Path(folder, name))
    digests = {name: weights_digest(getattr(model, name)) for name in tuned}
    save_heads(model, folder, meta | {"tuned": list(tuned), "digests": digests})


def load_model(folder, image_tower=None, text_tower=None, max_length=64):
    """Read what save_model wrote: (CLIP in evaluation mode, meta).

    A tower that was not tuned has to be given. ValueError, with the folder and the fix, when a
    tower is neither there nor given, damaged, or from another save.
    """
    image_path, text_path = Path(folder, "image_tower"), Path(folder, "text_tower")
    fix = f"delete {folder} and train the model again"
    try:
        image_tower = read_image_tower(image_path) if image_path.is_dir() else image_tower
        text_tower = read_text_tower(text_path, max_length) if text_path.is_dir() else text_tower
    except (OSError, SafetensorError) as error:
        raise ValueError(f"a tower in {folder} cannot be read ({error}): {fix}") from error
    for name, tower in (("image_tower", image_tower), ("text_tower", text_tower)):
        if tower is None:
            raise ValueError(f"{folder} holds no {name}: give the one that it was trained with")
    model, meta = load_heads(folder, image_tower, text_tower)
    for name, digest in meta.get("digests", {}).items():
        if weights_digest(getattr(model, name)) != digest:
            raise ValueError(f"{Path(folder, name)} does not hold the weights saved there: {fix}")
    return model, meta
