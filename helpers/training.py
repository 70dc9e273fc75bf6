"""Training the projection heads on cached embeddings: the towers stay frozen, so an epoch takes well under a second."""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from helpers.evaluation import ranks
from helpers.losses import clip_loss
from helpers.model import MAX_LOGIT_SCALE, evaluating, head_state, training_mode


class CaptionPicker:
    """Picks one caption for each image. owner [M]: row of the image that a caption belongs to."""

    def __init__(self, owner, images):
        owner = np.asarray(owner)
        self.counts = np.bincount(owner, minlength=images)  # [N]
        if not self.counts.all():
            raise ValueError(f"the image in row {self.counts.argmin()} has no caption: leave such images out")
        self.order = np.argsort(owner, kind="stable")  # captions, image by image
        self.starts = self.counts.cumsum() - self.counts

    def random(self, rng):
        """A random caption of each image: int64 [N], rows of the text embeddings."""
        return torch.as_tensor(self.order[self.starts + rng.integers(self.counts)])

    def each(self):
        """Every caption once: yields int64 [N], the r-th caption of each image, starting over where there are fewer."""
        for r in range(self.counts.max()):
            yield torch.as_tensor(self.order[self.starts + r % self.counts])


def parameter_groups(model, weight_decay):
    """What is trained over frozen towers, for AdamW: decay on weight matrices; none on biases, norms, logit_scale."""
    heads = [*model.image_head.parameters(), *model.text_head.parameters()]
    return [
        {"params": [p for p in heads if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in heads if p.ndim <= 1] + [model.logit_scale], "weight_decay": 0.0},
    ]


def warmup_cosine(warmup, total):
    """Learning-rate factor by step, from 0: linear to 1 over `warmup` steps, then half a cosine to 0 at `total`."""

    def factor(step):
        if step < warmup:
            return (step + 1) / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2

    return factor


def dev_metrics(model, dev):
    """Loss and text→image recall on the dev split, in evaluation mode.

    The loss is that of training, one caption an image, averaged over all captions; the batch is the whole split.
    """
    device, images = model.logit_scale.device, len(dev.image_ids)
    with evaluating(model):
        image_embeds = model.project_image(dev.image_embeds.to(device, torch.float32))
        text_embeds = model.project_text(dev.text_embeds.to(device, torch.float32))
        losses = [
            clip_loss(image_embeds, text_embeds[picked.to(device)], model.logit_scale, dev.image_ids).item()
            for picked in CaptionPicker(dev.owner, images).each()
        ]
        rank = ranks(text_embeds, image_embeds, dev.owner, torch.arange(images))[:, 0]
    recall = {f"dev_recall@{k}": (rank <= k).double().mean().item() for k in (1, 5)}
    return {"dev_loss": sum(losses) / len(losses), **recall}


def train_epoch(model, optimizer, schedule, image_features, text_features, image_ids, batch_size):
    """One pass over paired features [N, D], the last incomplete batch left out. Returns the mean loss."""
    device, n, losses = model.logit_scale.device, len(image_features), []
    for batch in torch.randperm(n)[: n - n % batch_size].split(batch_size):
        image_embeds = model.project_image(image_features[batch].to(device, torch.float32))  # [B, E]
        text_embeds = model.project_text(text_features[batch].to(device, torch.float32))  # [B, E]
        loss = clip_loss(image_embeds, text_embeds, model.logit_scale, image_ids[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        losses.append(loss.item())
    return sum(losses) / len(losses)


def train_heads(
    model, train, dev, *, epochs=60, batch_size=512, lr=1e-3, weight_decay=0.1, patience=10, seed=0, on_epoch=None
):
    """Train both heads and logit_scale with InfoNCE on `train`, and keep the epoch with the lowest loss on `dev`.

    train, dev: Embeddings. Order, captions and dropout of an epoch, one caption an image, depend on (seed, epoch) only.
    AdamW, two epochs of linear warm-up, cosine to zero at `epochs`; ends after `patience` epochs without a lower loss.
    Returns the history: a list of rows, each also passed to on_epoch(row), with epoch, train_loss, dev_loss,
    dev_recall@1, dev_recall@5 (text to image), logit_scale (the logarithm) and seconds. FloatingPointError names the
    epoch when a loss is not finite. Interrupted, it leaves the best epoch's weights in the model.
    """
    n = len(train.image_ids)
    batch_size = min(batch_size, n)
    image_features, text_features = train.image_embeds, train.text_embeds
    image_ids, captions = torch.as_tensor(train.image_ids), CaptionPicker(train.owner, n)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=(0.9, 0.98))
    steps = n // batch_size
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(2 * steps, epochs * steps))

    history, best_loss, best_epoch, best_state = [], math.inf, 0, head_state(model)
    bar = tqdm(range(1, epochs + 1), desc="heads", unit="epoch", file=sys.stdout)
    try:
        for epoch in bar:
            began = time.perf_counter()
            rng = np.random.default_rng([seed, epoch])
            torch.manual_seed(int(rng.integers(2**31)))  # each epoch anew: what on_epoch draws changes nothing
            texts = text_features[captions.random(rng)]
            with training_mode(model.image_head), training_mode(model.text_head):
                train_loss = train_epoch(model, optimizer, schedule, image_features, texts, image_ids, batch_size)
            row = {"epoch": epoch, "train_loss": train_loss, **dev_metrics(model, dev)}
            row |= {"logit_scale": model.logit_scale.item(), "seconds": time.perf_counter() - began}
            if not math.isfinite(row["train_loss"] + row["dev_loss"]):
                raise FloatingPointError(f"loss not finite in epoch {epoch}, {row}: look for NaN in the embeddings")
            history.append(row)
            bar.set_postfix_str(f"train {row['train_loss']:.3f}, dev {row['dev_loss']:.3f}")
            if on_epoch is not None:
                on_epoch(row)
            if row["dev_loss"] < best_loss:
                best_loss, best_epoch, best_state = row["dev_loss"], epoch, head_state(model)
            if epoch - best_epoch >= patience:
                break
    finally:
        bar.close()
        model.load_state_dict(best_state, strict=False)  # the towers, if any, stay as they are
    return history
