"""One fit() for both schemes: heads on cached features, and fine-tuning with gradients into towers.

What a step sees is a pure function of (seed, epoch, image id), and what it draws at random of
(seed, step). So a run that was killed goes on as if it had not been, and two runs with one seed see
the same captions and images in the same order.
"""

from __future__ import annotations

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
SELECT = ("dev_loss", "dev_recall@1", "dev_recall@5")
NOT_SETTINGS = ("model", "train", "dev", "checkpoints", "save_every", "on_epoch")


class History(list):
    """The rows of the finished epochs; interrupted: whether Ctrl-C ended the training."""

    def __init__(self, rows, interrupted=False):
        super().__init__(rows)
        self.interrupted = interrupted


def parameter_groups(model, lr, image_lr=0.0, text_lr=0.0, weight_decay=0.1):
    """Everything that is trained, for AdamW: each part with its rate, decay on matrices alone.

    No decay on biases, norms, embeddings, logit_scale and logit_bias. Towers with a rate of 0 are
    left out. Taught in notebook 04, "One rate for each part".
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    rates = {"image_tower": image_lr, "text_tower": text_lr}
    groups = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(name.split(".")[0], lr)
        # 2 dimensions: a Linear's matrix; 4: the convolution that embeds the patches.
        is_matrix = parameter.ndim in (2, 4) and id(parameter) not in embeddings
        if rate:
            decay = weight_decay if is_matrix else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


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
            ids = torch.as_tensor(dev.image_ids)
            losses.append(contrastive_loss(image_embeds, captions, **model.logits(), image_ids=ids))
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
        warmup=0.05, patch_keep_ratio=1.0, grad_cache_chunk=None, precision=None,
        gradient_checkpointing=False, select="dev_loss", patience=None, seed=0,
        checkpoints=None, save_every=None, on_epoch=None):  # fmt: skip
    """Train a CLIP with the loss it was made for; it ends with the weights that are best on dev.

    train, dev: Examples, or Embeddings where both towers stay frozen. batch_size: images that one
    loss compares, over all processes. lr, image_lr, text_lr: peak rates of heads and towers (0
    freezes a tower); they rise over the share `warmup` of all steps and fall along a cosine.
    patch_keep_ratio: share of an image's patches that a step sees. grad_cache_chunk: rows whose
    activations are held at once. precision: "no", "bf16", "fp16", or None for the device's best.
    select: "dev_loss", "dev_recall@1" or "dev_recall@5"; patience: epochs without a better one
    before the end. checkpoints: a folder, written after each epoch and every `save_every` steps; a
    run that finds its own there goes on from it. on_epoch(row) may return True to end the training.

    Returns a History of rows: epoch, step, train_loss, dev_loss, dev_recall@1, dev_recall@5,
    logit_scale (the logarithm), logit_bias, losses, images_per_second (by the median step),
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
    part = (run.process_index, run.num_processes)
    with while_training(model, image_lr, text_lr, gradient_checkpointing), interruptible() as stop:
        groups = parameter_groups(model, lr, image_lr, text_lr)
        optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=run.device.type != "mps")
        saved = Checkpoints(checkpoints, model, optimizer, run, settings)
        state = saved.resume()  # step, history, best; losses and times of the epoch's steps so far
        best_weights = saved.best(state) or saved.trainable()
        prepared = run.prepare(model, optimizer)  # for several processes, and precision
        bar = tqdm(total=total, initial=state["step"], desc="training", unit="step",
                   file=sys.stdout, disable=not run.is_main_process)  # fmt: skip
        try:
            while not (stop.is_set() or is_over(state, total, patience)):
                epoch = len(state["history"]) + 1
                left = range(len(state["losses"]), epoch_steps)  # fewer, resumed within an epoch
                clock = time.perf_counter()
                for batch in train.batches(model, raw, seed, epoch, batch_size, left, part):
                    torch.manual_seed(dropout_seed(seed, state["step"], run.process_index))
                    factor = warmup_cosine(state["step"], warmup * total, total)
                    loss = take_step(
                        run, *prepared, batch, factor, patch_keep_ratio, grad_cache_chunk
                    )
                    require_finite(loss, state["step"], batch["image_ids"], saved)
                    state["step"] += 1
                    state["losses"].append(loss)
                    state["times"].append(time.perf_counter() - clock)
                    clock = time.perf_counter()
                    bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}", refresh=False)
                    bar.update()
                    if stop.is_set() or save_every and state["step"] % save_every == 0:
                        saved.save(state)
                    if stop.is_set():
                        break
                if len(state["losses"]) < epoch_steps:
                    break  # Ctrl-C: what is done of this epoch is in the checkpoint
                row = epoch_row(model, dev_metrics(model, dev, raw), state, batch_size, clock)
                require_finite(row["dev_loss"], state["step"], dev.image_ids, saved)
                if state["best"] is None or is_better(row, state, select):
                    state["best"] = epoch
                    best_weights = saved.save_best(epoch)
                state |= {"losses": [], "times": [], "history": [*state["history"], row]}
                saved.save(state)
                if on_epoch is not None and on_epoch(row):
                    break
        finally:
            bar.close()
            run.unwrap_model(prepared[0], keep_fp32_wrapper=False)
            model.load_state_dict(best_weights, strict=False)
    if stop.is_set():
        run.print(f"Stopped after step {state['step']} of {total}. {saved.how_to_resume()}")
    return History(state["history"], interrupted=stop.is_set())


