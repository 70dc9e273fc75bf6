"""Training: what it draws, what it moves, when it stops, what it leaves behind."""

import copy
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import training, training_context
from helpers.config import ROOT, get_profile
from helpers.data import CaptionedImages
from helpers.encoders import load_text_tower
from helpers.features import Embeddings, extract_embeddings
from helpers.losses import clip_loss, siglip_loss
from helpers.model import CLIP, MAX_LOGIT_SCALE, SIGLIP_START, head_state, load_model
from helpers.training import Examples, dev_metrics, parameter_groups, warmup_cosine
from scripts import train
from tests.tiny import image_tower, text_tower, whole, write_dataset


def embeddings(n, seed, captions=3, first_id=0):
    """Images and captions as noisy views of one hidden vector; captions in no order."""
    views = torch.Generator().manual_seed(99)
    to_image, to_text = torch.randn(6, 10, generator=views), torch.randn(6, 14, generator=views)
    generator = torch.Generator().manual_seed(seed)

    def noisy(views):
        return views + 0.1 * torch.randn(views.shape, generator=generator)

    hidden = torch.randn(n, 6, generator=generator)
    owner = torch.arange(n).repeat(captions)[torch.randperm(n * captions, generator=generator)]
    images, texts = noisy(hidden @ to_image), noisy(hidden[owner] @ to_text)
    names = [f"caption {i}" for i in range(len(owner))]
    return Embeddings(images, texts, owner, torch.arange(n) + first_id, names)


TRAIN, DEV = embeddings(96, seed=1), embeddings(40, seed=2, first_id=1000)


def fresh(**start):
    torch.manual_seed(0)
    return CLIP(10, 14, embed_dim=16, **start)


def fit(model, train=TRAIN, dev=DEV, **settings):
    return training.fit(model, train, dev, **{"epochs": 4, "batch_size": 32, **settings})


def without_time(history):
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in history]


def same(model, state):
    return all(tensor.equal(state[name]) for name, tensor in head_state(model).items())


def other(embeds, **changes):
    return Embeddings(**{**vars(embeds), **changes})


@pytest.mark.parametrize("start", [{}, SIGLIP_START])
def test_training_teaches_and_every_parameter_moves(start):
    model = fresh(**start)
    before, weights = dev_metrics(model, Examples(embeds=DEV)), head_state(model)
    history = fit(model, epochs=60)
    after = dev_metrics(model, Examples(embeds=DEV))
    assert after["dev_loss"] < 0.5 * before["dev_loss"]
    assert after["dev_recall@1"] > 3 * before["dev_recall@1"] and after["dev_recall@5"] > 0.8
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert start.keys() <= history[-1].keys()
    assert not any(tensor.equal(weights[name]) for name, tensor in head_state(model).items())


