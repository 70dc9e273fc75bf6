"""Maps of one picture and one caption, by any method and setting, each computed once: what the explorers show."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from helpers import attention
from helpers.attention import one_token, pooling, record
from helpers.model import CLIP
from helpers.tokens import Words, grid_of, patch_grid, whole_words, word_scores

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

    def see(self, image, caption: str, method: str, tower: str = "image", layer: int = -1, layers=(0, None),
            head: int | None = None, source=None) -> Seen:  # fmt: skip
        """The maps of a picture (PIL) and a caption by one of attention.METHODS.

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
            asked[tower] = (layer, (0, None), head, source) if method == "raw" else (-1, layers, None, source)
            scores = [self._scored(name, content[name], method, *asked[name]) for name in ("image", "text")]
        batch = self._batch("image", content["image"])
        grid = patch_grid(self.model.image_tower, batch["pixel_values"], scores[0])[0]
        ids = self._batch("text", caption)["input_ids"]
        return Seen(grid, word_scores(self.model.text_tower, ids, scores[1])[0], float(cosine))

    def _pixels(self, image) -> bytes:
        return self.model.image_tower.preprocess(image).numpy().tobytes()

    def _batch(self, name: str, content) -> dict[str, Tensor]:
        device = self.model.logit_scale.device
        if name == "text":
            return {key: ids.to(device) for key, ids in self.model.text_tower.tokenize([content]).items()}
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
        return attention.relevance(self.model, *batches, slice(*layers))

    def _score(self, name, content, method, layer, layers, head, source) -> Tensor:
        attentions = self._recorded(name, content)
        start = self._source(name, content, source, attentions.shape[-1])
        if method == "raw":
            return attention.raw_attention(attentions, start, layer, head)
        return {"rollout": attention.rollout, "flow": attention.flow}[method](attentions[slice(*layers)], start)

    def _source(self, name, content, source, tokens) -> Tensor:
        """Where a reading starts: a distribution [1, N]."""
        if source is None:
            return pooling(self._batch(name, content), tokens).cpu()
        if name == "image":
            columns = patches(self.model.image_tower)[1]
            return one_token(1 + source[0] * columns + source[1], 1, tokens)
        pieces = words_of(self.model.text_tower, content)[source][1]
        return torch.stack([one_token(i, 1, tokens) for i in pieces]).mean(dim=0)