def prepare_run(model, train, settings):
    """The Accelerator of a fit, and the sides of `train` that are read raw, of "image" and "text".

    Moves the model to the device and adds to `settings` what the checkpoints of a run must also
    agree on. ValueError, naming the argument, for settings that cannot be.
    """
    if settings["epochs"] < 1:
        raise ValueError(f"epochs is {settings['epochs']}: train for 1 or more")
    if min(settings["batch_size"], len(train)) < 2:
        sizes = f"{settings['batch_size']}, of {len(train)} images"
        raise ValueError(f"batch_size is {sizes}: a contrastive loss compares 2 or more")
    if settings["select"] not in SELECT:
        raise ValueError(f"select is {settings['select']!r}: choose one of {', '.join(SELECT)}")
    for side in ("image", "text"):
        rate = settings[f"{side}_lr"]
        if rate and train.images is None:
            fix = "leave it at 0, or give Examples with images"
            raise ValueError(f"{side}_lr is {rate}, but train holds cached features alone: {fix}")
    raw = [s for s in ("image", "text") if settings[f"{s}_lr"] or train.embeds is None]
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


def epoch_row(model, metrics, state, batch_size, clock):
    """What `fit` reports of an epoch; metrics: those on dev; clock: when its last step ended."""
    losses, times = state["losses"], state["times"]
    row = {"epoch": len(state["history"]) + 1, "step": state["step"]}
    row |= {"train_loss": sum(losses) / len(losses), **metrics}
    row |= {name: parameter.item() for name, parameter in model.logits().items()}
    row |= {"losses": losses, "images_per_second": batch_size / float(np.median(times))}
    return row | {"seconds": sum(times) + time.perf_counter() - clock}


def is_better(row, state, select):
    """Whether an epoch is better on dev than the best so far."""
    best = state["history"][state["best"] - 1]
    return row[select] < best[select] if select == "dev_loss" else row[select] > best[select]


def is_over(state, total, patience):
    """Whether all steps are done, or `patience` epochs have gone by without a better one."""
    waited = len(state["history"]) - (state["best"] or 0)
    return state["step"] >= total or patience is not None and waited >= patience


def require_finite(loss, step, image_ids, saved):
    """FloatingPointError, with step and images, where a loss is not finite."""
    if not math.isfinite(loss):
        where = f"in step {step}, on the images {', '.join(map(str, image_ids[:8].tolist()))} …"
        fix = "lower the learning rates, or look for NaN in the features"
        raise FloatingPointError(f"the loss is {loss} {where}: {fix}. {saved.last()}")