@pytest.mark.parametrize("loss, start", [(clip_loss, {}), (siglip_loss, SIGLIP_START)])
def test_dev_metrics_by_hand_over_all_captions_in_evaluation_mode(loss, start):
    model = fresh(**start).eval()
    with torch.no_grad():
        images, texts = model.project_image(DEV.image_embeds), model.project_text(DEV.text_embeds)
        by_image = np.argsort(DEV.owner.numpy(), kind="stable").reshape(40, 3)
        captions = [texts[by_image[:, r]] for r in range(3)]
        expected = [loss(images, caption, **model.logits()).item() for caption in captions]
        scores = (texts.double() @ images.double().T).numpy()
    metrics = dev_metrics(model.train(), Examples(embeds=DEV))
    assert metrics["dev_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    own = scores[np.arange(120), DEV.owner][:, None]
    assert metrics["dev_recall@5"] == pytest.approx(((scores >= own).sum(axis=1) <= 5).mean())
    assert model.training


def test_the_scale_stays_at_or_below_one_hundred():
    model = fresh()
    model.logit_scale.data.fill_(10.0)
    fit(model, epochs=2, lr=1e-6)
    assert model.logit_scale.item() <= MAX_LOGIT_SCALE


def test_the_same_seed_gives_the_same_numbers_whatever_the_callback_draws():
    first, second, seen = fresh(), fresh(), []

    def callback(row):
        seen.append(row)
        torch.rand(3), np.random.rand(3)

    history = fit(first, on_row=callback)
    assert seen == history and [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert without_time(history) == without_time(fit(second))
    assert same(first, head_state(second))
    assert without_time(history) != without_time(fit(fresh(), seed=1))


@pytest.mark.parametrize("looks", [1, 3])
def test_early_stopping_keeps_the_best_weights(looks):
    """With false captions at dev, learning makes it worse: the first weights are the best."""
    wrong = other(DEV, text_embeds=-DEV.text_embeds)
    model, states = fresh(), []
    settings = {"epochs": 40, "patience": 3, "lr": 1e-2, "dev_per_epoch": looks}
    history = fit(model, dev=wrong, on_row=lambda _: states.append(head_state(model)), **settings)
    losses = [row["dev_loss"] for row in history]
    best = losses.index(min(losses))
    assert len(history) == best + 1 + 3 * looks < 40
    assert same(model, states[best]) and (looks == 1 or same(model, head_state(fresh())))
    assert dev_metrics(model, Examples(embeds=wrong))["dev_loss"] == pytest.approx(min(losses))


def test_dev_is_looked_at_within_an_epoch_and_before_the_first_step():
    runs = [fit(fresh(), epochs=2, batch_size=16, dev_per_epoch=looks) for looks in (1, 3)]
    plain, history = map(without_time, runs)
    assert [row["step"] for row in history] == [0, 2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in history] == [step / 6 for step in range(0, 13, 2)]
    assert history[0]["losses"] == [] and history[0]["train_loss"] is None
    assert dev_metrics(fresh(), Examples(embeds=DEV)).items() <= history[0].items()
    for row, parts in zip(plain, (history[1:4], history[4:]), strict=True):
        losses = [loss for part in parts for loss in part["losses"]]
        assert {**parts[-1], "losses": losses, "train_loss": row["train_loss"]} == row


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_loss_that_is_not_finite_stops_with_a_reason(split):
    whole = {"train": TRAIN, "dev": DEV}[split]
    broken = other(whole, image_embeds=whole.image_embeds * math.nan)
    model, before = fresh(), head_state(fresh())
    with pytest.raises(FloatingPointError, match="nan in step .*images [0-9, ]+….*NaN in the feat"):
        fit(model, **{split: broken})
    assert same(model, before)


def test_the_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert (np.diff(factors[4:]) < 0).all() and factors[20] == pytest.approx(0)
    assert warmup_cosine(0, 2, 1) == 0.5  # fewer steps than the warm-up wants
    assert warmup_cosine(0, 0.2, 4) == 1  # never above the peak, however short the warm-up


# SigLIP, gradient caching


@pytest.mark.parametrize("start", [{}, SIGLIP_START])
def test_gradient_caching_changes_nothing_but_memory(start):
    """In chunks, dropout draws other units: so without dropout, up to rounding."""
    losses = []
    for chunk in (None, 5):
        model = fresh(**start)
        model.image_head[3].p = model.text_head[3].p = 0.0
        history = fit(model, epochs=3, grad_cache_chunk=chunk)
        losses.append([row["train_loss"] for row in history])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


# Fine-tuning, on tiny towers and images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuning")
    write_dataset(folder / "coco", images=12)
    return CaptionedImages(folder / "coco", "val2017")


def tune(model, images, **settings):
    """One epoch over 12 images, both towers unless it is said otherwise."""
    examples = images if isinstance(images, Examples) else Examples(images)
    rates = {"image_lr": 1e-3, "text_lr": 1e-3, "epochs": 1, "batch_size": 4}
    return fit(model, examples, examples, **{**rates, **settings})


@pytest.mark.parametrize("image, text", [(True, False), (False, True), (True, True)])
def test_what_is_tuned_moves_and_what_is_locked_does_not(images, image, text):
    model = whole()
    model.text_tower.model.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    history = tune(model, images, epochs=2, image_lr=1e-3 * image, text_lr=1e-3 * text)
    after = model.state_dict().items()
    moved = {name.split(".")[0] for name, tensor in after if not tensor.equal(before[name])}
    towers = {name for name, tuned in (("image_tower", image), ("text_tower", text)) if tuned}
    assert moved == {"image_head", "text_head", "logit_scale", *towers}
    assert [len(row["losses"]) for row in history] == [3, 3] and history[-1]["step"] == 6
    assert all(p.requires_grad for p in model.parameters())
    assert model.training and not model.text_tower.model.training


def test_no_decay_on_biases_norms_and_scalars_and_no_step_for_word_vectors():
    model = whole(**SIGLIP_START)
    groups = parameter_groups(model, 1e-3, 3e-4, 1e-4, weight_decay=0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    rates = {"image_tower": 3e-4, "text_tower": 1e-4}
    assert len(of) == sum(len(group["params"]) for group in groups)
    words = {f"text_tower.model.embeddings.{n}_embeddings.weight"
             for n in ("word", "position", "token_type")}  # fmt: skip
    for name, p in model.named_parameters():
        if name in words:
            assert id(p) not in of
            continue
        free = p.ndim <= 1 or "embeddings" in name and "projection" not in name
        assert of[id(p)]["weight_decay"] == (0.0 if free else 0.1), name
        assert of[id(p)]["lr"] == rates.get(name.split(".")[0], 1e-3), name
    assert len(of) == len(list(model.parameters())) - len(words)


def test_a_locked_tower_may_come_as_features(images, tmp_path):
    """LiT two ways: text features from the cache, or captions anew, give the same losses."""
    features = extract_embeddings(image_tower(), text_tower(), images, tmp_path, progress=False)
    losses = []
    for embeds in (None, features):
        history = tune(whole(), Examples(images, embeds), epochs=2, text_lr=0.0)
        losses.append([loss for row in history for loss in row["losses"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_half_of_the_patches_and_others_each_time(images):
    model, outputs = whole(), []
    tower = model.image_tower
    pixels = tower.normalise(torch.stack([tower.preprocess(images.image(i)) for i in range(3)]))
    embedded = tower.model.embeddings(pixels)
    with training_context.some_patches(tower, 0.5):
        tower.model.embeddings.register_forward_hook(lambda part, _, out: outputs.append(out))
        for seed in (1, 2, 1):
            torch.manual_seed(seed)
            tower(pixels)
    assert [out.shape for out in outputs] == 3 * [(3, 1 + 2, 16)]  # CLS and two patches of four
    for row, whole_row in zip(outputs[0], embedded, strict=True):
        assert row[0].equal(whole_row[0])
        assert all(any(token.equal(patch) for patch in whole_row[1:]) for token in row[1:])
    assert outputs[0].equal(outputs[2]) and not outputs[0].equal(outputs[1])


def watched():
    """A model, and how many tokens an image has each time that its first layer reads some."""
    model, tokens = whole(), []
    norm = next(part for part in model.image_tower.modules() if isinstance(part, nn.LayerNorm))

    def count(part, inputs):
        if part.training:
            tokens.append(inputs[0].shape[1])

    norm.register_forward_pre_hook(count)
    return model, tokens


@pytest.mark.parametrize("unmasked, whole_steps", [(0.0, 0), (0.34, 2), (0.5, 3), (1.0, 6)])
def test_the_last_steps_and_dev_see_all_of_the_patches(images, unmasked, whole_steps):
    model, tokens = watched()
    history = tune(model, images, epochs=2, patch_keep_ratio=0.5, unmasked=unmasked)
    assert tokens == [3] * (6 - whole_steps) + [5] * whole_steps  # CLS and two or four patches
    metrics = dev_metrics(model, Examples(images), ["image", "text"])
    assert metrics["dev_loss"] == pytest.approx(min(row["dev_loss"] for row in history))


def test_gradient_checkpointing_computes_twice_and_gives_the_same_losses(images):
    runs = []
    for times in (1, 2):
        model, tokens = watched()
        runs.append(tune(model, images, gradient_checkpointing=times == 2)[0]["losses"])
        assert tokens == 3 * times * [5]
        for part in copy.deepcopy(model).modules():
            assert part.forward.__self__ is part and part.forward.__func__ is type(part).forward
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


# Stopping and going on


@pytest.mark.parametrize("when, done, looks", [(4, 1, 1), (5, 2, 1), (4, 4, 2)])
def test_ctrl_c_ends_the_step_saves_and_returns(tmp_path, capsys, monkeypatch, when, done, looks):
    """In the second of four epochs of three steps: between two looks at dev, or just before one."""
    saved, settings = when + 1, {"dev_per_epoch": looks}
    undisturbed, model, real = fit(fresh(), **settings), fresh(), training.take_step
    calls, handler = iter(range(100)), signal.getsignal(signal.SIGINT)

    def step(*args):
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(training, "take_step", step)
    history = fit(model, checkpoints=tmp_path, **settings)
    assert history.interrupted and not undisturbed.interrupted
    assert without_time(history) == without_time(undisturbed)[:done]
    output = capsys.readouterr().out
    assert f"Stopped after step {saved} of 12" in output and f"step-0000000{saved}" in output
    assert signal.getsignal(signal.SIGINT) is handler
    best = min(row["dev_loss"] for row in history)
    assert dev_metrics(model, Examples(embeds=DEV))["dev_loss"] == pytest.approx(best)
    resumed = fit(fresh(), checkpoints=tmp_path, **settings)
    assert without_time(resumed) == without_time(undisturbed)


def test_a_second_ctrl_c_interrupts_at_once_and_leaves_the_best_weights(monkeypatch):
    model, before = fresh(), head_state(fresh())

    def step(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("never reached")

    monkeypatch.setattr(training, "take_step", step)
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    assert same(model, before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 1}, "batch_size is 1"),
        ({"train": embeddings(1, seed=1)}, "batch_size is 32, of 1 images"),
        ({"image_lr": 1e-4}, "image_lr is 0.0001, but train holds cached features alone"),
    ],
)
def test_settings_that_cannot_be_are_named_before_anything_is_trained(settings, message):
    model, before = fresh(), head_state(fresh())
    with pytest.raises(ValueError, match=message):
        fit(model, **settings)
    assert same(model, before)


def test_a_callback_may_end_the_training():
    history = fit(fresh(), epochs=9, on_row=lambda row: row["epoch"] == 2)
    assert without_time(history) == without_time(fit(fresh(), epochs=9))[:2]


def test_the_command_line_runs_on_two_processes(tmp_path):
    """accelerate launch, two real CPU processes: heads, then the image tower, SigLIP's ring."""
    # `--cpu --num_processes 2` would start one process; without a GPU, --multi_gpu starts two.
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    script = "-m scripts.train --profile smoke --loss siglip --tune image --seed 3 --alpha 0.25"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("CLIP_PROFILE", None)
    command = [sys.executable, *launch.split(), *script.split(), "--output", str(tmp_path)]
    options = {"cwd": ROOT, "env": env, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads(max((tmp_path / "towers").glob("step-*/state.json")).read_text())
    assert state["settings"]["processes"] == 2 and state["settings"]["loss"] == "siglip"
    histories = json.loads((tmp_path / "history.json").read_text())
    losses = [x for part in histories.values() for row in part for x in row["losses"]]
    assert losses and all(math.isfinite(x) for x in losses)
    text = load_text_tower(get_profile("smoke"))
    models = [load_model(tmp_path / name, text_tower=text) for name in ("model", "tuned")]
    (model, meta), (tuned, _) = models
    assert meta["tuned"] == ["image_tower"] and model.logit_bias is not None
    (best,) = (tmp_path / "heads").glob("best-*")
    before, averaged = load_file(best), head_state(model)
    assert meta["alpha"] == 0.25
    for name, end in head_state(tuned).items():
        torch.testing.assert_close(averaged[name], 0.75 * before[name] + 0.25 * end)


def test_checkpoints_of_other_features_are_refused(tmp_path):
    fit(fresh(), epochs=1, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="written with data = "):
        fit(fresh(), train=embeddings(96, seed=9), epochs=1, checkpoints=tmp_path)


def test_the_command_line_ends_where_it_was_interrupted(tmp_path, monkeypatch):
    history = training.History([], interrupted=True)
    monkeypatch.setattr(train, "fit", lambda *args, **settings: history)
    monkeypatch.setattr(train, "load_examples", lambda *args: (TRAIN, DEV))
    with pytest.raises(SystemExit):
        train.main(["--profile", "smoke", "--output", str(tmp_path)])
    assert not (tmp_path / "model").exists()
