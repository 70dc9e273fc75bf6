"""Where a tower looks: its attention recorded, and four ways to turn it into a map over patches or words.

`record` gives attentions [L, B, H, N, N]: layer, example, head, the token that looks (a row that sums to 1), the token
that is looked at. `raw_attention`, `rollout` and `flow` read them from a source, a distribution [B, N] over the last
layer's tokens, down to the input tokens [B, N]. They know nothing of the other tower. `relevance` weighs attention by
the gradient of a picture's similarity to a caption. Part of the layers: attentions[a:b].
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.max_flow import flows
from helpers.model import CLIP, training_mode


class Words(NamedTuple):
    """A caption's words and their scores [W]; special: the share of all that [CLS] and [SEP] take."""

    words: list[str]
    scores: Tensor
    special: float


def word_scores(tower, input_ids: Tensor, scores: Tensor) -> list[Words]:
    """Scores of tokens [B, T] as scores of whole words: those of a word's pieces are added up. Padding is left out."""
    told = []
    for ids, row in zip(input_ids.tolist(), scores.tolist(), strict=True):
        words = whole_words(tower, ids)
        values = [sum(row[k] for k in pieces) for _, pieces in words]
        inside = {k for _, pieces in words for k in pieces}
        aside = sum(
            v
            for k, v in enumerate(row)
            if k not in inside and ids[k] != tower.tokenizer.pad_token_id
        )
        told.append(
            Words(
                [word for word, _ in words],
                torch.tensor(values),
                aside / max(aside + sum(values), 1e-12),
            )
        )
    return told


def whole_words(tower, ids: list[int]) -> list[tuple[str, list[int]]]:
    """A caption's words as the tower reads them, each with the positions of its pieces among the tokens `ids`."""
    special, words = set(tower.tokenizer.all_special_ids), []
    special.discard(tower.tokenizer.unk_token_id)  # a word that BERT does not know is still a word
    for k, piece in enumerate(tower.tokenizer.convert_ids_to_tokens(ids)):
        if ids[k] in special:
            continue
        if piece.startswith("##") and words:
            words[-1] = words[-1][0] + piece[2:], [*words[-1][1], k]
        else:
            words.append((piece, [k]))
    return words


def grid_of(tower, height: int, width: int) -> tuple[int, int]:
    """The patches (gh, gw) that a tower cuts a picture of some size into."""
    side = tower.model.config.patch_size
    high, wide = (side, side) if isinstance(side, int) else side
    return height // high, width // wide


def patch_grid(tower, pixel_values: Tensor, scores: Tensor) -> Tensor:
    """Scores of tokens [B, 1 + P] as maps over the picture's patches, CLS left out: [B, gh, gw]."""
    grid = grid_of(tower, *pixel_values.shape[-2:])
    return scores[:, -grid[0] * grid[1] :].unflatten(1, grid)


METHODS = ("raw", "rollout", "flow", "relevance")
AT_A_TIME = 16  # examples that `record` runs at once: a model hands out all of its layers


@contextmanager
def showing_attention(tower):
    """Inside, the tower's model is a twin on the same weights: in evaluation mode, and computing attention openly.

    The model itself is not touched: transformers leaves hooks in one that was asked for attention; here in the twin.
    """
    model = tower.model
    weights = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    try:
        tower.model = copy.deepcopy(
            model, weights
        ).eval()  # whatever is in `weights` is shared, not copied
        tower.model.set_attn_implementation("eager")
        yield
    finally:
        tower.model = model


