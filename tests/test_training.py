"""Training on cached embeddings: what it draws, what it moves, when it stops, what it leaves behind."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from helpers.losses import clip_loss
from helpers.model import CLIP, MAX_LOGIT_SCALE, head_state
from helpers.training import CaptionPicker, dev_metrics, parameter_groups, train_heads, warmup_cosine


def embeddings(n, seed, captions=3, first_id=0):
    """Images and captions that are noisy views of the same hidden vector; captions in no particular order."""
    views = torch.Generator().manual_seed(99)
    to_image, to_text = torch.randn(6, 10, generator=views), torch.randn(6, 14, generator=views)
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, 6, generator=generator)
    owner = torch.arange(n).repeat(captions)[torch.randperm(n * captions, generator=generator)]
    return SimpleNamespace(
        image_embeds=hidden @ to_image + 0.1 * torch.randn(n, 10, generator=generator),
        text_embeds=hidden[owner] @ to_text + 0.1 * torch.randn(len(owner), 14, generator=generator),
        owner=owner,
        image_ids=torch.arange(n) + first_id,
        captions=[f"caption {i}" for i in range(len(owner))],
    )


TRAIN, DEV = embeddings(96, seed=1), embeddings(40, seed=2, first_id=1000)


def fresh(seed=0):
    torch.manual_seed(seed)
    return CLIP(10, 14, embed_dim=16)


def fit(model, train=TRAIN, dev=DEV, **settings):
    return train_heads(model, train, dev, **{"epochs": 4, "batch_size": 32, **settings})


def without_time(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def test_one_caption_of_each_image_and_every_one_in_time():
    picker = CaptionPicker([1, 0, 1, 2, 1], images=3)
    for seed in range(20):
        picked = picker.random(np.random.default_rng(seed))
        assert [[1, 0, 1, 2, 1][caption] for caption in picked] == [0, 1, 2]
    assert {int(picker.random(np.random.default_rng(seed))[1]) for seed in range(50)} == {0, 2, 4}
    assert [picked.tolist() for picked in picker.each()] == [[1, 0, 3], [1, 2, 3], [1, 4, 3]]


def test_an_image_without_captions_is_named():
    with pytest.raises(ValueError, match="row 1 has no caption"):
        CaptionPicker([0, 2], images=3)


def test_training_teaches():
    model = fresh()
    before = dev_metrics(model, DEV)
    history = fit(model, epochs=30)
    after = dev_metrics(model, DEV)
    assert after["dev_loss"] < 0.5 * before["dev_loss"]
    assert after["dev_recall@1"] > 3 * before["dev_recall@1"] and after["dev_recall@5"] > 0.8
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_dev_loss_sees_every_caption_in_evaluation_mode():
    model = fresh().eval()
    with torch.no_grad():
        images, texts = model.project_image(DEV.image_embeds), model.project_text(DEV.text_embeds)
        by_image = np.argsort(DEV.owner.numpy(), kind="stable").reshape(40, 3)
        expected = [clip_loss(images, texts[by_image[:, r]], model.logit_scale).item() for r in range(3)]
        scores = (texts.double() @ images.double().T).numpy()
    metrics = dev_metrics(model.train(), DEV)
    assert metrics["dev_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    own = scores[np.arange(120), DEV.owner][:, None]
    assert metrics["dev_recall@5"] == pytest.approx(((scores >= own).sum(axis=1) <= 5).mean())
    assert model.training


def test_every_trained_parameter_is_in_one_group_and_moves():
    model = fresh()
    decayed, free = parameter_groups(model, 0.1)
    grouped = [*decayed["params"], *free["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    assert any(p is model.logit_scale for p in free["params"]) and free["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    before = head_state(model)
    fit(model, epochs=2)
    assert not any(tensor.equal(before[name]) for name, tensor in head_state(model).items())


def test_the_scale_stays_at_or_below_one_hundred():
    model = fresh()
    model.logit_scale.data.fill_(10.0)
    history = fit(model, epochs=2, lr=1e-6)
    assert all(row["logit_scale"] <= MAX_LOGIT_SCALE for row in history)
    assert model.logit_scale.item() <= MAX_LOGIT_SCALE


def test_the_same_seed_gives_the_same_numbers_whatever_the_callback_draws():
    first, second, other = fresh(), fresh(), fresh()
    seen = []

    def callback(row):
        seen.append(row)
        torch.rand(3), np.random.rand(3)

    history = fit(first, on_epoch=callback)
    assert seen == history and [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert without_time(history) == without_time(fit(second))
    assert all(tensor.equal(head_state(second)[name]) for name, tensor in head_state(first).items())
    assert without_time(history) != without_time(fit(other, seed=1))


def test_early_stopping_keeps_the_best_epoch():
    """With other images' captions at dev, learning only makes it worse: the first epochs are the best."""
    wrong = SimpleNamespace(**{**vars(DEV), "text_embeds": -DEV.text_embeds})
    model, states = fresh(), []
    history = fit(
        model, dev=wrong, epochs=40, patience=3, lr=1e-2, on_epoch=lambda row: states.append(head_state(model))
    )
    losses = [row["dev_loss"] for row in history]
    best = losses.index(min(losses))
    assert len(history) == best + 1 + 3 < 40
    assert all(tensor.equal(states[best][name]) for name, tensor in head_state(model).items())
    assert dev_metrics(model, wrong)["dev_loss"] == pytest.approx(min(losses))


def test_interrupting_leaves_the_best_weights():
    model, states = fresh(), []

    def stop(row):
        states.append(head_state(model))
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(model, on_epoch=stop)
    assert head_state(model)["logit_scale"] == states[1]["logit_scale"]


@pytest.mark.parametrize("mode", [True, False])
def test_modes_and_towers_are_left_as_they_were(mode):
    model = fresh().train(mode)
    model.image_tower = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    before = [part.training for part in model.modules()], model.image_tower[0].weight.clone()
    fit(model, epochs=1)
    assert [part.training for part in model.modules()] == before[0]
    assert model.image_tower[0].weight.equal(before[1]) and model.image_tower[0].weight.grad is None


def test_fewer_images_than_a_batch_and_half_precision_features():
    few = embeddings(8, seed=3)
    half = SimpleNamespace(
        **{**vars(few), "image_embeds": few.image_embeds.half(), "text_embeds": few.text_embeds.half()}
    )
    history = fit(fresh(), train=half, dev=half, batch_size=512, epochs=20)
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_loss_that_is_not_finite_stops_with_a_reason(split):
    broken = SimpleNamespace(**{**vars(TRAIN), "image_embeds": TRAIN.image_embeds * math.nan})
    model = fresh()
    before = head_state(model)
    with pytest.raises(FloatingPointError, match="epoch 1.*NaN in the embeddings"):
        fit(model, **{split: broken})
    assert all(tensor.equal(before[name]) for name, tensor in head_state(model).items())


def test_the_bar_is_one_line_on_stdout(capsys):
    fit(fresh())
    output = capsys.readouterr()
    assert "heads: 100%" in output.out and "dev" in output.out and output.out.count("\n") == 1
    assert output.err == ""


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(4, 20)(step) for step in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False)) and factors[20] == pytest.approx(0)
    assert warmup_cosine(2, 1)(0) == 0.5  # fewer steps than the warm-up wants
