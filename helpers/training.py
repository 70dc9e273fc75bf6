"""One fit() for both schemes: heads on cached features, and fine-tuning with gradients into towers.

What a step sees is a pure function of (seed, epoch, image id), and what it draws at random of
(seed, step). So a run that was killed goes on as if it had not been, and two runs with one seed see
the same captions and images in the same order.
"""

import hashlib
import math
import sys
import time
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from tqdm import tqdm

from helpers.config import best_precision, pick_device
from helpers.data import Examples, splitmix64
from helpers.distributed import cached_backward, contrastive_loss
from helpers.evaluation import ranks
from helpers.features import embed_images, embed_texts
from helpers.model import MAX_LOGIT_SCALE, evaluating
from helpers.storage.checkpoints import Checkpoints
from helpers.training_context import interruptible, some_patches, while_training

BETAS = (0.9, 0.98)  # of AdamW
MAX_GRAD_NORM = 1.0
DROPOUT = 4  # what a hash decides, beside those in data.py
NOT_SETTINGS = ("model", "train", "dev", "checkpoints", "save_every", "on_row")


class History(list):
    """The rows of all looks at dev; interrupted: whether Ctrl-C ended the training."""

    def __init__(self, rows, interrupted=False):
        super().__init__(rows)
        self.interrupted = interrupted


def parameter_groups(model, lr, image_lr=0.0, text_lr=0.0, weight_decay=0.1):
    """Everything that is trained, for AdamW: each part with its rate, decay on matrices alone.

    No decay on biases, norms, logit_scale and logit_bias. Left out: towers with a rate of 0, and
    word vectors, of which captions use few.

    Taught in notebook 04, "One rate for each part".
    """
    word_vectors = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    rates = {"image_tower": image_lr, "text_tower": text_lr}
    groups = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(name.split(".")[0], lr)
        if rate and id(parameter) not in word_vectors:
            # 2 dimensions: a Linear's matrix; 4: the convolution that embeds the patches.
            decay = weight_decay if parameter.ndim in (2, 4) else 0.0
            group = {"params": [], "lr": rate, "peak": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), group)["params"].append(parameter)
    return list(groups.values())