def forward(tower, batch: dict[str, Tensor], trace: bool = False):
    """Through a tower that shows its attention: (attentions, L tensors [B, H, N, N]; last hidden state [B, N, D]).

    batch: {"pixel_values"} [B, 3, H, W], uint8 or float, or {"input_ids", "attention_mask"} [B, T]. trace: with a graph
    from the input on, whether or not the tower is frozen. Raises RuntimeError where the model gives no weights.
    """
    if "pixel_values" in batch:
        pixels = batch["pixel_values"]
        pixels = tower.normalise(pixels) if pixels.dtype == torch.uint8 else pixels
        odd = tuple(pixels.shape[2:]) != (tower.size, tower.size)
        inputs = {
            "pixel_values": pixels.detach().requires_grad_(trace),
            "interpolate_pos_encoding": odd,
        }
    else:
        embeds = tower.model.get_input_embeddings()(batch["input_ids"])  # [B, T, D]
        inputs = {
            "inputs_embeds": embeds.detach().requires_grad_(trace),
            "attention_mask": batch["attention_mask"],
        }
    outputs = tower.model(**inputs, output_attentions=True)
    if not outputs.attentions or any(weights is None for weights in outputs.attentions):
        raise RuntimeError(
            f"{type(tower.model).__name__} returned no attention weights: its implementation "
            f"({tower.model.config._attn_implementation}) keeps none. Load it with attn_implementation='eager'."
        )
    return outputs.attentions, outputs.last_hidden_state


def record(tower, batch: dict[str, Tensor], layers=slice(None)) -> Tensor:
    """The attention of a tower: [L, B, H, N, N] on the CPU, of the asked layers only; the tower stays as it was.

    batch: as in `forward`; layers: a slice, or a list of layers counted from 0. The rows of padding are 0.
    """
    parts = []
    with showing_attention(tower), torch.no_grad():
        for rows in torch.arange(len(next(iter(batch.values())))).split(AT_A_TIME):
            chunk = {name: values[rows] for name, values in batch.items()}
            asked = _asked(forward(tower, chunk)[0], layers)
            parts.append(
                torch.stack([weights.float().cpu() for weights in asked])
            )  # [L, b, H, N, N]
    attentions = torch.cat(parts, dim=1)
    if "attention_mask" in batch:
        attentions *= batch["attention_mask"].cpu()[:, None, :, None]
    return attentions


def _asked(attentions, layers) -> list[Tensor]:
    return (
        list(attentions[layers]) if isinstance(layers, slice) else [attentions[k] for k in layers]
    )


def pooling(batch: dict[str, Tensor], tokens: int) -> Tensor:
    """The tower's own pooling as a distribution over its tokens [B, N]: CLS for pictures, the real tokens for text."""
    if "pixel_values" in batch:
        return one_token(0, len(batch["pixel_values"]), tokens).to(batch["pixel_values"].device)
    mask = batch["attention_mask"].float()
    return mask / mask.sum(dim=1, keepdim=True)


def one_token(index: int, examples: int, tokens: int) -> Tensor:
    """All of the source in one token: [B, N]."""
    return F.one_hot(torch.full((examples,), index), tokens).float()


def raw_attention(
    attentions: Tensor, source: Tensor, layer: int = -1, head: int | None = None
) -> Tensor:
    """What the source looks at in one layer, in one head or in their mean: [B, N]. Knows no other layer."""
    weights = (
        attentions[layer].mean(dim=1) if head is None else attentions[layer][:, head]
    )  # [B, N, N]
    return torch.einsum("bi,bij->bj", source.to(weights), weights)


def fuse_heads(
    attentions: Tensor, fuse: str = "mean", discard: float = 0.0, residual: bool = True
) -> Tensor:
    """One matrix Â a layer [L, B, N, N] whose rows sum to 1: heads fused by mean, max or min, half of it the residual.

    Â = ½A + ½I (Abnar & Zuidema 2020, section 3). discard: the share of each matrix's smallest entries that is set to
    0 first, never the first token's own (the vision transformers' variant by J. Gildenblat, 2020).
    """
    if fuse not in ("mean", "max", "min"):
        raise ValueError(f"fuse is {fuse!r}: heads are fused by 'mean', 'max' or 'min'")
    if not 0 <= discard < 1:
        raise ValueError(
            f"discard is {discard}: it is a share of the entries, at least 0 and below 1"
        )
    fused = {"mean": torch.mean, "max": torch.amax, "min": torch.amin}[fuse](
        attentions, dim=2
    )  # [L, B, N, N]
    if discard:
        flat = fused.flatten(2).clone()  # [L, B, N·N]
        smallest = flat.topk(int(discard * flat.shape[-1]), largest=False).indices
        first = flat[..., 0].clone()
        flat.scatter_(-1, smallest, 0.0)
        flat[..., 0] = first
        fused = flat.view_as(fused)
    if residual:
        fused = 0.5 * fused + 0.5 * torch.eye(fused.shape[-1]).to(fused)
    return fused / fused.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(fused.dtype).tiny)


