"""What is chosen on machines that are made up, and whether the memory it plans with is the memory that is needed."""

import pytest
import torch
from transformers import BertConfig, ViTConfig

from helpers import training_context
from helpers.config import worker_threads
from helpers.training_context import (
    choose,
    memory_needed,
    some_patches,
    trained_parts,
    without_dropout,
)
from scripts import memory

T4 = {"gpu": "Tesla T4", "memory": 15_828_320_256, "bf16": False, "cores": 2}
A100 = {"gpu": "NVIDIA A100-SXM4-40GB", "memory": 42_297_786_368, "bf16": True, "cores": 12}
CPU = {"gpu": None, "memory": 0, "bf16": False, "cores": 2}


@pytest.fixture(scope="module")
def model():
    """ViT-B/16 and BERT-base with uninitialised weights."""
    return memory.dual_encoder()


def test_a_cpu_keeps_32_bits_and_whole_batches(model):
    settings, why = choose(CPU, 128, memory_needed(model))
    assert settings == {"precision": "no", "gradient_checkpointing": False}
    assert "No CUDA" in why and "batches of 128" in why and "2 threads" in why


def test_a_t4_takes_fp16_and_the_whole_batch(model):
    settings, why = choose(T4, 128, memory_needed(model, patches=0.5))
    assert settings == {"precision": "fp16", "gradient_checkpointing": False}
    assert all(
        part in why for part in ("Tesla T4, 16 GB", "no bf16", "128 pairs", "which fits", "2 cores")
    )


def test_an_a100_takes_bf16(model):
    settings, why = choose(A100, 128, memory_needed(model))
    assert settings == {"precision": "bf16", "gradient_checkpointing": False}
    assert all(
        part in why for part in ("A100", "42 GB", "bf16", "which fits", "6 threads", "12 cores")
    )


def test_a_small_card_computes_layers_again_and_a_tiny_one_says_so(model):
    needs = memory_needed(model, patches=0.5)
    small, tiny = ({**T4, "gpu": "a card", "memory": size * 10**9} for size in (8, 3))
    for card, said in (
        (small, "too much, so layers are computed again"),
        (tiny, "may be too much: tune one tower"),
    ):
        settings, why = choose(card, 128, needs)
        assert settings["gradient_checkpointing"] and said in why
    assert not choose(small, 8, needs)[0]["gradient_checkpointing"]


@pytest.mark.parametrize("cores, threads", [(1, 2), (2, 2), (12, 6), (96, 8)])
def test_threads_follow_the_cores(cores, threads):
    assert worker_threads(cores) == threads


def test_a_frozen_tower_needs_no_more_than_its_weights(model):
    both, image, text = (
        memory_needed(model),
        memory_needed(model, text=False),
        memory_needed(model, image=False),
    )
    assert both[1] == image[1] + text[1] and image[0] < both[0] > text[0]
    assert memory_needed(model, image=False, text=False)[1:] == (0, 0)


@pytest.mark.parametrize("tuned, share", [((1, 0), 1.0), ((1, 0), 0.5), ((0, 1), 1.0)])
def test_memory_planned_is_memory_counted(tuned, share):
    """Against every tensor that autograd keeps, at the true widths and four layers: 12 would only take longer."""
    small = memory.dual_encoder(ViTConfig(num_hidden_layers=4), BertConfig(num_hidden_layers=4))
    batches = [memory.batch_for(small, size, training_context.TOKENS) for size in (1, 2)]
    towers = small.image_tower, small.text_tower
    with trained_parts(small, *tuned), without_dropout(*towers), some_patches(towers[0], share):
        one, two = (memory.activation_bytes(small, batch, amp=True) for batch in batches)
    planned = memory_needed(small, *map(bool, tuned), patches=share)[1]
    assert 0.8 < planned / (two - one) < 1.25


def test_look_reads_the_card(monkeypatch):
    if not torch.cuda.is_available():
        assert training_context.look()["gpu"] is None and training_context.look()["cores"] >= 1
    monkeypatch.setattr(training_context, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(training_context, "machine", lambda: {"gpu": "Tesla T4", "cores": 2})
    card = type("Card", (), {"total_memory": T4["memory"]})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
    )
    assert training_context.look() == T4
