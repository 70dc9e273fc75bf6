"""One fit() for both schemes: projection heads on cached features, and fine-tuning with gradients into the towers.

What a step sees is a pure function of (seed, epoch, image id), and what it draws at random of (seed, step): a run that
was killed goes on as if it had not been, and two runs with one seed see the same pairs in the same order."""

from __future__ import annotations

import math
import sys
import time
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from helpers.config import pick_device
from helpers.data import Examples, splitmix64
from helpers.distributed import cached_backward, gathered_clip_loss, ring_siglip_loss
from helpers.evaluation import ranks
from helpers.features import embed_images, embed_texts
from helpers.losses import clip_loss, siglip_loss
from helpers.model import MAX_LOGIT_SCALE, evaluating, training_mode
from helpers.storage.checkpoints import Checkpoints
from helpers.training_context import (
    best_precision,
    interruptible,
    some_patches,
    trained_parts,
    without_dropout,
)

DROPOUT = 4  # what a hash decides, beside those in coco.py and pairs.py
LOWER = (
    "Lower, in this order: chunk (gradient caching: say 32; the batch stays), then gradient_checkpointing=True, then "
    "max_length of the captions, then batch_size, which changes what is learned."
)


def parameter_groups(model, lr, image_lr=0.0, text_lr=0.0, weight_decay=0.1):
    """Everything that is trained, for AdamW: per part with its rate; decay on weight matrices alone.

    None on biases, norms, embeddings, logit_scale and logit_bias. Towers with a rate of 0 are left out.
    """
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    rates = {"image_tower": image_lr, "text_tower": text_lr}
    groups = {}
    for name, parameter in model.named_parameters():
        rate = rates.get(name.split(".")[0], lr)
        if rate:
            decays = (
                parameter.ndim in (2, 4) and id(parameter) not in embeddings
            )  # Linear, or the patches' convolution
            groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": p, "lr": rate, "peak": rate, "weight_decay": decay}
        for (rate, decay), p in groups.items()
    ]


def warmup_cosine(step, warmup, total):
    """Learning-rate factor at a step, from 0: linear to 1 over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def contrastive_loss(
    image_embeds, text_embeds, logit_scale, logit_bias=None, image_ids=None, processes=1
):
    """The loss that belongs to the model: SigLIP's where there is a logit_bias, else InfoNCE; over all processes."""
    if logit_bias is None:
        loss = clip_loss if processes == 1 else gathered_clip_loss
        return loss(image_embeds, text_embeds, logit_scale, image_ids)
    loss = siglip_loss if processes == 1 else ring_siglip_loss
    return loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids)


def split_features(model, split, raw):
    """Features of all images [N, D] and captions [M, D], and for each caption its image [M]; raw sides anew."""
    images = split.images if "image" in raw else split.embeds.image_embeds
    if "image" in raw:
        images = embed_images(model.image_tower, split.images)
    if "text" in raw:
        texts, owner = split.images.all_captions()
        return images, embed_texts(model.text_tower, texts), torch.as_tensor(owner)
    return images, split.embeds.text_embeds, split.embeds.owner


def dev_metrics(model, dev, raw=()):
    """Loss and text→image recall on the dev split, in evaluation mode.

    The loss is that of training, one caption an image, averaged over all captions; the batch is the whole split.
    """
    device, ids = model.logit_scale.device, torch.as_tensor(dev.image_ids)
    image_features, text_features, owner = split_features(model, dev, raw)
    with evaluating(model):
        image_embeds = model.project_image(image_features.to(device, torch.float32))
        text_embeds = model.project_text(text_features.to(device, torch.float32))
        losses = []
        for r in range(
            dev.counts.max()
        ):  # the r-th caption of each image, starting over where there are fewer
            told = text_embeds[dev.rows[dev.starts + r % dev.counts]]
            losses.append(
                contrastive_loss(image_embeds, told, **model.logits(), image_ids=ids).item()
            )
        rank = ranks(text_embeds, image_embeds, owner, torch.arange(len(dev)))[:, 0]
    recall = {f"dev_recall@{k}": (rank <= k).double().mean().item() for k in (1, 5)}
    return {"dev_loss": sum(losses) / len(losses), **recall}


