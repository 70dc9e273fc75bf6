"""The two contrastive losses as formulas, on one device.

Row i of `image_embeds` and row i of `text_embeds` are an image and its caption. Whoever made them
has divided each by its length.
"""

import torch
import torch.nn.functional as F


def same_image(embeds, image_ids=None):
    """Which captions of the batch describe which images.

    embeds [B, E] gives size and device; image_ids [B] gives the image of each row (None: every row
    is another image). Returns bool [B, B], True on the diagonal and wherever two rows share an
    image.

    Taught in notebook 03, "The loss as code".
    """
    if image_ids is None:
        image_ids = torch.arange(len(embeds))
    image_ids = torch.as_tensor(image_ids, device=embeds.device)
    return image_ids[:, None] == image_ids  # [B, B]


def clip_loss(image_embeds, text_embeds, logit_scale, image_ids=None):
    """Symmetric InfoNCE: each image must find its caption in the batch, each caption its image.

    image_embeds, text_embeds [B, E]; logit_scale [] is the logarithm of the factor on the cosines;
    image_ids [B]: captions of the same image share the probability mass. The loss is in nats: about
    ln B untrained, 0 for B = 1. Radford et al. 2021, figure 3.

    Taught in notebook 03, "The loss as code".
    """
    logits = logit_scale.exp() * image_embeds @ text_embeds.T  # [B, B]
    targets = same_image(logits, image_ids).to(logits.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)  # symmetric, each row sums to 1
    image_to_text = F.cross_entropy(logits, targets)
    text_to_image = F.cross_entropy(logits.T, targets)
    return (image_to_text + text_to_image) / 2


def siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids=None):
    """Sigmoid loss: each of the B x B pairs is a yes-or-no question of its own.

    image_embeds, text_embeds [B, E]; logit_scale [] is the logarithm of the factor on the cosines
    and starts at ln 10, logit_bias [] at -10; image_ids [B]: captions of the same image are
    positives too. The sum over all pairs is divided by B, not by B². Zhai et al. 2023, equation 1.

    Taught in notebook 05, "The loss as code".
    """
    # A sum of B² terms needs more than 16 bits.
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    image_embeds, text_embeds = image_embeds.to(dtype), text_embeds.to(dtype)
    logits = logit_scale.to(dtype).exp() * image_embeds @ text_embeds.T + logit_bias  # [B, B]
    signs = 2 * same_image(logits, image_ids).to(dtype) - 1  # +1 for a pair, -1 for all others
    return -F.logsigmoid(signs * logits).sum() / len(logits)
