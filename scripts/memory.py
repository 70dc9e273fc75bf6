"""What training needs, from the real configurations: memory, by weights, gradients, moments and activations; and work.

Activations are counted, not estimated: one pair goes through towers of the true shape on the CPU, and every tensor that
autograd keeps for the backward pass is added up. `measured` compares the count with the peak of a real process.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from helpers.config import ROOT
from helpers.model import CLIP
from helpers.training_context import trained_parts

TOKENS = 20  # of a caption, padding included; COCO's have 13 on average
SETTINGS = {
    "projection": (0, 0),
    "finetuned-image": (1, 0),
    "finetuned-text": (0, 1),
    "finetuned": (1, 1),
}


class Tower(torch.nn.Module):
    """A transformer of given configuration with uninitialised weights; `image` says which of the two it is."""

    def __init__(self, config, image: bool):
        super().__init__()
        with torch.device("meta"):
            model = (ViTModel if image else BertModel)(config, add_pooling_layer=False)
        self.model, self.image, self.dim = model.to_empty(device="cpu"), image, config.hidden_size

    def forward(self, inputs, attention_mask=None):
        if self.image:
            return self.model(inputs).last_hidden_state[:, 0]
        return self.model(inputs, attention_mask=attention_mask).last_hidden_state.mean(dim=1)


def dual_encoder(image_config=None, text_config=None, embed_dim: int = 512) -> CLIP:
    """A CLIP over towers of these shapes; by default ViT-B/16 and BERT-base."""
    towers = Tower(image_config or ViTConfig(), True), Tower(text_config or BertConfig(), False)
    model = CLIP(towers[0].dim, towers[1].dim, embed_dim, *towers)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def batch_for(model: CLIP, size: int, tokens: int = TOKENS) -> dict:
    """A batch of the right shapes, all zeros."""
    side = model.image_tower.model.config.image_size
    ids = torch.zeros(size, tokens, dtype=torch.long)
    return {
        "pixel_values": torch.zeros(size, 3, side, side),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def activation_bytes(model: CLIP, batch: dict, amp: bool = False) -> int:
    """Bytes that autograd keeps for the backward pass of a batch: without the weights, every tensor once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (
                storage.nbytes(),
                tensor,
            )  # the tensor too: a freed address may come back
        return tensor

    with (
        FakeTensorMode() as sizes
    ):  # tensors that know their sizes and hold no numbers: nothing is computed
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights, batch = tree_map_only(torch.Tensor, sizes.from_tensor, (weights, batch))
        own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                outputs = functional_call(model.train(), weights, (batch,))
            del outputs
    return sum(size for size, _ in kept.values())


def flops(model: CLIP, batch: dict) -> tuple[int, int]:
    """Floating-point operations for a batch: of the forward pass, and of both passes.

    PyTorch adds up all matrix products and convolutions; a multiplication and an addition count as two. As above,
    nothing is computed.
    """
    with (
        FakeTensorMode() as sizes,
        sdpa_kernel(SDPBackend.MATH),
    ):  # fused attention on a CPU is not counted
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights, batch = tree_map_only(torch.Tensor, sizes.from_tensor, (weights, batch))
        with FlopCounterMode(display=False) as counter:
            outputs = functional_call(model.train(), weights, (batch,))
            forward = counter.get_total_flops()
            (outputs["image_embeds"].sum() + outputs["text_embeds"].sum()).backward()
        return forward, counter.get_total_flops()


def table(batch_size: int = 128, model: CLIP | None = None) -> list[dict]:
    """Gigabytes that each setting needs: a row for each of SETTINGS without and with mixed precision and checkpointing.

    Mixed precision keeps weights, gradients and moments in float32 and halves most activations. With gradient
    checkpointing a layer keeps only its input; the one layer that is being recomputed comes on top.
    """
    model, rows = model or dual_encoder(), []
    for name, (image_lr, text_lr) in SETTINGS.items():
        for how, amp, again in (
            ("float32", 0, 0),
            ("mixed precision", 1, 0),
            ("and checkpointing", 1, 1),
        ):
            with trained_parts(model, image_lr, text_lr, bool(again)):
                weights = 4 * sum(p.numel() for p in model.parameters())
                trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
                two, one = (activation_bytes(model, batch_for(model, n), bool(amp)) for n in (2, 1))
            row = {
                "weights": weights,
                "gradients": trained,
                "moments": 2 * trained,
                "activations": (two - one) * batch_size,
            }
            row["total"] = sum(row.values())
            rows.append(
                {"setting": name, "how": how, **{key: value / 1e9 for key, value in row.items()}}
            )
    return rows


def measured(image_config, text_config, sizes=(16, 80), embed_dim: int = 256) -> dict:
    """Bytes a pair of a full fine-tuning step: counted, and from the peaks of two real processes (Linux only)."""
    told = [repr(config.to_dict()) for config in (image_config, text_config)]
    commands = [[sys.executable, "-c", STEP, *told, str(embed_dim), str(size)] for size in sizes]
    with ThreadPoolExecutor() as pool:  # side by side: most of their time goes to imports
        run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks = [int(done.stdout.split()[-1]) for done in pool.map(run, commands)]
    model = dual_encoder(image_config, text_config, embed_dim)
    counted = [activation_bytes(model, batch_for(model, size)) for size in sizes]
    step = sizes[1] - sizes[0]
    return {"counted": (counted[1] - counted[0]) / step, "measured": (peaks[1] - peaks[0]) / step}


STEP = """
import ast, sys
from transformers import BertConfig, ViTConfig
from helpers import losses
from scripts import memory

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

image, text = ViTConfig(**ast.literal_eval(sys.argv[1])), BertConfig(**ast.literal_eval(sys.argv[2]))
model = memory.dual_encoder(image, text, int(sys.argv[3]))
outputs = model.train()(memory.batch_for(model, int(sys.argv[4])))
losses.clip_loss(**outputs).backward()
print(peak())
"""
