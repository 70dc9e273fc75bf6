"""What holds only while a model trains, and is undone afterwards: gradients, dropout, patches left out, Ctrl-C."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

import torch
from torch import nn


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
            if hasattr(model, "_require_grads_hook"):  # left behind: a frozen tower would keep activations for nothing
                model.disable_input_require_grads()
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


@contextmanager
def some_patches(tower, share):
    """Inside, the ViT sees CLS and a random `share` of a picture's patches. Li et al. 2022, FLIP, section 3."""
    if tower is None or share == 1:
        yield
        return

    def keep(module, inputs, embedded):  # [B, 1 + N, D], positions already added
        b, n, d = embedded.shape
        kept = torch.rand(b, n - 1, device=embedded.device).argsort(dim=1)[:, : round(share * (n - 1))] + 1
        kept = torch.cat([kept.new_zeros(b, 1), kept.sort(dim=1).values], dim=1)  # [B, 1 + share * N]
        return embedded.gather(1, kept[:, :, None].expand(-1, -1, d))

    hook = tower.model.embeddings.register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


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
