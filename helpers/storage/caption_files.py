"""COCO's annotation files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from helpers.storage.download import WHERE

FIX = "Delete it and fetch or render it again."
STRANGER = f"Is it an annotation file of COCO 2017? {WHERE}"


def read_captions(path) -> tuple[dict[int, str], dict[int, list[str]], str]:
    """Reads annotations/captions_*.json; full COCO takes seconds.

    Returns {image id: file name} and {image id: captions by annotation id}, both by ascending
    image id, and the file's SHA-256. An image may be without captions. Raises FileNotFoundError
    or ValueError with what is wrong in which file.
    """
    data, digest = read_json(path, "images", "annotations")
    try:
        files = dict(sorted((image["id"], image["file_name"]) for image in data["images"]))
        captions = {image_id: [] for image_id in files}
        for row in sorted(data["annotations"], key=lambda row: row["id"]):
            captions[row["image_id"]].append(row["caption"])
    except KeyError as error:
        raise ValueError(f"{path}: an entry or a listed image lacks {error}. {STRANGER}") from None
    return files, captions, digest


def read_json(path, *keys) -> tuple[dict, str]:
    """The object in a JSON file, which must have `keys`, and the file's SHA-256."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist. {WHERE}")
    content = Path(path).read_bytes()
    try:
        data = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}). {FIX}") from None
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise ValueError(f"{path} has no `{key}`. {STRANGER}")
    return data, hashlib.sha256(content).hexdigest()


def some(items) -> str:
    """The first three of them, and how many more there are."""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return ", ".join(map(str, items[:3])) + more


def refuse_unknown_words(tower, texts: list[str]) -> None:
    """ValueError where the tokenizer does not know a fifth of the words of a thousand captions.

    A folder without tokenizer files gives a vocabulary of five.
    """
    some = texts[:: max(1, len(texts) // 1000)]
    unknown = tower.tokenize(some)["input_ids"] == tower.tokenizer.unk_token_id  # [B, T]
    share = unknown.sum().item() / sum(len(text.split()) for text in some)
    if share >= 0.2:
        examples = [some[i][:80] for i in unknown.any(dim=1).nonzero().flatten()[:3]]
        raise ValueError(
            f"The text tower's vocabulary of {len(tower.tokenizer):,} lacks {share:.0%} of the "
            f"captions' words, as in {examples}: is its vocab.txt or tokenizer.json missing or "
            "another model's? For captions in another language name a multilingual text tower in "
            "CLIP_TEXT_MODEL, such as google-bert/bert-base-multilingual-uncased."
        )