def fit(
    model,
    train,
    dev,
    *,
    epochs,
    batch_size=512,
    lr=1e-3,
    image_lr=0.0,
    text_lr=0.0,
    weight_decay=0.1,
    betas=(0.9, 0.98),
    warmup=0.05,
    clip=1.0,
    accumulate=1,
    chunk=None,
    best="dev_loss",
    patience=None,
    seed=0,
    precision=None,
    gradient_checkpointing=False,
    patches=1.0,
    checkpoints=None,
    every=None,
    keep=2,
    about=None,
    tracker=None,
    on_epoch=None,
):
    """Train a CLIP on `train` with the loss it was made for, and leave in it the epoch that was best on `dev`.

    train, dev: Examples, or Embeddings where both towers are locked. lr, image_lr, text_lr: peak rates of heads and towers
    (AdamW; 0 locks a tower); they rise over the share `warmup` of all steps, then fall along a cosine to 0.
    batch_size: pairs a loss compares, over all processes; accumulate: losses a step adds up; chunk: pairs whose
    activations are held at once (gradient caching); clip: largest norm of the gradient. precision: "no", "bf16",
    "fp16", or None for what the device is good at. patches: share of a picture's patches that the image tower sees in
    a step, others each time; half of them costs half and keeps it from learning pictures by heart. best: what decides,
    "dev_loss" or "dev_recall@1"; patience: epochs without a better one before training ends. checkpoints: a folder,
    written every `every` steps and after each epoch; a run that finds its own there goes on from it. about: a dict that
    the checkpoints must agree on, say the profile. tracker: "tensorboard", "wandb", … as accelerate names them.
    on_epoch(row) may return True to end the training.

    Returns the history: a list of rows, each also passed to on_epoch, with epoch, step, train_loss, dev_loss,
    dev_recall@1, dev_recall@5 (text to image), logit_scale (the logarithm), logit_bias, losses (one by one),
    images_per_second (by the median step), seconds. FloatingPointError names step and images where a loss is not
    finite. Ctrl-C ends the step, writes a checkpoint and says how to go on.
    """
    train, dev = (
        pairs if isinstance(pairs, Examples) else Examples(embeds=pairs) for pairs in (train, dev)
    )
    raw = [
        side
        for side, rate in (("image", image_lr), ("text", text_lr))
        if rate or train.embeds is None
    ]
    run = Accelerator(
        cpu=pick_device().type == "cpu",
        mixed_precision=precision or best_precision(),
        gradient_accumulation_steps=accumulate,
        log_with=tracker,
        project_dir=checkpoints,
    )
    batch_size = min(batch_size, len(train))
    epoch_losses = (
        len(train) // batch_size // accumulate * accumulate
    )  # the last, incomplete step is left out
    total = epochs * epoch_losses // accumulate
    if not total or batch_size % run.num_processes:
        sizes = f"{accumulate} × {batch_size} of them, shared by {run.num_processes} processes"
        raise ValueError(
            f"{len(train)} images cannot make a step of {sizes}: choose another batch_size or accumulate"
        )
    settings = {
        "images": len(train),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "image_lr": image_lr,
        "text_lr": text_lr,
        "weight_decay": weight_decay,
        "betas": list(betas),
        "warmup": warmup,
        "clip": clip,
        "accumulate": accumulate,
        "chunk": chunk,
        "patches": patches,
        "best": best,
        "patience": patience,
        "seed": seed,
        "precision": run.mixed_precision,
        "processes": run.num_processes,
        "loss": "clip" if model.logit_bias is None else "siglip",
        **(about or {}),
    }

    model.to(run.device)
    with (
        trained_parts(model, image_lr, text_lr, gradient_checkpointing),
        interruptible() as interrupted,
    ):
        groups = parameter_groups(model, lr, image_lr, text_lr, weight_decay)
        optimizer = torch.optim.AdamW(
            groups, lr=lr, betas=betas, fused=run.device.type in ("cpu", "cuda")
        )
        saved = Checkpoints(checkpoints, model, optimizer, run, settings, keep)
        state = saved.resume({"step": 0, "losses": [], "times": [], "history": [], "best": None})
        best_state = saved.best(state) or saved.trainable()
        stepping, stepper = run.prepare(
            model, optimizer
        )  # wrapped for several processes and mixed precision
        if tracker:
            run.init_trackers("learn-clip", config=settings)
        bar = tqdm(
            total=total,
            initial=state["step"],
            desc="training",
            unit="step",
            file=sys.stdout,
            disable=not run.is_main_process,
        )

        def train_epoch(epoch):
            """What is left of an epoch, step by step; `state` says at any time where we are."""
            left, part = (
                range(len(state["losses"]), epoch_losses),
                (run.process_index, run.num_processes),
            )
            began = time.perf_counter()
            for batch in train.batches(model, raw, seed, epoch, batch_size, left, part):
                number = (epoch - 1) * epoch_losses + len(state["losses"])  # of this loss, from 0
                torch.manual_seed(
                    int(splitmix64(DROPOUT, seed, number, run.process_index)[0] >> np.uint64(1))
                )
                for group in stepper.param_groups:
                    group["lr"] = group["peak"] * warmup_cosine(
                        state["step"], warmup * total, total
                    )
                loss = take_step(run, stepping, stepper, batch, clip, chunk)
                if not math.isfinite(loss):
                    raise not_finite(loss, state["step"], batch["image_ids"], saved)
                state["losses"].append(loss)
                state["times"].append(time.perf_counter() - began)
                began = time.perf_counter()
                if len(state["losses"]) % accumulate == 0:
                    state["step"] += 1
                    bar.set_postfix_str(f"epoch {epoch}, loss {loss:.3f}", refresh=False)
                    bar.update()
                    if len(state["losses"]) < epoch_losses and (
                        interrupted or every and state["step"] % every == 0
                    ):
                        saved.save(state)
                    if interrupted and len(state["losses"]) < epoch_losses:
                        raise KeyboardInterrupt

        try:
            while state["step"] < total and not is_over(state, best, patience):
                epoch = len(state["history"]) + 1
                with training_mode(model), without_dropout(model.image_tower, model.text_tower):
                    with some_patches(model.image_tower, patches):
                        train_epoch(epoch)
                began = time.perf_counter()
                row = {
                    "epoch": epoch,
                    "step": state["step"],
                    "train_loss": sum(state["losses"]) / epoch_losses,
                    **dev_metrics(model, dev, raw),
                    **{name: p.item() for name, p in model.logits().items()},
                    "losses": state["losses"],
                    "images_per_second": batch_size / float(np.median(state["times"])),
                    "seconds": sum(state["times"]) + time.perf_counter() - began,
                }
                if not math.isfinite(row["dev_loss"]):
                    raise not_finite(row["dev_loss"], state["step"], dev.image_ids, saved)
                if state["best"] is None or is_better(
                    row, state["history"][state["best"] - 1], best
                ):
                    state["best"], best_state = epoch, saved.trainable()
                    saved.save_best(epoch)
                state |= {"losses": [], "times": [], "history": [*state["history"], row]}
                saved.save(state)
                run.log(
                    {name: value for name, value in row.items() if name != "losses"},
                    step=state["step"],
                )
                if on_epoch is not None and on_epoch(row):
                    break
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(f"\nStopped after step {state['step']} of {total}. {saved.how_to_resume()}")
            raise
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"Step {state['step']} does not fit into the GPU's memory. {LOWER}"
            ) from error
        finally:
            bar.close()
            for each in run.trackers:
                each.finish()
            run.unwrap_model(stepping, keep_fp32_wrapper=False)
            model.load_state_dict(best_state, strict=False)
    return state["history"]


