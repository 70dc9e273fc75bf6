"""What holds only while a model trains, undone afterwards: gradients, dropout, patches, Ctrl-C."""

import signal
import threading
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.model import temporarily, training_mode


@contextmanager
def trained_parts(model, image_lr, text_lr, gradient_checkpointing=False):
    """Inside, towers with a rate take gradients, their word vectors and other towers do not.

    gradient_checkpointing: layers of the former keep their input alone and are computed again in
    the backward pass (Chen et al. 2016, 1604.06174). Afterwards every parameter is as it was.
    """
    rates = {"image_tower": image_lr, "text_tower": text_lr}
    named = [(name.split(".")[0], parameter) for name, parameter in model.named_parameters()]
    changes = [(p, "requires_grad", bool(rates.get(part, True))) for part, p in named]
    words = [part.weight for part in model.modules() if isinstance(part, nn.Embedding)]
    changes += [(weight, "requires_grad", False) for weight in words]
    for name, part in model.named_modules() if gradient_checkpointing else ():
        if rates.get(name.split(".")[0]) and isinstance(part, GradientCheckpointingLayer):
            in_two_passes = partial(checkpoint, part.forward, use_reentrant=False)
            changes.append((part, "forward", in_two_passes))
    with temporarily(changes):
        try:
            yield
        finally:
            model.zero_grad()


@contextmanager
def while_training(model, image_lr, text_lr, gradient_checkpointing=False):
    """Inside, the model trains: gradients in what is tuned, training mode, no dropout in towers.

    A contrastive batch is noise enough for pretrained towers. Heads do drop units.
    """
    dropouts = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Dropout)]
    nothing_dropped = temporarily([(m, "p", 0.0) for name, m in dropouts if "_tower." in name])
    with trained_parts(model, image_lr, text_lr, gradient_checkpointing), training_mode(model):
        with nothing_dropped:
            yield


@contextmanager
def some_patches(tower, patch_keep_ratio):
    """Inside, the ViT sees a random share of an image's patches, others each time, and CLS.

    Li et al. 2022 (FLIP, 2212.00794), section 3. Taught in notebook 04, "Half of the patches".
    """
    if tower is None or patch_keep_ratio == 1:
        yield
        return

    first = tower.prefix  # tokens before the patches: 1, CLS, for a ViT

    def keep_some(module, inputs, embedded):  # [B, 1 + P, D], positions already added
        b, n, d = embedded.shape
        keep = round(patch_keep_ratio * (n - first))
        patches = torch.rand(b, n - first, device=embedded.device).argsort(dim=1)[:, :keep] + first
        cls = torch.arange(first, device=embedded.device).expand(b, -1)
        tokens = torch.cat([cls, patches.sort(dim=1).values], dim=1)  # [B, 1 + keep]
        return embedded.gather(1, tokens[:, :, None].expand(-1, -1, d))

    hook = tower.model.embeddings.register_forward_hook(keep_some)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def interruptible():
    """Inside, the first Ctrl-C only sets the event that is handed out; a second one interrupts.

    So that a step ends before training does, and model and optimizer stay in step.
    """
    interruption = threading.Event()

    def on_ctrl_c(*_):
        interruption.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
