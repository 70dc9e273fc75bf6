"""The GPU's benchmark on small towers: on a CPU, and on a GPU in each precision there is."""

import math

from transformers import BertConfig, ViTConfig

from benchmarks import gpu
from scripts.readme_table import gpu_table
from tests.tiny import SMALL


def small_towers():
    image_config = ViTConfig(**SMALL, image_size=32, patch_size=8)
    return gpu.random_towers(image_config, BertConfig(**SMALL))


def test_it_measures_extraction_and_an_epoch_in_each_precision(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIP_DEVICE", "cpu")
    precisions = ["no", "bf16"]
    result = gpu.measure(small_towers(), tmp_path / "coco", 12, 4, precisions)
    assert result["extraction"]["images"] == 12 and result["extraction"]["captions"] == 60
    rows = result["fine_tuning"]
    assert list(rows) == precisions and rows["no"]["first_loss_off"] == 0
    assert 0 < rows["bf16"]["first_loss_off"] < 0.05, "another precision, the same loss"
    for row in rows.values():
        assert len(row["losses"]) == 3 and all(map(math.isfinite, row["losses"]))
        rate = row["images_per_second"] * result["tflop_per_pair"]
        assert math.isclose(row["tflop_per_second"], rate)
    head = {"machine": {"gpu": "a card", "cpu": "a CPU", "cores": 2}, "memory_gb": 15.8}
    table = gpu_table({**head, **result})
    assert "| bf16 |" in table and "a card, 16 GB" in table
