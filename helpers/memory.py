"""What a training step needs, by towers' shapes alone: memory and arithmetic.

`dual_encoder` under a FakeTensorMode takes no memory and computes nothing: its tensors know their
sizes and hold no numbers. Notebook 04 counts with it, benchmarks/gpu.py trains it for real.

    python -m helpers.memory 16     the peak, in bytes, of one real step of 16 pairs of small towers
"""

import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from helpers.encoders import masked_mean
from helpers.losses import clip_loss
from helpers.model import CLIP

# mini's towers, and their shared space
SMALL_IMAGE = {"image_size": 96, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
SMALL_IMAGE |= {"num_hidden_layers": 6, "num_attention_heads": 4}
SMALL_TEXT = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}


class Tower(torch.nn.Module):
    """A transformer of a configuration, all zeros, pooled as the course's towers are."""

    prefix = 1  # CLS

    def __init__(self, config, kind):
        super().__init__()
        with torch.device("meta"):  # shapes alone: random weights would take seconds
            self.model = kind(config, add_pooling_layer=False)
        for module in list(self.model.modules()):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.zeros(p.shape)))
            for name, b in list(module.named_buffers(recurse=False)):
                setattr(module, name, torch.zeros(b.shape, dtype=b.dtype))
        self.dim = config.hidden_size

    def forward(self, inputs, attention_mask=None):
        if attention_mask is None:
            return self.model(inputs).last_hidden_state[:, 0]
        states = self.model(inputs, attention_mask=attention_mask).last_hidden_state
        return masked_mean(states, attention_mask)


def dual_encoder(image_config=None, text_config=None, embed_dim=512):
    """A CLIP over towers of these shapes; by default ViT-B/16 and BERT-base."""
    image_tower = Tower(image_config or ViTConfig(), ViTModel)
    text_tower = Tower(text_config or BertConfig(), BertModel)
    return CLIP(image_tower.dim, text_tower.dim, embed_dim, image_tower, text_tower)


def batch_for(model, size, tokens=20):
    """A batch of the right shapes, all zeros; COCO's captions have 13 tokens, padded some 20."""
    side = model.image_tower.model.config.image_size
    ids = torch.zeros(size, tokens, dtype=torch.long)
    return {
        "pixel_values": torch.zeros(size, 3, side, side),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def flops(model, batch):
    """Floating-point operations of the forward pass on a batch, and of both passes.

    All matrix products and convolutions; a multiplication and an addition count as two.
    """
    # Fused attention on a CPU would not be counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs = model.train()(batch)
        forward = counter.get_total_flops()
        (outputs["image_embeds"].sum() + outputs["text_embeds"].sum()).backward()
        return forward, counter.get_total_flops()


if __name__ == "__main__":
    clip = dual_encoder(ViTConfig(**SMALL_IMAGE), BertConfig(**SMALL_TEXT), 256).train()
    clip_loss(**clip(batch_for(clip, int(sys.argv[1])))).backward()
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
