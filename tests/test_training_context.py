"""What holds only while a model trains, and is undone afterwards."""

import pytest
import torch

from helpers import config
from helpers.config import best_precision
from helpers.training_context import some_patches, while_training
from tests.tiny import image_tower, whole


@pytest.mark.parametrize("has_bf16, best", [(True, "bf16"), (False, "fp16")])
def test_precision_follows_the_device(monkeypatch, has_bf16, best):
    monkeypatch.setattr(config, "pick_device", lambda: torch.device("cpu"))
    assert best_precision() == "no"
    monkeypatch.setattr(config, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert best_precision() == best


@pytest.mark.parametrize("image, text", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_only_what_has_a_rate_takes_gradients_and_all_is_undone(image, text):
    model = whole().eval()
    model.text_tower.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    words = [part.weight for part in model.modules() if isinstance(part, torch.nn.Embedding)]
    with while_training(model, image, text, gradient_checkpointing=True):
        assert model.training and all(p.requires_grad for p in model.image_head.parameters())
        assert len(words) == 3 and not any(weight.requires_grad for weight in words)
        for tower, rate in ((model.image_tower, image), (model.text_tower, text)):
            others = set(tower.parameters()).difference(words)
            assert {p.requires_grad for p in others} == {bool(rate)}
            drops = {part.p for part in tower.modules() if isinstance(part, torch.nn.Dropout)}
            assert drops <= {0.0} and model.image_head[3].p == 0.1
    assert [p.requires_grad for p in model.parameters()] == before and not model.training
    assert any(part.p for part in model.text_tower.modules() if isinstance(part, torch.nn.Dropout))
    assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_leaves_the_tower_whole():
    tower, pixels = image_tower(), torch.zeros(2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="inside"), some_patches(tower, 0.75):
        assert tower.model(pixels).last_hidden_state.shape[1] == 1 + 3
        raise RuntimeError("inside")
    assert tower.model(pixels).last_hidden_state.shape[1] == 1 + 4
