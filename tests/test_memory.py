"""What training needs in memory: counted tensors against what autograd is known to keep."""

import sys

import pytest
import torch
from torch import nn
from transformers import BertConfig, ViTConfig

from scripts import memory
from scripts.memory import (
    SETTINGS,
    activation_bytes,
    batch_for,
    dual_encoder,
    flops,
    measured,
    table,
)

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
IMAGE, TEXT = ViTConfig(**SHAPE, image_size=32, patch_size=8), BertConfig(**SHAPE, vocab_size=100)


def test_what_a_linear_layer_keeps_is_its_input():
    model = nn.Linear(5, 3)
    kept = activation_bytes(model, torch.zeros(7, 5, requires_grad=True))
    assert kept == 4 * 7 * 5  # the weight is kept too, and does not count


def test_a_tensor_kept_twice_counts_once():
    class Twice(nn.Module):
        def forward(self, x):
            y = x.exp()  # exp keeps its result, and so do both products
            return y * y + y * 2 * y

    assert activation_bytes(Twice(), torch.zeros(10, requires_grad=True)) == 4 * (
        10 + 10
    )  # y and 2y


def test_activations_grow_with_the_batch_alone():
    model = dual_encoder(IMAGE, TEXT, 16)
    one, two, four = (activation_bytes(model, batch_for(model, n)) for n in (1, 2, 4))
    assert four - two == 2 * (two - one) > 0


def test_flops_are_those_of_the_formula():
    d, n, t, batch = 32, 1 + (32 // 8) ** 2, 20, 3
    patches = 2 * (n - 1) * (3 * 8 * 8) * d
    layers = sum(
        3 * (8 * k * d**2 + 4 * k**2 * d + 4 * k * d * 64) for k in (n, t)
    )  # projections, attention, MLP
    heads = 2 * (2 * d * 16 + 2 * 16 * 16)
    forward, both = flops(
        dual_encoder(IMAGE, TEXT, 16), batch_for(dual_encoder(IMAGE, TEXT, 16), batch, t)
    )
    assert forward == batch * (patches + layers + heads)
    assert (
        both == 3 * forward - batch * patches
    )  # backward: twice the work, but nobody asks for the pixels' gradient


def test_the_table_is_ordered_as_one_expects():
    rows = {(row["setting"], row["how"]): row for row in table(8, dual_encoder(IMAGE, TEXT, 16))}
    assert len(rows) == 3 * len(SETTINGS)
    both, heads = (rows[name, "float32"] for name in ("finetuned", "projection"))
    parameters = sum(p.numel() for p in dual_encoder(IMAGE, TEXT, 16).parameters())
    assert both["weights"] == heads["weights"] == pytest.approx(4e-9 * parameters)
    assert both["gradients"] == both["weights"] and both["moments"] == 2 * both["weights"]
    assert (
        heads["activations"]
        < rows["finetuned-image", "float32"]["activations"]
        < both["activations"]
    )
    for setting in SETTINGS:
        totals = [
            rows[setting, how]["total"]
            for how in ("float32", "mixed precision", "and checkpointing")
        ]
        assert setting == "projection" or totals[0] > totals[1] > totals[2]


def test_the_shapes_are_those_of_vit_b_16_and_bert_base():
    model = memory.dual_encoder()
    assert sum(p.numel() for p in model.image_tower.parameters()) == 85_798_656
    assert sum(p.numel() for p in model.text_tower.parameters()) == 108_891_648


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_count_is_near_the_peak_of_a_real_process():
    wide = {**SHAPE, "hidden_size": 128, "intermediate_size": 512}
    found = measured(
        ViTConfig(**wide, image_size=64, patch_size=8),
        BertConfig(**wide, vocab_size=100),
        (64, 320),
    )
    assert 0.7 < found["counted"] / found["measured"] < 1.3
