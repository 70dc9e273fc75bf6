"""Where a tower looks: its attention, and four ways to turn it into a map over patches or words.

Attention is [L, B, H, N, N]: layer, example, head, the token that looks (a row sums to 1), the
token that is looked at. A reading starts from a source, a distribution [B, N] over the last layer's
tokens, and ends in scores of the input tokens [B, N]. `raw_attention`, `rollout` and
`attention_flow` know nothing of the other tower; `relevance` weighs attention by the gradient of
the similarity. To read some of the layers only, pass attentions[a:b].
"""

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.max_flow import flows
from helpers.model import training_mode
from helpers.storage.towers import whole_words

METHODS = ("raw", "rollout", "flow", "relevance")


def forward_tower(tower, batch):
    """A pass that shows its attention: (L tensors [B, H, N, N], source [B, N], embedding [B, D]).

    batch: {"pixel_values"} [B, 3, H, W], uint8 or normalised, or {"input_ids", "attention_mask"}.
    The source is the tower's pooling, as in `source_of`. Where autograd is on, its graph starts at
    the input, whether or not the tower is frozen. The tower stays as it was: the pass goes through
    a twin, since transformers leaves hooks behind.
    """
    shared = {id(tensor): tensor for tensor in [*tower.model.parameters(), *tower.model.buffers()]}
    # What deepcopy finds in `shared` it does not copy: the twin has the same weights.
    twin = copy.deepcopy(tower.model, shared).eval()
    twin.set_attn_implementation("eager")  # the fast kinds never build the matrix
    if "pixel_values" in batch:
        pixels = batch["pixel_values"]
        pixels = tower.normalise(pixels) if pixels.dtype == torch.uint8 else pixels.detach()
        inputs = {"pixel_values": pixels.requires_grad_(), "interpolate_pos_encoding": True}
    else:
        inputs = batch
        words = twin.get_input_embeddings()  # where the graph starts
        words.register_forward_hook(lambda module, ids, vectors: vectors.detach().requires_grad_())
    outputs = twin(**inputs, output_attentions=True)
    mask = [batch["attention_mask"]] if "attention_mask" in batch else []
    return outputs.attentions, source_of(tower, outputs, *mask), tower.pool(outputs, *mask)


def record(tower, batch):
    """The attention of a tower: [L, B, H, N, N] on the CPU. The rows of padding are 0.

    batch: as in `forward_tower`.

    Taught in notebook 07, "1 · One head of one layer".
    """
    with torch.no_grad():
        attentions, _, _ = forward_tower(tower, batch)
    attentions = torch.stack(attentions).float().cpu()
    if "attention_mask" in batch:
        attentions = attentions * batch["attention_mask"].cpu()[:, None, :, None]
    return attentions


def one_token(index: int, examples: int, tokens: int) -> Tensor:
    """All of the source in one token: [B, N]."""
    return F.one_hot(torch.full((examples,), index), tokens).float()


@torch.no_grad()
def source_of(tower, outputs, attention_mask=None) -> Tensor:
    """The tower's own pooling as a source [B, N], from what its model returned of a batch.

    CLS for images, the two tokens of a DeiT, what the probe of a SigLIP attends to; for captions
    all real tokens, or the last one where the model was trained so.
    """
    states = outputs.last_hidden_state
    source = states.new_zeros(states.shape[:2])
    if attention_mask is not None and outputs.get("pooler_output") is not None:
        return source.scatter(1, attention_mask.sum(dim=1, keepdim=True) - 1, 1.0)
    if attention_mask is not None:
        return attention_mask.to(source) / attention_mask.sum(dim=1, keepdim=True)
    if tower.prefix == 0:
        head = tower.model.head
        return head.attention(head.probe.expand(len(states), -1, -1), states, states)[1][:, 0]
    source[:, : tower.prefix] = 1 / tower.prefix
    return source


def pooling(tower, batch: dict[str, Tensor]) -> Tensor:
    """The tower's own pooling as a source [B, N] on the CPU; batch: as in `forward_tower`."""
    with torch.no_grad():
        return forward_tower(tower, batch)[1].float().cpu()