def warmup_cosine(step, warmup, total):
    """Learning-rate factor at a step, counted from 0: linear to 1, then half a cosine to 0.

    warmup: steps until 1; total: steps until 0. Taught in notebook 04, "A schedule".
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def dev_metrics(model, dev, raw=()):
    """Loss and text→image recall on the dev split, in evaluation mode.

    dev: Examples; raw: the sides, of "image" and "text", that go through their tower anew. The loss
    is that of training, one caption an image, averaged over all captions; its batch is the split.
    Taught in notebook 04, "The dev split, in evaluation mode".
    """
    device = model.logit_scale.device
    if "image" in raw:
        image_features = embed_images(model.image_tower, dev.images)  # [N, D]
    else:
        image_features = dev.embeds.image_embeds
    if "text" in raw:
        text_features = embed_texts(model.text_tower, dev.images.all_captions()[0])  # [M, D]
    else:
        text_features = dev.embeds.text_embeds
    with evaluating(model):
        image_embeds = model.project_image(image_features.to(device, torch.float32))
        text_embeds = model.project_text(text_features.to(device, torch.float32))
        losses = []
        for r in range(dev.counts.max()):  # an image with fewer captions starts over
            captions = text_embeds[dev.rows[dev.starts + r % dev.counts]]  # [N, E]
            losses.append(contrastive_loss(image_embeds, captions, **model.logits()))
        rank = ranks(text_embeds, image_embeds, dev.owner, torch.arange(len(dev)))[:, 0]  # [M]
    recall = {f"dev_recall@{k}": (rank <= k).double().mean().item() for k in (1, 5)}
    return {"dev_loss": sum(loss.item() for loss in losses) / len(losses), **recall}


def take_step(run, model, optimizer, batch, factor=1.0, patch_keep_ratio=1.0, chunk=None):
    """One batch: loss, gradient, clipping, step, clamp. Returns the loss, averaged over processes.

    run: the Accelerator that has prepared model and optimizer; factor: share of the peak rates;
    chunk: rows whose activations are held at once. Taught in notebook 04, "The step in full".
    """
    clip = run.unwrap_model(model)
    batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}
    loss_of = partial(contrastive_loss, image_ids=batch["image_ids"], processes=run.num_processes)
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
    with some_patches(clip.image_tower, patch_keep_ratio):
        if chunk:
            loss = cached_backward(model, batch, loss_of, chunk, backward=run.backward)
        else:
            loss = loss_of(**model(batch))
            run.backward(loss)
    run.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return run.reduce(loss.detach(), "mean").item()


def fit(model, train, dev, *, epochs, batch_size=512, lr=1e-3, image_lr=0.0, text_lr=0.0,
        warmup=0.05, patch_keep_ratio=1.0, unmasked=0.0, grad_cache_chunk=None, precision=None,
        gradient_checkpointing=False, dev_per_epoch=1, select="dev_loss", patience=None, seed=0,
        checkpoints=None, save_every=None, on_row=None):  # fmt: skip
    """Train a CLIP with the loss it was made for; it ends with the weights that are best on dev.

    train, dev: Examples, or Embeddings where both towers stay frozen. batch_size: images that one
    loss compares, over all processes. lr, image_lr, text_lr: peak rates of heads and towers (0
    freezes a tower); they rise over the share `warmup` of all steps and fall along a cosine.
    patch_keep_ratio: share of an image's patches that a step sees; unmasked: share of all steps, at
    the end, that see every patch. grad_cache_chunk: rows whose activations are held at once.
    precision: "no", "bf16", "fp16", or None for the device's best. dev_per_epoch: looks at dev an
    epoch; above 1 there is one before the first step too. select: "dev_loss" or "dev_recall@1",
    which decides between all looks; patience: epochs without a better one before the end.
    checkpoints: a folder, written after each look and every `save_every` steps; a run that finds
    its own there goes on from it. on_row(row), called after each look, may return True to end the
    training.

    Returns a History, a row a look: epoch (passes over train so far, a float within one), step,
    train_loss (None before the first step), dev_loss, dev_recall@1, dev_recall@5, logit_scale (the
    logarithm), logit_bias; since the last look: losses, images_per_second (by the median step),
    seconds. Ctrl-C ends the step, writes a checkpoint and returns what is finished. ValueError for
    settings that cannot be; FloatingPointError names step and images of a loss that is not finite.
    Taught in notebook 04, "fit, the whole of it".
    """
    settings = {name: value for name, value in locals().items() if name not in NOT_SETTINGS}
    train, dev = (x if isinstance(x, Examples) else Examples(embeds=x) for x in (train, dev))
    run, raw = prepare_run(model, train, settings)
    batch_size = min(batch_size, len(train))
    epoch_steps = len(train) // batch_size  # the last, incomplete batch is left out
    total = epochs * epoch_steps
    looks = dev_steps(epochs, epoch_steps, dev_per_epoch)
    part = (run.process_index, run.num_processes)
    with while_training(model, image_lr, text_lr, gradient_checkpointing), interruptible() as stop:
        groups = parameter_groups(model, lr, image_lr, text_lr)
        optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=run.device.type != "mps")
        saved = Checkpoints(checkpoints, model, optimizer, run, settings)
        state = saved.resume()  # step, history, best; losses and times since the last look at dev
        prepared = run.prepare(model, optimizer)  # for several processes, and precision
        bar = tqdm(total=total, initial=state["step"], desc="training", unit="step",
                   file=sys.stdout, disable=not run.is_main_process)  # fmt: skip
        try:
            while not (stop.is_set() or is_over(state, looks, patience, epoch_steps)):
                look = looks[len(state["history"])]
                epoch, done = divmod(state["step"], epoch_steps)
                left = range(done, done + look - state["step"])  # fewer, resumed between two looks
                clock = time.perf_counter()
                for batch in train.batches(model, raw, seed, epoch + 1, batch_size, left, part):
                    torch.manual_seed(dropout_seed(seed, state["step"], run.process_index))
                    factor = warmup_cosine(state["step"], warmup * total, total)
                    keep = patch_keep_ratio if total - state["step"] > unmasked * total else 1.0
                    loss = take_step(run, *prepared, batch, factor, keep, grad_cache_chunk)
                    require_finite(loss, state["step"], batch["image_ids"], saved)
                    state["step"] += 1
                    state["losses"].append(loss)
                    state["times"].append(time.perf_counter() - clock)
                    clock = time.perf_counter()
                    bar.set_postfix_str(f"epoch {epoch + 1}, loss {loss:.3f}", refresh=False)
                    bar.update()
                    if stop.is_set() or save_every and state["step"] % save_every == 0:
                        saved.save(state)
                    if stop.is_set() and state["step"] < look:
                        break  # what is done since the last look at dev is in the checkpoint
                else:
                    metrics = dev_metrics(model, dev, raw)
                    row = dev_row(model, metrics, state, batch_size, epoch_steps, clock)
                    require_finite(row["dev_loss"], state["step"], dev.image_ids, saved)
                    if state["best"] is None or is_better(row, state, select):
                        state["best"] = len(state["history"]) + 1
                        saved.save_best(state["best"])
                    state |= {"losses": [], "times": [], "history": [*state["history"], row]}
                    saved.save(state)
                    if on_row is not None and on_row(row):
                        break
        finally:
            bar.close()
            run.unwrap_model(prepared[0], keep_fp32_wrapper=False)
            model.load_state_dict(saved.best_weights, strict=False)
    if stop.is_set():
        run.print(f"Stopped after step {state['step']} of {total}. {saved.how_to_resume()}")
    return History(state["history"], interrupted=stop.is_set())


def prepare_run(model, train, settings):
    """The Accelerator of a fit, and the sides of `train` that are read raw, of "image" and "text".

    Moves the model to the device and adds to `settings` what the checkpoints of a run must also
    agree on. ValueError, naming the argument, for settings that cannot be.
    """
    if min(settings["batch_size"], len(train)) < 2:
        sizes = f"{settings['batch_size']}, of {len(train)} images"
        raise ValueError(f"batch_size is {sizes}: a contrastive loss compares 2 or more")
    raw = [s for s in ("image", "text") if settings[f"{s}_lr"] or train.embeds is None]
    if raw and train.images is None:
        lr, fix = f"{raw[0]}_lr", "leave it at 0, or give Examples with images"
        raise ValueError(f"{lr} is {settings[lr]}, but train holds cached features alone: {fix}")
    AcceleratorState._reset_state()  # else an earlier fit's precision would have to stay
    precision = settings["precision"] or best_precision()
    run = Accelerator(cpu=pick_device().type == "cpu", mixed_precision=precision)
    settings["loss"] = "clip" if model.logit_bias is None else "siglip"
    digest = hashlib.sha256(train.image_ids.tobytes() + train.owner.tobytes())
    if train.embeds is not None:
        for features in (train.embeds.image_embeds, train.embeds.text_embeds):
            digest.update(np.ascontiguousarray(features))  # as they lie: COCO's take 2 GB
    settings |= {"precision": precision, "processes": run.num_processes, "data": digest.hexdigest()}
    model.to(run.device)
    return run, raw


def dropout_seed(seed, step, process):
    """What seeds the heads' dropout, and the choice of patches, in one step of one process."""
    return int(splitmix64(DROPOUT, seed, step, process)[0] >> np.uint64(1))


