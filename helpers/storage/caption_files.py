"""COCO's annotation files: read once, whole, into flat arrays that worker processes share."""

from __future__ import annotations

import hashlib
import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from helpers.storage.download import WHERE


class Captions(NamedTuple):
    """A captions file as flat arrays: no Python object per caption, so that workers share the memory."""

    digest: str  # SHA-256 of the file
    image_ids: np.ndarray  # [N] int64, ascending
    files: np.ndarray  # [N] file names
    starts: np.ndarray  # [N+1] image i has the captions starts[i] … starts[i+1]-1, by annotation id
    offsets: np.ndarray  # [M+1] caption c is utf8[offsets[c]:offsets[c+1]]
    utf8: np.ndarray  # uint8


def read_captions(path) -> Captions:
    """Reads annotations/captions_*.json. Raises FileNotFoundError or ValueError naming what is missing in it."""
    data, digest = read_json(path, "images", "annotations")
    images, annotations = data["images"], data["annotations"]
    try:
        image_ids = np.array([image["id"] for image in images], np.int64)
        files = np.array([image["file_name"] for image in images], np.str_)
        owners = np.array([annotation["image_id"] for annotation in annotations], np.int64)
        order = np.lexsort(
            (np.array([annotation["id"] for annotation in annotations], np.int64), owners)
        )
        texts = [annotations[k]["caption"].encode("utf-8", "surrogatepass") for k in order]
    except KeyError as error:
        raise ValueError(
            f"{path}: an entry lacks {error}. Is it a captions_*.json of COCO 2017? {WHERE}"
        ) from None
    rows = np.argsort(image_ids)
    image_ids, owners = image_ids[rows], owners[order]
    if len(twice := image_ids[1:][np.diff(image_ids) == 0]):
        raise ValueError(
            f"{path}: image {twice[0]} is listed twice under `images`. Fetch or render the file again."
        )
    if len(strays := np.setdiff1d(owners, image_ids)):
        raise ValueError(
            f"{path}: image {strays[0]} has captions but is not under `images`. Fetch or render it again."
        )
    return Captions(
        digest,
        image_ids,
        files[rows],
        starts=np.append(np.searchsorted(owners, image_ids), len(owners)),
        offsets=np.cumsum([0, *map(len, texts)]),
        utf8=np.frombuffer(
            bytearray().join(texts), np.uint8
        ),  # of a bytearray: PyTorch warns of what is read-only
    )


_sent: dict[str, list[torch.Tensor]] = {}  # digest → the arrays, as PyTorch shares them


def _send(table: Captions):
    """To a spawned worker: as tensors, which PyTorch holds once for all processes. Forked workers share anyway."""
    if table.digest not in _sent:
        _sent[table.digest] = [torch.from_numpy(array.view(np.uint8)) for array in table[1:]]
    return _receive, (table.digest, [array.dtype for array in table[1:]], _sent[table.digest])


def _receive(digest: str, dtypes, tensors) -> Captions:
    return Captions(digest, *(tensor.numpy().view(dtype) for tensor, dtype in zip(tensors, dtypes)))


ForkingPickler.register(Captions, _send)


def read_json(path, *keys) -> tuple[dict, str]:
    """The object in a JSON file, which must have `keys`, and the file's SHA-256."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist. {WHERE}")
    raw = Path(path).read_bytes()
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise ValueError(
            f"{path} is no whole JSON file ({error}). Delete it and fetch or render it again."
        ) from None
    for key in keys:
        if not isinstance(data, dict) or key not in data:
            raise ValueError(
                f"{path} has no `{key}`. Is it an annotation file of COCO 2017? {WHERE}"
            )
    return data, hashlib.sha256(raw).hexdigest()
