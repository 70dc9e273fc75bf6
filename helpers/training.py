"""One fit() for both schemes: projection heads on cached features, and fine-tuning with gradients into the towers.

What a step sees is a pure function of (seed, epoch, image id), and what it draws at random of (seed, step): a run that
was killed goes on as if it had not been, and two runs with one seed see the same pairs in the same order.

    python -m helpers.training --help          accelerate launch -m helpers.training --profile coco --loss siglip
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from helpers.checkpoints import Checkpoints
from helpers.coco import draw_captions, splitmix64, visiting_order
from helpers.embeddings import embed_images, embed_texts, prefetch
from helpers.evaluation import ranks
from helpers.large_batch import cached_backward, gathered_clip_loss, ring_siglip_loss
from helpers.losses import clip_loss, siglip_loss
from helpers.model import MAX_LOGIT_SCALE, evaluating, training_mode
from helpers.profiles import pick_device

CROP, DROPOUT = 3, 4  # what a hash decides, beside those in coco.py
KEPT = 0.85  # at least this much of each side of a picture is left by a random crop
LOWER = (
    "Lower, in this order: chunk (gradient caching: say 32; the batch stays), then gradient_checkpointing=True, then "
    "max_length of the captions, then batch_size, which changes what is learned."
)


class Pairs:
    """Images with their captions, to train on: each side raw, or as the features that its frozen tower made.

    images: CaptionedImages, or None; embeds: Embeddings of the same images, or None. At least one of the two.
    """

    def __init__(self, images=None, embeds=None):
        source = embeds if images is None else images
        self.images, self.embeds, self.image_ids = images, embeds, np.asarray(source.image_ids)
        if images is not None and embeds is not None and not np.array_equal(images.image_ids, embeds.image_ids):
            raise ValueError("the features are not those of these images: extract them from the same subset")
        self.owner = embeds.owner.numpy() if images is None else np.repeat(np.arange(len(images)), images.counts)
        self.counts = np.bincount(self.owner, minlength=len(self.image_ids))  # captions per image, [N]
        if not self.counts.all():
            raise ValueError(f"image {self.image_ids[self.counts.argmin()]} has no caption: leave such images out")
        # Embeddings list captions in any order: rows[starts[i]] … are those of image i.
        self.rows, self.starts = np.argsort(self.owner, kind="stable"), self.counts.cumsum() - self.counts

    def __len__(self):
        return len(self.image_ids)

    def batches(self, model, raw, seed, epoch, batch_size, which, part=(0, 1)):
        """The batches of an epoch whose numbers are in `which`; one caption an image.

        raw: the sides, of "image" and "text", that are read as pictures and words; `part` (k, n): the k-th of n parts.
        """
        order, picked = visiting_order(seed, epoch, self.image_ids), self.captions(seed, epoch)
        batches = [order[k * batch_size : (k + 1) * batch_size] for k in which]
        batches = [np.split(batch, part[1])[part[0]] for batch in batches]

        def pictures(batch):
            return torch.stack([self.picture(i, model.image_tower, seed, epoch) for i in batch])

        loaded = prefetch(pictures, batches) if "image" in raw else map(self.image_features, batches)
        with closing(loaded) if "image" in raw else nullcontext():
            for batch, images in zip(batches, loaded, strict=True):
                result = {"image_ids": torch.as_tensor(self.image_ids[batch])}  # [B]
                result["pixel_values" if "image" in raw else "image_features"] = images  # uint8 [B, 3, S, S] or [B, D]
                if "text" in raw:
                    told = [self.images.captions(i)[picked[i] - self.starts[i]] for i in batch]
                    yield result | model.text_tower.tokenize(told)  # [B, T]
                else:
                    yield result | {"text_features": self.embeds.text_embeds[self.rows[picked[batch]]].float()}

    def image_features(self, batch):
        return self.embeds.image_embeds[batch].float()

    def captions(self, seed, epoch):
        """The caption that each image shows in an epoch, as a position in `rows`: int64 [N]."""
        return self.starts + draw_captions(seed, epoch, self.image_ids, self.counts)

    def picture(self, i, tower, seed, epoch):
        """Image i as the tower wants it, uint8 [3, S, S], cut out of the whole at random: a little else each epoch."""
        image = self.images.image(int(i), tower.size)
        dice = splitmix64(CROP, seed, epoch, self.image_ids[i], [0, 1, 2, 3]) / 2.0**64  # uniform in [0, 1)
        size = np.array(image.size)
        side = size * (KEPT + (1 - KEPT) * dice[:2])
        corner = (size - side) * dice[2:]
        return tower.preprocess(image, (*corner, *(corner + side)))

    def features(self, model, raw):
        """Features of all images [N, D] and captions [M, D], and for each caption its image [M]; raw sides anew."""
        images = self.images if "image" in raw else self.embeds.image_embeds
        if "image" in raw:
            images = embed_images(model.image_tower, self.images)
        if "text" in raw:
            texts, owner = self.images.all_captions()
            return images, embed_texts(model.text_tower, texts), torch.as_tensor(owner)
        return images, self.embeds.text_embeds, self.embeds.owner


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
            decays = parameter.ndim in (2, 4) and id(parameter) not in embeddings  # Linear, or the patches' convolution
            groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def warmup_cosine(step, warmup, total):
    """Learning-rate factor at a step, from 0: linear to 1 over `warmup` steps, then half a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def contrastive_loss(image_embeds, text_embeds, logit_scale, logit_bias=None, image_ids=None, processes=1):
    """The loss that belongs to the model: SigLIP's where there is a logit_bias, else InfoNCE; over all processes."""
    if logit_bias is None:
        loss = clip_loss if processes == 1 else gathered_clip_loss
        return loss(image_embeds, text_embeds, logit_scale, image_ids)
    loss = siglip_loss if processes == 1 else ring_siglip_loss
    return loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids)