def rollout(attentions: Tensor, source: Tensor | None = None, **fusing) -> Tensor:
    """How much of each input token is mixed into the source: [B, N], or the whole matrix [B, N, N] without a source.

    Â_L · … · Â_1, as if layers did nothing but average (Abnar & Zuidema 2020, section 3). fusing: see `fuse_heads`.
    """
    matrices = fuse_heads(attentions, **fusing)
    if source is None:
        rows = torch.eye(matrices.shape[-1]).expand_as(matrices[0])  # [B, N, N]
    else:
        rows = source[:, None]  # [B, 1, N]
    rows = rows.to(matrices)
    for matrix in matrices.flip(
        0
    ):  # from the last layer to the first: a row times a matrix, not matrix by matrix
        rows = rows @ matrix
    return rows if source is None else rows.squeeze(1)


def attention_flow(attentions: Tensor, source: Tensor, residual: bool = True) -> Tensor:
    """The most that can flow from the source to each input token when Â are capacities: [B, N], exact max-flow.

    Abnar & Zuidema 2020, section 3: node (l, i) has an edge of capacity Â_l[i, j] to node (l-1, j); here a source node
    stands above the last layer, with an edge of capacity source[i] to each of its tokens. Capacities are rounded down
    to multiples of 1 / 2³⁰, so a value is low by at most that times the number of edges in the smallest cut, besides
    the rounding of the attentions' own type. About L·N² steps a token: seconds for a picture of ViT-B/16.
    """
    matrices = fuse_heads(attentions, residual=residual).double().numpy()  # [L, B, N, N]
    examples = [(matrices[:, b], source[b].double().numpy()) for b in range(matrices.shape[1])]
    return torch.from_numpy(np.stack(flows(examples))).to(attentions.dtype)


def input_bound(attentions: Tensor, residual: bool = True) -> Tensor:
    """No flow is larger than this: min(1, all capacity that leads into an input token), the cut at the input, [B, N].

    With the residual it is min(1, ½ + ½ · column sum of the first layer's attention): no later layer and no source.
    """
    return fuse_heads(attentions[:1], residual=residual)[0].sum(dim=1).clamp_max(1.0)