def take_step(run, model, optimizer, batch, clip, chunk):
    """One loss on one batch, its gradient, and, once enough of them are added up, a step. Returns the loss."""
    batch = {name: tensor.to(run.device, non_blocking=True) for name, tensor in batch.items()}
    loss_of = partial(contrastive_loss, image_ids=batch["image_ids"], processes=run.num_processes)
    with run.accumulate(model):
        if chunk:
            loss = cached_backward(model, batch, loss_of, chunk, backward=run.backward)
        else:
            loss = loss_of(**model(batch))
            run.backward(loss)
        if run.sync_gradients and clip:
            run.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            run.unwrap_model(model).logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    return run.reduce(loss.detach(), "mean").item()


def is_better(row, than, best):
    return row[best] < than[best] if best == "dev_loss" else row[best] > than[best]


def is_over(state, best, patience):
    """Whether `patience` epochs have gone by without a better one."""
    return patience is not None and len(state["history"]) - (state["best"] or 0) >= patience


def not_finite(loss, step, image_ids, saved):
    """The error to raise where a loss is not finite."""
    ids = ", ".join(map(str, image_ids[:8].tolist())) + (" …" if len(image_ids) > 8 else "")
    return FloatingPointError(
        f"the loss is {loss} in step {step}, on the images {ids}: lower the learning rates, or look for NaN in the "
        f"features. {saved.last()}"
    )


def tuning(profile, image=True, text=True):
    """The settings with which `fit` tunes one or both towers of a profile, starting from trained heads."""
    return {
        "epochs": profile.tune_epochs,
        "batch_size": profile.batch_size,
        "lr": 3e-4,
        "image_lr": profile.image_lr * image,
        "text_lr": profile.text_lr * text,
        "patches": 0.5 if image else 1.0,
        "best": "dev_recall@1",
    }