def dev_metrics(model, dev, raw=()):
    """Loss and text→image recall on the dev split, in evaluation mode.

    The loss is that of training, one caption an image, averaged over all captions; the batch is the whole split.
    """
    device, ids = model.logit_scale.device, torch.as_tensor(dev.image_ids)
    image_features, text_features, owner = dev.features(model, raw)
    with evaluating(model):
        image_embeds = model.project_image(image_features.to(device, torch.float32))
        text_embeds = model.project_text(text_features.to(device, torch.float32))
        losses = []
        for r in range(dev.counts.max()):  # the r-th caption of each image, starting over where there are fewer
            told = text_embeds[dev.rows[dev.starts + r % dev.counts]]
            losses.append(contrastive_loss(image_embeds, told, **model.logits(), image_ids=ids).item())
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
    checkpoints=None,
    every=None,
    keep=2,
    about=None,
    tracker=None,
    on_epoch=None,
):
    """Train a CLIP on `train` with the loss it was made for, and leave in it the epoch that was best on `dev`.

    train, dev: Pairs, or Embeddings where both towers are locked. lr, image_lr, text_lr: peak rates of heads and towers
    (AdamW; 0 locks a tower); they rise over the share `warmup` of all steps, then fall along a cosine to 0.
    batch_size: pairs a loss compares, over all processes; accumulate: losses a step adds up; chunk: pairs whose
    activations are held at once (gradient caching); clip: largest norm of the gradient. precision: "no", "bf16",
    "fp16", or None for what the device is good at. best: what decides, "dev_loss" or "dev_recall@1"; patience: epochs
    without a better one before training ends. checkpoints: a folder, written every `every` steps and after each epoch;
    a run that finds its own there goes on from it. about: a dict that the checkpoints must agree on, say the profile.
    tracker: "tensorboard", "wandb", … as accelerate names them.

    Returns the history: a list of rows, each also passed to on_epoch(row), with epoch, step, train_loss, dev_loss,
    dev_recall@1, dev_recall@5 (text to image), logit_scale (the logarithm), logit_bias, losses (one by one),
    images_per_second (by the median step), seconds. FloatingPointError names step and images where a loss is not
    finite. Ctrl-C ends the step, writes a checkpoint and says how to go on.
    """
    train, dev = (pairs if isinstance(pairs, Pairs) else Pairs(embeds=pairs) for pairs in (train, dev))
    raw = [side for side, rate in (("image", image_lr), ("text", text_lr)) if rate or train.embeds is None]
    run = Accelerator(
        cpu=pick_device().type == "cpu",
        mixed_precision=precision or best_precision(),
        gradient_accumulation_steps=accumulate,
        log_with=tracker,
        project_dir=checkpoints,
    )
    batch_size = min(batch_size, len(train))
    epoch_losses = len(train) // batch_size // accumulate * accumulate  # the last, incomplete step is left out
    total = epochs * epoch_losses // accumulate
    if not total or batch_size % run.num_processes:
        sizes = f"{accumulate} × {batch_size} of them, shared by {run.num_processes} processes"
        raise ValueError(f"{len(train)} images cannot make a step of {sizes}: choose another batch_size or accumulate")
    settings = {
        "images": len(train), "epochs": epochs, "batch_size": batch_size, "lr": lr, "image_lr": image_lr,
        "text_lr": text_lr, "weight_decay": weight_decay, "betas": list(betas), "warmup": warmup, "clip": clip,
        "accumulate": accumulate, "chunk": chunk, "best": best, "patience": patience, "seed": seed,
        "precision": run.mixed_precision, "processes": run.num_processes,
        "loss": "clip" if model.logit_bias is None else "siglip", **(about or {}),
    }  # fmt: skip

    model.to(run.device)
    with trained_parts(model, image_lr, text_lr, gradient_checkpointing), interruptible() as interrupted:
        groups = parameter_groups(model, lr, image_lr, text_lr, weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=run.device.type in ("cpu", "cuda"))
        saved = Checkpoints(checkpoints, model, optimizer, run, settings, keep)
        state = saved.resume({"step": 0, "losses": [], "times": [], "history": [], "best": None})
        best_state = saved.best(state) or saved.trainable()
        stepping, stepper = run.prepare(model, optimizer)  # wrapped for several processes and mixed precision
        if tracker:
            run.init_trackers("learn-clip", config=settings)
        bar = tqdm(total=total, initial=state["step"], desc="training", unit="step", file=sys.stdout,
                   disable=not run.is_main_process)  # fmt: skip

        def train_epoch(epoch):
            """What is left of an epoch, step by step; `state` says at any time where we are."""
            left, part = range(len(state["losses"]), epoch_losses), (run.process_index, run.num_processes)
            began = time.perf_counter()
            for batch in train.batches(model, raw, seed, epoch, batch_size, left, part):
                number = (epoch - 1) * epoch_losses + len(state["losses"])  # of this loss, from 0
                torch.manual_seed(int(splitmix64(DROPOUT, seed, number, run.process_index)[0] >> np.uint64(1)))
                for group in stepper.param_groups:
                    group["lr"] = group["peak"] * warmup_cosine(state["step"], warmup * total, total)
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
                    if len(state["losses"]) < epoch_losses and (interrupted or every and state["step"] % every == 0):
                        saved.save(state)
                    if interrupted and len(state["losses"]) < epoch_losses:
                        raise KeyboardInterrupt

        try:
            while state["step"] < total and not is_over(state, best, patience):
                epoch = len(state["history"]) + 1
                with training_mode(model), without_dropout(model.image_tower, model.text_tower):
                    train_epoch(epoch)
                began = time.perf_counter()
                row = {
                    "epoch": epoch, "step": state["step"], "train_loss": sum(state["losses"]) / epoch_losses,
                    **dev_metrics(model, dev, raw), **{name: p.item() for name, p in model.logits().items()},
                    "losses": state["losses"], "images_per_second": batch_size / float(np.median(state["times"])),
                    "seconds": sum(state["times"]) + time.perf_counter() - began,
                }  # fmt: skip
                if not math.isfinite(row["dev_loss"]):
                    raise not_finite(row["dev_loss"], state["step"], dev.image_ids, saved)
                if state["best"] is None or is_better(row, state["history"][state["best"] - 1], best):
                    state["best"], best_state = epoch, saved.trainable()
                    saved.save_best(epoch)
                state |= {"losses": [], "times": [], "history": [*state["history"], row]}
                saved.save(state)
                run.log({name: value for name, value in row.items() if name != "losses"}, step=state["step"])
                if on_epoch is not None and run.is_main_process:
                    on_epoch(row)
                if interrupted:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(f"\nStopped after step {state['step']} of {total}. {saved.how_to_resume()}")
            raise
        except torch.OutOfMemoryError as error:
            raise RuntimeError(f"Step {state['step']} does not fit into the GPU's memory. {LOWER}") from error
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


