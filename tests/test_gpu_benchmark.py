"""The GPU's benchmark, on a CPU and towers small enough for it: every function runs, in each precision there is."""

import math

import pytest
import torch
from transformers import BertConfig, ViTConfig

from benchmarks import gpu
from scripts.readme_table import gpu_table

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_it_measures_extraction_and_an_epoch_in_each_precision(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_DEVICE", "cpu")
    pair = gpu.towers(ViTConfig(**SMALL, image_size=32, patch_size=8), BertConfig(**SMALL))
    before = [p.clone() for tower in pair for p in tower.parameters()]
    found = gpu.measure(pair, tmp_path / "coco", count=12, batch_size=4, precisions=["no", "bf16"])
    assert found["extraction"]["images"] == 12 and found["extraction"]["captions"] == 60
    rows = found["fine_tuning"]
    assert list(rows) == ["no", "bf16"] and rows["no"]["first_loss_off"] == 0
    assert 0 < rows["bf16"]["first_loss_off"] < 0.05, "another precision, the same loss"
    for row in rows.values():
        assert len(row["losses"]) == 3 and all(map(math.isfinite, row["losses"]))
        assert math.isclose(
            row["tflop_per_second"], row["images_per_second"] * found["tflop_per_pair"]
        )
    assert all(
        torch.equal(p, q) for p, q in zip(before, (p for tower in pair for p in tower.parameters()))
    )
    about = {
        "machine": {"gpu": "a card", "cpu": "a CPU", "cores": 2},
        "memory_gb": 15.8,
        "torch": "2.11",
    }
    assert "| bf16 |" in gpu_table({**about, **found}) and "a card, 16 GB" in gpu_table(
        {**about, **found}
    )


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CLIP_DEVICE", "cpu")
    monkeypatch.setattr(gpu, "RESULT", tmp_path / "gpu.json")
    gpu.main()
    assert (
        capsys.readouterr().out
        == "benchmarks.gpu measures an NVIDIA GPU, and PyTorch finds none here.\n"
    )
    assert not gpu.RESULT.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_precisions_on_a_gpu(tmp_path):
    pair = gpu.towers(ViTConfig(**SMALL, image_size=32, patch_size=8), BertConfig(**SMALL))
    precisions = [
        "no",
        "fp16",
        *(["bf16"] if torch.cuda.is_bf16_supported(including_emulation=False) else []),
    ]
    rows = gpu.measure(pair, tmp_path / "coco", count=12, batch_size=4, precisions=precisions)[
        "fine_tuning"
    ]
    assert all(row["first_loss_off"] < 0.05 and row["peak_gb"] > 0 for row in rows.values())
