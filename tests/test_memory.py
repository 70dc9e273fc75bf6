"""What training needs, as notebook 04 counts it: by formulas, by hand, by a real process's peak."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BertConfig, ViTConfig

from helpers.config import ROOT
from tests.notebooks import code_cells

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 64}
IMAGE, TEXT = ViTConfig(**SHAPE, image_size=32, patch_size=8), BertConfig(**SHAPE, vocab_size=100)
# Mini's towers.
SMALL_IMAGE = {"image_size": 96, "patch_size": 8, "hidden_size": 128, "intermediate_size": 512}
SMALL_IMAGE |= {"num_hidden_layers": 6, "num_attention_heads": 4}
SMALL_TEXT = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}

NOTEBOOK = ROOT / "notebooks/04_full_finetuning.ipynb"
FIRST = "from torch._subclasses.fake_tensor", "def shapes_alone(", "def activation_bytes("
FIRST += "def flops(", "def train_last("
NAMES = {"torch": torch}
for cell in code_cells(NOTEBOOK):
    if cell.source.startswith(FIRST):
        exec(cell.source, NAMES)
shapes_alone, batch_for = NAMES["shapes_alone"], NAMES["batch_for"]
activation_bytes, flops = NAMES["activation_bytes"], NAMES["flops"]
train_last, cost_of = NAMES["train_last"], NAMES["cost_of"]


class Twice(nn.Module):
    def forward(self, x):
        y = x.exp()  # exp keeps its result, and so do both products
        return y * y + y * 2 * y


# A Linear keeps its input, and its weight, which does not count; y and 2y count once.
@pytest.mark.parametrize(
    "model, shape, numbers", [(nn.Linear(5, 3), (7, 5), 35), (Twice(), 10, 20)]
)
def test_what_autograd_keeps_counts_once_and_weights_do_not(model, shape, numbers):
    assert activation_bytes(model, torch.zeros(shape, requires_grad=True)) == 4 * numbers


def test_activations_grow_with_the_batch_alone_and_are_the_same_on_fake_tensors():
    counts = []
    for fake in (False, True):
        with FakeTensorMode() if fake else torch.enable_grad():
            model = shapes_alone(IMAGE, TEXT, 16)
            counts.append([activation_bytes(model, batch_for(model, n)) for n in (1, 2, 4)])
    (one, two, four), fakes = counts
    assert four - two == 2 * (two - one) > 0 and fakes == [one, two, four]


def test_flops_are_those_of_the_formula():
    d, n, t, batch = 32, 1 + (32 // 8) ** 2, 20, 3
    patches = 2 * (n - 1) * (3 * 8 * 8) * d
    # projections, attention, MLP
    layers = sum(3 * (8 * k * d**2 + 4 * k**2 * d + 4 * k * d * 64) for k in (n, t))
    heads = 2 * (2 * d * 16 + 2 * 16 * 16)
    with FakeTensorMode():
        model = shapes_alone(IMAGE, TEXT, 16)
        forward, both = flops(model, batch_for(model, batch, t))
    assert forward == batch * (patches + layers + heads)
    # Backward is twice the work, but the pixels need no gradient.
    assert both == 3 * forward - batch * patches


REAL = """
import sys
from helpers.losses import clip_loss
from tests.test_memory import SMALL_IMAGE, SMALL_TEXT, BertConfig, ViTConfig
from tests.test_memory import batch_for, shapes_alone

model = shapes_alone(ViTConfig(**SMALL_IMAGE), BertConfig(**SMALL_TEXT), 256).train()
for parameter in model.parameters():
    parameter.data.zero_()  # nothing has filled them
clip_loss(**model(batch_for(model, int(sys.argv[1])))).backward()
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_count_is_near_the_peak_of_a_real_process():
    command = [sys.executable, "-c", REAL]
    runs = [subprocess.run([*command, n], cwd=ROOT, capture_output=True) for n in ("16", "80")]
    peaks = [int(run.stdout) for run in runs]
    with FakeTensorMode():
        model = shapes_alone(ViTConfig(**SMALL_IMAGE), BertConfig(**SMALL_TEXT), 256)
        counts = [activation_bytes(model, batch_for(model, n)) for n in (16, 80)]
    assert 0.7 < (counts[1] - counts[0]) / (peaks[1] - peaks[0]) < 1.3


def test_a_block_that_is_not_trained_keeps_no_activations_and_has_no_backward_pass():
    bytes_, work = [], []
    with FakeTensorMode():
        model = shapes_alone(IMAGE, TEXT, 16)
        for blocks in range(4):
            for tower in (model.image_tower, model.text_tower):
                train_last(tower, blocks)
            bytes_.append(cost_of(model)["activations"])
            work.append(flops(model, batch_for(model, 1))[1])
            model.zero_grad()
    assert bytes_[0] < bytes_[1] and work[0] < work[1]
    for counts in (bytes_, work):
        assert counts[3] - counts[2] == pytest.approx(counts[2] - counts[1])
