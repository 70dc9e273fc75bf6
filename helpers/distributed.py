"""What carries the two losses past one device: several processes, chunks, and gradient caching.

Each process passes its own rows, as many as every other. What it gets back is its share: the mean over processes is the
loss of the whole batch, and the gradients, averaged over processes as DDP does, are those of one process with all rows.
In one process the functions equal `clip_loss` and `siglip_loss`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def processes():
    """(how many processes there are, which of them this is)."""
    return (
        (dist.get_world_size(), dist.get_rank())
        if dist.is_available() and dist.is_initialized()
        else (1, 0)
    )


def own_ids(embeds, image_ids=None):
    """The image of each of this process's rows: int64 [b]. None: every row of every process is another image."""
    if image_ids is None:
        image_ids = torch.arange(len(embeds)) + processes()[1] * len(embeds)
    return torch.as_tensor(image_ids, dtype=torch.int64, device=embeds.device)


class Gather(torch.autograd.Function):
    """The rows of all processes in order of rank, [b, …] to [B, …]; gradients find their way back."""

    @staticmethod
    def forward(ctx, local):
        parts = [
            torch.empty_like(local, memory_format=torch.contiguous_format)
            for _ in range(processes()[0])
        ]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        world, rank = processes()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every process has used our rows: their gradients add up
        return gradient.chunk(world)[rank]


def gather(local):
    """`Gather`, or the rows themselves where there is only one process."""
    return Gather.apply(local) if processes()[0] > 1 else local


def gathered_clip_loss(image_embeds, text_embeds, logit_scale, image_ids=None):
    """InfoNCE over the batches of all processes, each computing the rows and columns of its own pairs.

    image_embeds, text_embeds [b, E]; logit_scale [], logarithm; image_ids [b] as in `clip_loss`. Logits take [b, B]
    twice instead of [B, B]; all embeddings, [B, E], are on every process.
    """
    images, texts, ids = gather(image_embeds), gather(text_embeds), own_ids(image_embeds, image_ids)
    positives = ids[:, None] == gather(ids)  # [b, B]
    targets = positives / positives.sum(dim=1, keepdim=True)
    image_to_text = F.cross_entropy(
        logit_scale.exp() * image_embeds @ texts.T, targets.to(images.dtype)
    )
    text_to_image = F.cross_entropy(
        logit_scale.exp() * text_embeds @ images.T, targets.to(images.dtype)
    )
    return (image_to_text + text_to_image) / 2


def sigmoid_block(images, texts, logit_scale, logit_bias, positives):
    """One block of the sigmoid loss, images [r, E] against texts [c, E], and its gradients by hand.

    Returns the sum over the block's pairs, then the gradients for images, texts, logit_scale and logit_bias.
    """
    scale = logit_scale.exp()
    cosines = images @ texts.T  # [r, c]
    signs = 2 * positives.to(cosines.dtype) - 1
    agreement = signs * (scale * cosines + logit_bias)
    pull = -signs * torch.sigmoid(-agreement)  # gradient for the logits
    return (
        -F.logsigmoid(agreement).sum(),
        scale * (pull @ texts),
        scale * (pull.T @ images),
        scale * (pull * cosines).sum(),
        pull.sum(),
    )


class WithGradients(torch.autograd.Function):
    """A value whose gradients were computed along with it: what backward needs is there already."""

    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.save_for_backward(*(g.to(tensor.dtype) for g, tensor in zip(gradients, inputs)))
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        return None, None, *(factor * gradient for gradient in ctx.saved_tensors)


def full_precision(*tensors):
    """Half-precision tensors as float32, others as they are, detached."""
    return [
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors
    ]


def chunked_siglip_loss(
    image_embeds, text_embeds, logit_scale, logit_bias, image_ids=None, chunk=1024
):
    """`siglip_loss` of one process with `chunk` images at a time: [chunk, B] logits are all that ever exists.

    Arguments as in `siglip_loss`. The gradients are summed up in the same pass, so that nothing is computed twice.
    """
    inputs, ids = (
        (image_embeds, text_embeds, logit_scale, logit_bias),
        own_ids(image_embeds, image_ids),
    )
    images, texts, scale, bias = full_precision(*inputs)
    value, by_images, by_texts = (
        images.new_zeros(()),
        torch.empty_like(images),
        torch.zeros_like(texts),
    )
    by_scale, by_bias = torch.zeros_like(scale), torch.zeros_like(bias)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            block = sigmoid_block(images[rows], texts, scale, bias, ids[rows, None] == ids)
            by_images[rows] = block[1]
            for total, part in zip((value, by_texts, by_scale, by_bias), (block[0], *block[2:])):
                total += part
    gradients = [
        gradient.div_(len(images)) for gradient in (by_images, by_texts, by_scale, by_bias)
    ]
    return WithGradients.apply(value / len(images), gradients, *inputs)