def best_precision():
    """What mixed precision the device is good at: "bf16", "fp16", or "no" on a CPU."""
    if pick_device().type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


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


@contextmanager
def trained_parts(model, image_lr, text_lr, gradient_checkpointing=False):
    """Inside, towers with a rate take gradients and those with a rate of 0 do not; afterwards all is as it was.

    gradient_checkpointing: the former keep no activations and compute them again in the backward pass.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(True)
    tuned = []
    for tower, rate in ((model.image_tower, image_lr), (model.text_tower, text_lr)):
        if tower is not None and not rate:
            tower.requires_grad_(False)
        elif tower is not None and gradient_checkpointing:
            checkpointing(tower.model, "enable")({"use_reentrant": False})
            tuned.append(tower.model)
    try:
        yield
    finally:
        for model in tuned:
            checkpointing(model, "disable")()
        for p, required in before:
            p.requires_grad_(required)
            p.grad = None


def checkpointing(model, what):
    """transformers' method, under the name that it has had since 5.20 or the one from before."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(model, f"gradient_checkpointing_{what}")


@contextmanager
def without_dropout(*towers):
    """Inside, the pretrained towers drop nothing: a contrastive batch is noise enough. The heads keep their dropout."""
    parts = [part for tower in towers if tower is not None for part in tower.modules() if isinstance(part, nn.Dropout)]
    before = [part.p for part in parts]
    for part in parts:
        part.p = 0.0
    try:
        yield
    finally:
        for part, p in zip(parts, before, strict=True):
            part.p = p


class Interruption:
    """True once Ctrl-C was pressed; a second Ctrl-C interrupts at once."""

    def __init__(self):
        self.asked = False

    def __bool__(self):
        return self.asked

    def __call__(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interruptible():
    """Inside, Ctrl-C waits for the end of a step, so that model and optimizer stay in step with each other."""
    asked = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, asked)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
