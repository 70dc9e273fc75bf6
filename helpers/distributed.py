"""Both losses past one device: several processes, chunks, and gradient caching.

Each process passes its own rows, as many as every other process does, and gets its share of the
loss. The mean over processes is the loss of the whole batch. The gradients, averaged over processes
as DDP does, are those of one process that holds all rows. In one process the functions equal
`clip_loss` and `siglip_loss`.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from helpers.losses import clip_loss, siglip_loss


def processes():
    """(how many processes there are, which of them this is)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def own_ids(embeds, image_ids=None):
    """The image of each of this process's rows, int64 [b]. None: every row is another image."""
    if image_ids is None:
        image_ids = torch.arange(len(embeds)) + processes()[1] * len(embeds)
    return torch.as_tensor(image_ids, dtype=torch.int64, device=embeds.device)


class Gather(torch.autograd.Function):
    """The rows of all processes in order of rank, [b, …] to [B, …]; gradients find their way back.

    Taught in notebook 08, "InfoNCE: gather, with gradients".
    """

    @staticmethod
    def forward(ctx, local):  # [b, …] -> [B, …]
        everyone = local.new_empty(processes()[0] * len(local), *local.shape[1:])
        dist.all_gather(list(everyone.chunk(processes()[0])), local.contiguous())
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # [B, …] -> [b, …]
        world, rank = processes()
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # every process has used our rows: their gradients add up
        return gradient.chunk(world)[rank]


def gather(local):
    """`Gather`, or the rows themselves where there is only one process."""
    return Gather.apply(local) if processes()[0] > 1 else local


def gathered_clip_loss(image_embeds, text_embeds, logit_scale, image_ids=None):
    """InfoNCE over the batches of all processes; each computes the rows and columns of its pairs.

    image_embeds, text_embeds [b, E]; logit_scale [], a logarithm; image_ids [b] as in `clip_loss`.
    Logits take [b, B] twice, not [B, B]; the embeddings of all, [B, E], are on every process.

    Taught in notebook 08, "InfoNCE: gather, with gradients".
    """
    images, texts = gather(image_embeds), gather(text_embeds)  # [B, E]
    ids = own_ids(image_embeds, image_ids)  # [b]
    targets = (ids[:, None] == gather(ids)).to(images.dtype)  # [b, B]
    targets = targets / targets.sum(dim=1, keepdim=True)
    scale = logit_scale.exp()
    image_to_text = F.cross_entropy(scale * image_embeds @ texts.T, targets)
    text_to_image = F.cross_entropy(scale * text_embeds @ images.T, targets)
    return (image_to_text + text_to_image) / 2