def raw_attention(attentions, source, layer=-1, head=None):
    """What the source looks at in one layer, in one head or in their mean: [B, N].

    Taught in notebook 07, "1 · One head of one layer".
    """
    weights = attentions[layer]  # [B, H, N, N]
    weights = weights.mean(dim=1) if head is None else weights[:, head]  # [B, N, N]
    return torch.einsum("bi,bij->bj", source.to(weights), weights)


def fuse_heads(attentions, residual=True):
    """One matrix a layer [L, B, N, N] whose rows sum to 1: ½A + ½I, with A the heads' mean.

    Abnar & Zuidema 2020, section 3.

    Taught in notebook 07, "2 · Rollout: all layers at once".
    """
    fused = attentions.mean(dim=2)
    if residual:
        fused = 0.5 * fused + 0.5 * torch.eye(fused.shape[-1]).to(fused)
    return fused / fused.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)


def rollout(attentions, source=None, residual=True):
    """How much of each input token is mixed into the source [B, N]; without one, the whole matrix.

    Â_L · … · Â_1 (Abnar & Zuidema 2020, section 3).

    Taught in notebook 07, "2 · Rollout: all layers at once".
    """
    matrices = fuse_heads(attentions, residual)  # [L, B, N, N]
    if source is None:
        rows = torch.eye(matrices.shape[-1]).expand_as(matrices[0])  # [B, N, N]
    else:
        rows = source[:, None]  # [B, 1, N]
    rows = rows.to(matrices)
    for matrix in matrices.flip(0):  # from the last layer to the first
        rows = rows @ matrix  # a row times a matrix, not matrix by matrix
    return rows if source is None else rows.squeeze(1)


def attention_flow(attentions, source, residual=True):
    """The most that can flow from the source to each input token, Â being capacities: [B, N].

    Abnar & Zuidema 2020, section 3: an edge of capacity Â_l[i, j] from token i above layer l to
    token j below it, and one of capacity source[i] from the source to token i at the top. Exact but
    for the capacities, which are rounded down to multiples of 1 / 2³⁰. Seconds for a ViT-B/16.

    Taught in notebook 07, "3 · Flow: how much can get through?".
    """
    matrices = fuse_heads(attentions, residual=residual).double().numpy()  # [L, B, N, N]
    examples = [(matrices[:, b], source[b].double().numpy()) for b in range(len(source))]
    return torch.from_numpy(np.stack(flows(examples))).to(attentions.dtype)


def forward_both(model, images, texts):
    """Both towers and their cosines, in one graph: (image side, text side, similarity [B]).

    images, texts: batches as in `forward_tower`, pair b in row b. A side is (attentions, source):
    L tensors [B, H, N, N] and the tower's pooling [B, N].

    Taught in notebook 07, "5 · Relevance: ask the gradient".
    """
    with training_mode(model, False), torch.enable_grad():  # the heads drop nothing either
        image_attentions, image_source, image = forward_tower(model.image_tower, images)
        text_attentions, text_source, text = forward_tower(model.text_tower, texts)
        similarity = (model.project_image(image) * model.project_text(text)).sum(dim=-1)  # [B]
    return (image_attentions, image_source), (text_attentions, text_source), similarity


def relevance(attentions, source, similarity):
    """What each input token adds to the similarity, through one tower's attention: [B, N].

    Chefer et al. 2021 (arXiv 2103.15679), equations 5 and 6: R ← R + (∇A ∘ A)⁺ R from the first
    layer to the last, heads averaged; then the source's row of R − I. Arguments: as
    `forward_both` gives them; attentions[-k:] reads the last k layers.

    Taught in notebook 07, "5 · Relevance: ask the gradient".
    """
    ones = torch.ones_like(similarity)  # of the sum, since no pair reads another
    gradients = torch.autograd.grad(similarity, attentions, ones, retain_graph=True)
    source = source[:, None]  # [B, 1, N]
    gathered = torch.zeros_like(source)  # the source's row of (I + C_L) · … · (I + C_1), less I
    for weights, gradient in zip(reversed(attentions), reversed(gradients)):
        gains = (gradient * weights.detach()).clamp_min(0).mean(dim=1)  # C_l: [B, N, N]
        gathered = gathered + (source + gathered) @ gains
    return gathered.squeeze(1).float().cpu()


