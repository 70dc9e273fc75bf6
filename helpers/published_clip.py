"""A CLIP or SigLIP that others have trained, with the interface of ours, to be held against it."""

import os

from torch import nn

from helpers.config import pick_device
from helpers.encoders import FixedLengthTextTower, ImageTower, TextTower
from helpers.model import CLIP
from helpers.storage import hub, towers


def load_pretrained_clip(name: str) -> CLIP:
    """A published CLIP or SigLIP as one of ours, evaluating on the best device.

    name: a folder, or a name on the hub such as openai/clip-vit-base-patch32. Its towers pool as
    they were trained, its heads are its projections. Raises OSError, ValueError or ImportError, in
    one sentence with the fix, where it cannot be read.
    """
    folder = hub.model_folder(name)
    whole = towers.read_model(folder, "clip")
    kind = FixedLengthTextTower if hasattr(whole, "logit_bias") else TextTower
    longest = whole.config.text_config.max_position_embeddings
    image_tower = ImageTower(whole.vision_model, *towers.read_preprocessing(folder))
    text_tower = kind(whole.text_model, towers.read_tokenizer(folder), longest)
    image_head = getattr(whole, "visual_projection", nn.Identity())  # a SigLIP has none
    dims = image_tower.dim, text_tower.dim, getattr(image_head, "out_features", image_tower.dim)
    numbers = ("logit_scale", "logit_bias")
    starts = {name: p.item() for name, p in whole.named_parameters() if name in numbers}
    model = CLIP(*dims, image_tower, text_tower, **starts)
    model.image_head = image_head
    model.text_head = getattr(whole, "text_projection", nn.Identity())
    return model.eval().requires_grad_(False).to(pick_device())


def published_clip() -> CLIP | None:
    """The model that CLIP_PRETRAINED names; None, and a printed sentence, where there is none."""
    name = os.environ.get("CLIP_PRETRAINED")
    reason = "CLIP_PRETRAINED names a folder or a model such as openai/clip-vit-base-patch32"
    try:
        if name:
            return load_pretrained_clip(name)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
    print(f"No published CLIP to compare with: {reason}")
    return None
