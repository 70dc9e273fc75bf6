"""What a reader sees of the towers' tokens: a grid over a picture's patches, the whole words of a caption."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
        aside = sum(v for k, v in enumerate(row) if k not in inside and ids[k] != tower.tokenizer.pad_token_id)
        told.append(Words([word for word, _ in words], torch.tensor(values), aside / max(aside + sum(values), 1e-12)))
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
