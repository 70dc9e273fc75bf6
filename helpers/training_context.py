"""What the machine at hand is good for when towers are trained: precision, memory, threads, each with its reason."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager

import torch
from torch import nn

from helpers.config import machine, pick_device, worker_threads

FREE = 0.85  # the share of a GPU's memory to plan with; kernels, fragments and other programs take the rest
TOKENS = 40  # of the longest caption in a batch of COCO's, to which all are padded
# Bytes that a layer keeps for its backward pass, for each token and channel, in mixed precision (helpers/memory.py
# counts them), and with gradient checkpointing, where it keeps its input and one layer after the other is whole again.
KEPT, KEPT_AGAIN = 42, 8


def look() -> dict:
    """The facts: {"gpu": name or None, "memory": bytes of the GPU, "bf16": whether it computes in it, "cores"}."""
    facts = {"gpu": None, "memory": 0, "bf16": False, "cores": machine()["cores"]}
    if (device := pick_device()).type == "cuda":
        facts |= {
            "gpu": machine()["gpu"],
            "memory": torch.cuda.get_device_properties(device).total_memory,
        }
        facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    return facts


def best_precision(has: dict | None = None) -> str:
    """What mixed precision the device is good at: "bf16", "fp16", or "no" on a CPU. has: what `look` returns."""
    has = has or look()
    return "no" if has["gpu"] is None else "bf16" if has["bf16"] else "fp16"


def memory_needed(
    model, image: bool = True, text: bool = True, patches: float = 1.0
) -> tuple[int, int, int]:
    """Bytes to train a CLIP with the named towers in mixed precision: for the weights, for each pair, and for each pair
    with gradient checkpointing.

    A trained number takes 16 bytes (itself, its gradient, AdamW's two moments), a frozen one 4, and each 2 more in 16
    bits. patches: the share of a picture's patches that a step sees.
    """
    kept, weights = 0, 0
    for tower, trained in ((model.image_tower, image), (model.text_tower, text)):
        config = tower.model.config
        tokens = TOKENS
        if tower is model.image_tower:
            tokens = 1 + round(patches * (config.image_size // config.patch_size) ** 2)
        weights += sum(p.numel() for p in tower.parameters()) * (18 if trained else 6)
        kept += trained * tokens * config.num_hidden_layers * config.hidden_size
    return weights, KEPT * kept, KEPT_AGAIN * kept


def choose(has: dict, batch_size: int, needs: tuple[int, int, int]) -> tuple[dict, str]:
    """How to train on this machine: {"precision", "gradient_checkpointing"} as `fit` takes them, and why, in words.

    has: what `look` returns; needs: what `memory_needed` returns. The batch stays as it is, since its size changes what
    is learned; gradient checkpointing changes no number and costs a third more time.
    """
    threads = f"{worker_threads(has['cores'])} threads read pictures ({has['cores']} cores)"
    precision = best_precision(has)
    if precision == "no":
        why = f"No CUDA: 32 bits, since few CPUs are faster in 16; batches of {batch_size}; {threads}."
        return {"precision": precision, "gradient_checkpointing": False}, why
    weights, pair, pair_again = needs
    whole, again, room = (
        weights + batch_size * pair,
        weights + batch_size * pair_again,
        FREE * has["memory"],
    )
    if whole <= room:
        fits = "which fits"
    elif again <= room:
        fits = f"too much, so layers are computed again in the backward pass ({again / 1e9:.1f} GB)"
    else:
        fits = f"{again / 1e9:.1f} GB where layers are computed again, and even that may be too much: tune one tower"
    bits = (
        "bf16, as wide in range as 32 bits"
        if has["bf16"]
        else "fp16 with a scaled loss, since it has no bf16"
    )
    size = f"{batch_size} pairs need about {whole / 1e9:.1f} GB"
    why = f"{has['gpu']}, {has['memory'] / 1e9:.0f} GB: {bits}; {size}, {fits}; {threads}."
    return {"precision": precision, "gradient_checkpointing": whole > room}, why


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
            if hasattr(
                model, "_require_grads_hook"
            ):  # left behind: a frozen tower would keep activations for nothing
                model.disable_input_require_grads()
        for p, required in before:
            p.requires_grad_(required)
            p.grad = None


def checkpointing(model, what):
    """transformers' method, under the name that it has had since 5.20 or the one from before."""
    return getattr(model, f"activation_checkpointing_{what}", None) or getattr(
        model, f"gradient_checkpointing_{what}"
    )


@contextmanager
def without_dropout(*towers):
    """Inside, the pretrained towers drop nothing: a contrastive batch is noise enough. The heads keep their dropout."""
    parts = [
        part
        for tower in towers
        if tower is not None
        for part in tower.modules()
        if isinstance(part, nn.Dropout)
    ]
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
        kept = (
            torch.rand(b, n - 1, device=embedded.device).argsort(dim=1)[:, : round(share * (n - 1))]
            + 1
        )
        kept = torch.cat(
            [kept.new_zeros(b, 1), kept.sort(dim=1).values], dim=1
        )  # [B, 1 + share * N]
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