def patch_grid(tower, pixel_values: Tensor, scores: Tensor) -> Tensor:
    """Scores of tokens [B, N] as maps over the image's patches, without CLS: [B, gh, gw]."""
    grid = tuple(side // tower.model.config.patch_size for side in pixel_values.shape[-2:])
    return scores[:, -grid[0] * grid[1] :].unflatten(1, grid)


class Words(NamedTuple):
    """A caption's words and their scores [W]; special: the share that [CLS] and [SEP] take."""

    words: list[str]
    scores: Tensor
    special: float


def word_scores(tower, captions: list[str], scores: Tensor) -> list[Words]:
    """Scores of tokens [B, T] as scores of whole words: those of a word's pieces are added up.

    Padding has none.
    """
    rows = []
    for caption, row in zip(captions, scores.tolist()):
        words = whole_words(tower, caption)
        values = [sum(row[k] for k in places) for _, places in words]
        special = max(0.0, sum(row) - sum(values)) / max(sum(row), 1e-12)
        rows.append(Words([word for word, _ in words], torch.tensor(values), special))
    return rows


def batches(model, images: list, captions: list[str]) -> tuple[dict, dict]:
    """Images (PIL) and captions as the two towers read them, on the model's device."""
    device = model.logit_scale.device
    pixels = torch.stack([model.image_tower.preprocess(image) for image in images])
    tokens = model.text_tower.tokenize(captions)
    return {"pixel_values": pixels.to(device)}, {k: ids.to(device) for k, ids in tokens.items()}


class Comparison(NamedTuple):
    """Images and captions, pair by pair, once they have gone through a model."""

    model: object
    captions: list[str]
    images: dict[str, Tensor]
    texts: dict[str, Tensor]
    sides: dict[str, tuple]  # {"image": (attentions, source), "text": …}, as in `forward_both`
    similarity: Tensor


def compare(model, images: list, captions: list[str]) -> Comparison:
    """Pairs images (PIL) with captions: one with one, or one of either with each of the other.

    Raises ValueError for other numbers, TypeError where captions is a single string.
    """
    if isinstance(captions, str):
        raise TypeError(f"captions is a list of sentences: write [{captions!r}]")
    counts = {len(images), len(captions)}
    if 0 in counts or counts - {1, max(counts)}:
        numbers = f"{len(images)} images and {len(captions)} captions"
        raise ValueError(f"{numbers} make no pairs: give equal numbers, or one of either")
    images, captions = (list(x) * (max(counts) // len(x)) for x in (images, captions))
    images, texts = batches(model, images, captions)
    *sides, similarity = forward_both(model, images, texts)
    sides = dict(zip(("image", "text"), sides))
    return Comparison(model, captions, images, texts, sides, similarity)


def token_scores(side, similarity, method, source=None, layer=-1, layers=slice(None), head=None):
    """Scores of one tower's tokens [B, N], from a side of `forward_both`; see `read_maps`."""
    attentions, pooled = side
    if method == "relevance":
        return relevance(attentions[layers], pooled, similarity)
    attentions = torch.stack(attentions).detach().float().cpu()  # [L, B, H, N, N]
    source = pooled.cpu() if source is None else source
    if method == "raw":
        return raw_attention(attentions, source, layer, head)
    reading = {"rollout": rollout, "flow": attention_flow}[method]
    return reading(attentions[layers], source)


def read_maps(comparison, method="relevance", tower=None, **options) -> tuple[Tensor, list[Words]]:
    """Maps [B, gh, gw] over the images and B times `Words` over the captions, by one of METHODS.

    options: layer (from 0) and head for "raw"; layers, a slice, for the others; source [B, N],
    where a reading starts, by default the pooling ("relevance" knows no other). They hold for one
    tower, "image" or "text", or for both.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: choose one of {', '.join(METHODS)}")
    model, captions, images, _, sides, similarity = comparison
    of_patches, of_tokens = (
        token_scores(side, similarity, method, **(options if tower in (None, name) else {}))
        for name, side in sides.items()
    )
    grids = patch_grid(model.image_tower, images["pixel_values"], of_patches)
    return grids, word_scores(model.text_tower, captions, of_tokens)


def explain(model, images: list, captions: list[str], method: str = "relevance", **options):
    """Maps and words as in `read_maps`, of images (PIL) and captions as in `compare`."""
    return read_maps(compare(model, images, captions), method, **options)