def dev_steps(epochs, epoch_steps, dev_per_epoch):
    """The steps after which `fit` looks at dev: the last of each epoch, and others in between."""
    looks = range(0 if dev_per_epoch > 1 else 1, epochs * dev_per_epoch + 1)
    return sorted({look * epoch_steps // dev_per_epoch for look in looks})


def dev_row(model, metrics, state, batch_size, epoch_steps, clock):
    """What `fit` reports of the steps since the last look at dev, and of dev itself.

    metrics: those on dev; clock: when the last step ended.
    """
    step, losses, times = state["step"], state["losses"], state["times"]
    train_loss = sum(losses) / len(losses) if losses else None
    speed = batch_size / float(np.median(times)) if times else None
    row = {"epoch": step / epoch_steps if step % epoch_steps else step // epoch_steps, "step": step}
    row |= {"train_loss": train_loss, **metrics}
    row |= {name: parameter.item() for name, parameter in model.logits().items()}
    row |= {"losses": losses, "images_per_second": speed}
    return row | {"seconds": sum(times) + time.perf_counter() - clock}


def is_better(row, state, select):
    """Whether a row is better on dev than the best so far."""
    best = state["history"][state["best"] - 1]
    return row[select] < best[select] if select == "dev_loss" else row[select] > best[select]


def is_over(state, looks, patience, epoch_steps):
    """Whether dev was looked at for the last time, or `patience` epochs ago for the better."""
    rows = state["history"]
    waited = rows[-1]["step"] - rows[state["best"] - 1]["step"] if rows else 0
    return len(rows) == len(looks) or patience is not None and waited >= patience * epoch_steps


def require_finite(loss, step, image_ids, saved):
    """FloatingPointError, with step and images, where a loss is not finite."""
    if not math.isfinite(loss):
        where = f"in step {step}, on the images {', '.join(map(str, image_ids[:8].tolist()))} …"
        fix = "lower the learning rates, or look for NaN in the features"
        raise FloatingPointError(f"the loss is {loss} {where}: {fix}. {saved.how_to_resume()}")