def pass_on(*tensors):
    """Hands tensors to the next process of the ring and returns those of the process before, of the same shapes."""
    world, rank = processes()
    if world == 1:
        return tensors
    sent = [tensor.contiguous() for tensor in tensors]
    received = [torch.empty_like(tensor) for tensor in sent]
    calls = []
    for tag, (mine, theirs) in enumerate(zip(sent, received)):
        calls.append(dist.P2POp(dist.isend, mine, (rank + 1) % world, tag=tag))
        calls.append(dist.P2POp(dist.irecv, theirs, (rank - 1) % world, tag=tag))
    for call in dist.batch_isend_irecv(calls):
        call.wait()
    return received


def ring_siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids=None):
    """The sigmoid loss over the batches of all processes; texts go round, and no process ever holds them all.

    Arguments as in `siglip_loss`, [b, E] and [b]. In each of B / b rounds the texts at hand meet the own images in
    [b, b] logits and move on, together with the gradient they have gathered, until they are home again. Backward then
    has nothing left to exchange; it takes for granted that all processes scale the loss alike.
    Zhai et al. 2023, algorithm 1.
    """
    inputs, ids = (
        (image_embeds, text_embeds, logit_scale, logit_bias),
        own_ids(image_embeds, image_ids),
    )
    images, texts, scale, bias = full_precision(*inputs)
    value, by_images, by_scale, by_bias, by_texts, text_ids = (
        0,
        0,
        0,
        0,
        torch.zeros_like(texts),
        ids,
    )
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for _ in range(processes()[0]):
            block = sigmoid_block(images, texts, scale, bias, ids[:, None] == text_ids)
            value, by_images, by_texts = value + block[0], by_images + block[1], by_texts + block[2]
            by_scale, by_bias = by_scale + block[3], by_bias + block[4]
            texts, by_texts, text_ids = pass_on(texts, by_texts, text_ids)
    gradients = [
        gradient.div_(len(images)) for gradient in (by_images, by_texts, by_scale, by_bias)
    ]
    return WithGradients.apply(value / len(images), gradients, *inputs)


def cached_backward(model, batch, loss, chunk, backward=torch.Tensor.backward):
    """The backward pass of a batch whose activations do not fit: only those of `chunk` rows ever exist.

    model(part of the batch) gives embeddings and scalars by name, `loss(**outputs, image_ids=…)` is any loss of this
    course, `backward` what to call instead of `Tensor.backward`. Dropout draws what it would draw if each chunk were
    embedded once. Gradients are accumulated in the parameters; returns the loss, detached. Gao et al. 2021.
    """
    device = next(model.parameters()).device
    generators = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    size = len(next(iter(batch.values())))
    parts = [
        {name: rows[i : i + chunk] for name, rows in batch.items()} for i in range(0, size, chunk)
    ]

    states, embedded = [], []
    with torch.no_grad():  # first pass: embeddings alone
        for part in parts:
            states.append([generator.get_rng_state() for generator in generators])
            embedded.append(model(part))

    leaves = {}  # the loss on all of them, and its gradient for each embedding
    for name, first in embedded[0].items():
        whole = torch.cat([outputs[name] for outputs in embedded]) if first.ndim else first
        leaves[name] = whole.detach().clone().requires_grad_()
    value = loss(**leaves, image_ids=batch.get("image_ids"))
    gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))

    for k, (part, state) in enumerate(
        zip(parts, states)
    ):  # second pass: chunk by chunk, the gradients go in
        for generator, before in zip(generators, state):
            generator.set_rng_state(before)
        quiet = k + 1 < len(parts) and hasattr(
            model, "no_sync"
        )  # DDP averages once, after the last chunk
        with model.no_sync() if quiet else nullcontext():
            outputs = model(part)
            rows = slice(k * chunk, (k + 1) * chunk)
            shares = (g[rows] if g.ndim else g / len(parts) for g in gradients.values())
            backward(sum((outputs[name] * share).sum() for name, share in zip(gradients, shares)))
    return value.detach()