def relevance(
    model, images: dict, texts: dict, layers=slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """What in picture and caption makes them similar: image scores [B, N], text scores [B, T], similarity [B].

    Chefer et al. 2021 (arXiv 2103.15679), equations 5 and 6, for each tower: R ← R + (∇A ∘ A)⁺ R over its layers, with
    ∇A the gradient of the pair's cosine, heads averaged; the source's row of R - I. images, texts: as for `forward`,
    pair b in row b; layers: as in `record`, of both towers, such as slice(-1, None). One forward and one backward pass.
    """
    pairs = (model.image_tower, images), (model.text_tower, texts)
    with (
        training_mode(model, False),  # the heads drop nothing either
        showing_attention(model.image_tower),
        showing_attention(model.text_tower),
        torch.enable_grad(),
    ):
        runs = [forward(tower, batch, trace=True) for tower, batch in pairs]
        sources = [
            pooling(batch, h.shape[1]).to(h) for (_, batch), (_, h) in zip(pairs, runs, strict=True)
        ]
        pooled = [torch.einsum("bn,bnd->bd", s, h) for s, (_, h) in zip(sources, runs, strict=True)]
        similarity = (model.project_image(pooled[0]) * model.project_text(pooled[1])).sum(
            dim=-1
        )  # [B]
        asked = [_asked(attentions, layers) for attentions, _ in runs]
        gradients = list(
            torch.autograd.grad(similarity.sum(), [a for tower in asked for a in tower])
        )
    scores = []
    for source, attentions in zip(sources, asked, strict=True):
        positive = [
            (gradients.pop(0) * a.detach()).clamp_min(0).mean(dim=1) for a in attentions
        ]  # L times [B, N, N]
        source = source[:, None]  # [B, 1, N]
        gained = torch.zeros_like(
            source
        )  # the source's row of (I + last) · … · (I + first), without the source itself
        for matrix in reversed(positive):
            gained = gained + (source + gained) @ matrix
        scores.append(gained.squeeze(1).float().cpu())
    return scores[0], scores[1], similarity.detach().float().cpu()


def look(
    tower, batch: dict, method: str, layers=slice(None), source: int | None = None, **options
) -> Tensor:
    """Scores of one tower's tokens [B, N] by "raw", "rollout" or "flow"; source: a token, by default the pooling."""
    if method not in METHODS[:3]:
        alone = ", ".join(METHODS[:3])
        raise ValueError(
            f"method is {method!r}: a tower is read by {alone}, a pair by relevance (see `explain`)"
        )
    attentions = record(tower, batch, layers)
    examples, tokens = attentions.shape[1], attentions.shape[-1]
    start = pooling(batch, tokens).cpu() if source is None else one_token(source, examples, tokens)
    return {"raw": raw_attention, "rollout": rollout, "flow": attention_flow}[method](
        attentions, start, **options
    )


def batches(model, images: list, captions: list[str]) -> tuple[dict, dict]:
    """Pictures (PIL) and captions as the two towers read them, on the model's device."""
    device = model.logit_scale.device
    pixels = torch.stack([model.image_tower.preprocess(image) for image in images])
    tokens = model.text_tower.tokenize(captions)
    return {"pixel_values": pixels.to(device)}, {
        name: values.to(device) for name, values in tokens.items()
    }


def explain(
    model,
    images: list,
    captions: list[str],
    method: str = "relevance",
    layers=slice(None),
    **options,
):
    """Maps of pictures and captions, pair by pair: ([B, gh, gw], B times `Words`) by one of METHODS.

    options: for "raw" head and layer, for "rollout" fuse and discard, for "flow" residual.
    """
    seen, read = batches(model, images, captions)
    if method == "relevance":
        of_patches, of_tokens, _ = relevance(model, seen, read, layers, **options)
    else:
        of_patches = look(model.image_tower, seen, method, layers, **options)
        of_tokens = look(model.text_tower, read, method, layers, **options)
    grids = patch_grid(model.image_tower, seen["pixel_values"], of_patches)
    return grids, word_scores(model.text_tower, read["input_ids"], of_tokens)


# What a method does not read, by the names of an explorer's controls, and why.
SEVERAL, MEAN = "it goes through several", "it takes the mean of all"
UNREAD = {
    "raw": {"layers": "it looks at one"},
    "rollout": {"layer": SEVERAL, "head": MEAN},
    "flow": {"layer": SEVERAL, "head": MEAN},
    "relevance": {
        "tower": "it reads both at once",
        "head": "it weighs each by its gradient",
        "layer": SEVERAL,
        "source": "it starts where the cosine does, at the pooling",
    },
}


def limits(method: str) -> str:
    """What cannot change the maps of a method, in a sentence or two."""
    unread = ", ".join(f"{name} ({why})" for name, why in UNREAD[method].items())
    told = f"{method.capitalize()} does not read: {unread}."
    if method == "relevance":
        return told
    return f"{told} The caption cannot change the map, nor the picture the bars: each tower is read by itself."


class Seen(NamedTuple):
    """A map over patches [gh, gw], the caption's words with their scores, and the cosine of the two."""

    grid: Tensor
    words: Words
    cosine: float


def depth(tower) -> tuple[int, int]:
    """A tower's layers and the heads in each."""
    return tower.model.config.num_hidden_layers, tower.model.config.num_attention_heads


def patches(tower) -> tuple[int, int]:
    """The grid (gh, gw) that a tower cuts its pictures into."""
    return grid_of(tower, tower.size, tower.size)


def words_of(tower, caption: str) -> list[tuple[str, list[int]]]:
    """A caption's words as the tower reads them, each with the positions of its pieces among the tokens."""
    return whole_words(tower, tower.tokenize([caption])["input_ids"][0].tolist())


class Maps:
    """The maps of single pictures and captions under a model that does not change meanwhile; the last ones are kept."""

    def __init__(self, model: CLIP):
        self.model = model
        self.towers = {"image": model.image_tower, "text": model.text_tower}
        self._recorded = lru_cache(8)(self._record)  # up to 20 MB each for a ViT-B/16
        self._scored, self._related, self._embedded = (
            lru_cache(64)(f) for f in (self._score, self._relate, self._embed)
        )

    def see(
        self,
        image,
        caption: str,
        method: str,
        tower: str = "image",
        layer: int = -1,
        layers=(0, None),
        head: int | None = None,
        source=None,
    ) -> Seen:
        """The maps of a picture (PIL) and a caption by one of METHODS.

        tower ("image" or "text"): the one that is read from `source` through `layer` and `head` (raw) or `layers`, a
        range (first, stop) counted from 0; the other is read from its pooling through all layers. source: None for the
        pooling, a patch (row, column), or the number of a word. `UNREAD` says what a method does not look at.
        Raises ValueError for an empty caption.
        """
        if not caption.strip():
            raise ValueError("Type a caption, then press Enter.")
        content = {"image": self._pixels(image), "text": caption}
        if method == "relevance":
            *scores, cosine = self._related(content["image"], caption, layers)
        else:
            cosine = self._embedded("image", content["image"]) @ self._embedded("text", caption)
            asked = {"image": (-1, (0, None), None, None), "text": (-1, (0, None), None, None)}
            asked[tower] = (
                (layer, (0, None), head, source) if method == "raw" else (-1, layers, None, source)
            )
            scores = [
                self._scored(name, content[name], method, *asked[name])
                for name in ("image", "text")
            ]
        batch = self._batch("image", content["image"])
        grid = patch_grid(self.model.image_tower, batch["pixel_values"], scores[0])[0]
        ids = self._batch("text", caption)["input_ids"]
        return Seen(grid, word_scores(self.model.text_tower, ids, scores[1])[0], float(cosine))

    def _pixels(self, image) -> bytes:
        return self.model.image_tower.preprocess(image).numpy().tobytes()

    def _batch(self, name: str, content) -> dict[str, Tensor]:
        device = self.model.logit_scale.device
        if name == "text":
            return {
                key: ids.to(device)
                for key, ids in self.model.text_tower.tokenize([content]).items()
            }
        size = self.model.image_tower.size
        pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(1, 3, size, size)
        return {"pixel_values": pixels.to(device)}

    def _record(self, name, content):
        return record(self.towers[name], self._batch(name, content))  # [L, 1, H, N, N]

    def _embed(self, name, content):
        batch = self._batch(name, content)
        encode = self.model.encode_image if name == "image" else self.model.encode_text
        with torch.no_grad():
            return encode(**batch)[0].float().cpu()

    def _relate(self, content, caption, layers):
        batches = self._batch("image", content), self._batch("text", caption)
        return relevance(self.model, *batches, slice(*layers))

    def _score(self, name, content, method, layer, layers, head, source) -> Tensor:
        attentions = self._recorded(name, content)
        start = self._source(name, content, source, attentions.shape[-1])
        if method == "raw":
            return raw_attention(attentions, start, layer, head)
        return {"rollout": rollout, "flow": attention_flow}[method](attentions[slice(*layers)], start)

    def _source(self, name, content, source, tokens) -> Tensor:
        """Where a reading starts: a distribution [1, N]."""
        if source is None:
            return pooling(self._batch(name, content), tokens).cpu()
        if name == "image":
            columns = patches(self.model.image_tower)[1]
            return one_token(1 + source[0] * columns + source[1], 1, tokens)
        pieces = words_of(self.model.text_tower, content)[source][1]
        return torch.stack([one_token(i, 1, tokens) for i in pieces]).mean(dim=0)