def sigmoid_block(images, texts, logit_scale, logit_bias, positives):
    """One block of the sigmoid loss, images [r, E] against texts [c, E], with its gradients.

    positives: bool [r, c]. Returns the sum over the block's pairs, then the gradients for images,
    texts, logit_scale and logit_bias.

    Taught in notebook 08, "SigLIP: a ring".
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
    """A value whose gradients came out of the same pass: backward only hands them on."""

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
    return [t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def chunked_siglip_loss(
    image_embeds, text_embeds, logit_scale, logit_bias, image_ids=None, chunk=1024
):
    """`siglip_loss` of one process, `chunk` images at a time: logits never exceed [chunk, B].

    Arguments as in `siglip_loss`. The gradients are summed up in the same pass: nothing is
    computed twice. Taught in notebook 08, "Chunks: the same on one device".
    """
    inputs = image_embeds, text_embeds, logit_scale, logit_bias
    images, texts, scale, bias = full_precision(*inputs)
    ids = own_ids(images, image_ids)
    value, by_images, by_texts, by_scale, by_bias = 0, [], 0, 0, 0
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for start in range(0, len(images), chunk):
            rows = slice(start, start + chunk)
            block = sigmoid_block(images[rows], texts, scale, bias, ids[rows, None] == ids)
            by_images.append(block[1])
            value, by_texts = value + block[0], by_texts + block[2]
            by_scale, by_bias = by_scale + block[3], by_bias + block[4]
    sums = value, torch.cat(by_images), by_texts, by_scale, by_bias
    value, *gradients = (total / len(images) for total in sums)
    return WithGradients.apply(value, gradients, *inputs)


def pass_on(*tensors):
    """Hands tensors to the next process of the ring, returns those of the process before.

    Of the same shapes and types. Taught in notebook 08, "SigLIP: a ring".
    """
    world, rank = processes()
    if world == 1:
        return tensors
    outgoing = [tensor.contiguous() for tensor in tensors]
    incoming = [torch.empty_like(tensor) for tensor in outgoing]
    calls = []
    for tag, (mine, theirs) in enumerate(zip(outgoing, incoming)):
        calls.append(dist.P2POp(dist.isend, mine, (rank + 1) % world, tag=tag))
        calls.append(dist.P2POp(dist.irecv, theirs, (rank - 1) % world, tag=tag))
    for call in dist.batch_isend_irecv(calls):
        call.wait()
    return incoming


def ring_siglip_loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids=None):
    """The sigmoid loss over the batches of all processes, none of which ever holds all texts.

    Arguments as in `siglip_loss`, [b, E] and [b]. In each of B / b rounds the texts at hand meet
    the own images in [b, b] logits. Then they move on, with the gradient they have gathered, until
    they are home again. Backward has nothing left to exchange; it takes for granted that all
    processes scale the loss alike. Zhai et al. 2023, algorithm 1.

    Taught in notebook 08, "SigLIP: a ring".
    """
    inputs = image_embeds, text_embeds, logit_scale, logit_bias
    images, texts, scale, bias = full_precision(*inputs)
    ids = own_ids(images, image_ids)
    text_ids, sums = ids, [0, 0, 0, 0, 0]  # loss; gradients of images, texts, scale and bias
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        for _ in range(processes()[0]):
            block = sigmoid_block(images, texts, scale, bias, ids[:, None] == text_ids)
            sums = [total + part for total, part in zip(sums, block)]
            texts, sums[2], text_ids = pass_on(texts, sums[2], text_ids)
    value, *gradients = (total / len(images) for total in sums)
    return WithGradients.apply(value, gradients, *inputs)


def cached_backward(model, batch, loss, chunk, backward=torch.Tensor.backward):
    """The backward pass of a batch whose activations do not fit: those of `chunk` rows at a time.

    model(part of the batch) gives embeddings and scalars by name; `loss(**outputs, image_ids=…)`
    is any loss of this course; `backward` replaces `Tensor.backward`. Dropout draws what it would
    draw if each chunk were embedded once. Gradients add up in the parameters; returns the loss,
    detached. Gao et al. 2021.

    Taught in notebook 08, "Gradient caching".
    """
    device = next(model.parameters()).device
    generators = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    starts = range(0, len(next(iter(batch.values()))), chunk)
    parts = [{name: rows[i : i + chunk] for name, rows in batch.items()} for i in starts]

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

    for part, state, start in zip(parts, states, starts):  # second pass: the gradients go in
        for generator, before in zip(generators, state):
            generator.set_rng_state(before)
        early = start != starts[-1] and hasattr(model, "no_sync")
        with model.no_sync() if early else nullcontext():  # DDP averages once, with the last chunk
            outputs = model(part)
            rows = slice(start, start + chunk)
            shares = (g[rows] if g.ndim else g / len(parts) for g in gradients.values())
            backward(sum((outputs[name] * share).sum() for name, share in zip(gradients, shares)))
    return value.detach()


def contrastive_loss(
    image_embeds, text_embeds, logit_scale, logit_bias=None, image_ids=None, processes=1
):
    """The model's own loss over all processes: SigLIP's where it has a logit_bias, else InfoNCE."""
    if logit_bias is None:
        loss = clip_loss if processes == 1 else gathered_clip_loss
        return loss(image_embeds, text_embeds, logit_scale, image_ids)
    loss = siglip_loss if processes == 1 else ring_siglip_loss
    return loss(image_embeds, text_embeds, logit_scale, logit_bias, image_ids)
