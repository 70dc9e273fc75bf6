"""What holds only while a model trains, undone afterwards: gradients, dropout, patches, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

import torch
from torch import nn

from helpers.model import temporarily, training_mode


@contextmanager
def trained_parts(model, image_lr, text_lr, gradient_checkpointing=False):
    """Inside, towers with a rate take gradients and those with a rate of 0 do not.

    gradient_checkpointing: the former keep no activations, they compute them again in the backward
    pass (Chen et al. 2016, 1604.06174). Afterwards every parameter is as it was.
    """
    rates = {"image_tower": image_lr, "text_tower": text_lr}
    named = [(name.split(".")[0], parameter) for name, parameter in model.named_parameters()]
    checkpointed = []
    if gradient_checkpointing:
        checkpointed = [getattr(model, name).model for name, rate in rates.items() if rate]
    with temporarily([(p, "requires_grad", bool(rates.get(part, True))) for part, p in named]):
        for transformer in checkpointed:
            checkpointing(transformer, "enable")({"use_reentrant": False})
        try:
            yield
        finally:
            for transformer in checkpointed:
                checkpointing(transformer, "disable")()
                # Left behind by transformers: a frozen tower would keep activations for nothing.
                if hasattr(transformer, "_require_grads_hook"):
                    transformer.disable_input_require_grads()
            for parameter in model.parameters():
                parameter.grad = None


def checkpointing(model, action):
    """transformers' method, by the name that it has since 5.20 or the one from before."""
    names = (f"activation_checkpointing_{action}", f"gradient_checkpointing_{action}")
    return next(getattr(model, name) for name in names if hasattr(model, name))


def without_dropout(*towers):
    """Inside, pretrained towers drop nothing: a contrastive batch is noise enough. Heads do."""
    parts = [part for tower in towers if tower is not None for part in tower.modules()]
    return temporarily([(part, "p", 0.0) for part in parts if isinstance(part, nn.Dropout)])


@contextmanager
def while_training(model, image_lr, text_lr, gradient_checkpointing=False):
    """Inside, the model trains: gradients in what is tuned, training mode, no dropout in towers."""
    with (
        trained_parts(model, image_lr, text_lr, gradient_checkpointing),
        training_mode(model),
        without_dropout(model.image_tower, model.text_tower),
    ):
        yield


@contextmanager
def some_patches(tower, patch_keep_ratio):
    """Inside, the ViT sees CLS and a random share of an image's patches, others each time.

    Li et al. 2022 (FLIP, 2212.00794), section 3. Taught in notebook 04, "Half of the patches".
    """
    if tower is None or patch_keep_ratio == 1:
        yield
        return

    def keep_some(module, inputs, embedded):  # [B, 1 + P, D], positions already added
        b, n, d = embedded.shape
        keep = round(patch_keep_ratio * (n - 1))
        patches = torch.rand(b, n - 1, device=embedded.device).argsort(dim=1)[:, :keep] + 1
        cls = patches.new_zeros(b, 1)
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
        if interruption.is_set():
            raise KeyboardInterrupt
        interruption.set()

    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
