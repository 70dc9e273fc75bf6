"""Frozen embeddings: each image and each distinct caption goes through its tower once.

The cache is a folder of shards named after all that shapes an embedding: weights, data,
preprocessing. A changed input asks for another folder, so it never meets a stale one; a killed run
goes on where its last finished shard ends.
"""

import hashlib
import json
import math
import sys
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from helpers.config import pick_device
from helpers.encoders import settings
from helpers.model import training_mode
from helpers.storage.caption_files import refuse_unknown_words
from helpers.storage.checkpoints import weights_digest
from helpers.storage.images import prefetch
from helpers.storage.shards import read_shard, write_shard
from helpers.storage.towers import report_cut_captions

ON_CPU = 32  # images or captions that one core embeds at a time, beside the others
DELAY = 2  # seconds before a bar appears: what is in the cache is read without one


@dataclass
class Embeddings:
    """The frozen features of a set of captioned images, all on the CPU in float32."""

    image_embeds: Tensor  # [N, D_image]
    text_embeds: Tensor  # [M, D_text], one row per caption
    owner: Tensor  # int64 [M]: caption m describes image owner[m], an index into the N images
    image_ids: Tensor  # int64 [N]
    captions: list[str]  # [M]
    shared_captions: bool = False


def extract_embeddings(
    image_tower, text_tower, dataset, cache, batch_size=128, shard_size=2048, progress=True
) -> Embeddings:
    """Embed all images and captions of CaptionedImages, or read what a run has left in `cache`.

    Runs on the GPU in mixed precision when there is one. A shard of the cache holds `shard_size`
    rows; one that is missing or cut short is computed again. Raises ValueError for captions that
    the text tower's tokenizer does not know.
    """
    captions, owner = dataset.all_captions()
    texts, rows = _distinct(captions)
    image_ids = np.asarray(dataset.image_ids)
    image_key = {"data": dataset.fingerprint(), "ids": _digest(image_ids.tobytes())}
    text_key = {"texts": _digest(json.dumps(texts).encode())}
    image_folder = Path(cache, f"images-{_key(image_tower, image_key)}")
    text_folder = Path(cache, f"captions-{_key(text_tower, text_key)}")
    if not text_folder.is_dir():
        refuse_unknown_words(text_tower, texts)
        report_cut_captions(text_tower, texts)
    with _bar("images and captions", len(dataset) + len(texts), progress) as bar:
        sizes = {"batch_size": batch_size, "shard_size": shard_size, "bar": bar}
        image_embeds = _embed(_image_batches, image_tower, dataset, folder=image_folder, **sizes)
        text_embeds = _embed(_text_batches, text_tower, texts, folder=text_folder, **sizes)[rows]
    owner, image_ids = torch.as_tensor(owner), torch.as_tensor(image_ids)
    shared = dataset.shared_captions
    return Embeddings(image_embeds, text_embeds, owner, image_ids, captions, shared)


def embed_images(tower, images, batch_size=128, progress=False) -> Tensor:
    """Embed images without a cache: float32 [N, D] on the CPU.

    images: CaptionedImages or LabelledImages, or a list of PIL images.
    """
    with _bar("images", len(images), progress) as bar:
        return _embed(_image_batches, tower, images, batch_size, bar)


def embed_texts(tower, texts, batch_size=128) -> Tensor:
    """Embed captions without a cache, each distinct one once: M strings to float32 [M, D]."""
    distinct, rows = _distinct(texts)
    with _bar("captions", len(distinct), False) as bar:
        return _embed(_text_batches, tower, distinct, batch_size, bar)[rows]


def embed_batches(tower, batches):
    """Send batches through a frozen tower: yields each one's rows and embeddings, in order.

    batches: pairs of row numbers [B] and the tower's inputs by name. The embeddings [B, D] are on
    the tower's device. On a GPU in mixed precision; on a CPU one batch a core, each in one thread,
    since cores that share a batch wait for each other in every operation.
    Taught in notebook 02, "Extraction: every picture and every caption once".
    """
    device = next(tower.parameters()).device
    cuda = device.type == "cuda"
    cores = torch.get_num_threads()

    @torch.inference_mode()
    def embed(batch):
        torch.set_num_threads(1)
        rows, inputs = batch
        if cuda:
            inputs = {name: t.pin_memory() for name, t in inputs.items()}
        inputs = {name: t.to(device, non_blocking=cuda) for name, t in inputs.items()}
        with torch.autocast(device.type, torch.float16, enabled=cuda):
            return rows, tower(**inputs)

    at_once = cores if device.type == "cpu" else 1
    try:
        yield from prefetch(embed, batches, workers=at_once, ahead=at_once)
    finally:
        torch.set_num_threads(cores)


def _image_batches(tower, images, shards, batch_size):
    """The images of these shards, batch by batch, decoded in the background."""

    def load(rows):
        opened = (images.image(i) if hasattr(images, "image") else images[i] for i in rows.tolist())
        return rows, {"pixel_values": torch.stack([tower.preprocess(image) for image in opened])}

    return prefetch(load, (rows for shard in shards for rows in shard.split(batch_size)))


def _text_batches(tower, texts, shards, batch_size):
    """The texts of these shards: in each, those of one length together, cut to the longest."""

    def tokenize(rows):
        return rows, tower.tokenize([texts[i] for i in rows.tolist()])

    # One thread: a tokenizer is not safe in two.
    for rows, tokens in prefetch(tokenize, shards, workers=1):
        lengths = tokens["attention_mask"].sum(dim=1)
        for part in lengths.argsort().split(batch_size):
            width = lengths[part].max()
            yield rows[part], {name: t[part, :width] for name, t in tokens.items()}


def _distinct(texts: list[str]) -> tuple[list[str], Tensor]:
    """The distinct texts, shortest first, so that batches need little padding; and their rows."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: i for i, text in enumerate(distinct)}
    return distinct, torch.tensor([row[text] for text in texts], dtype=torch.long)


def _bar(what, total, progress):
    return tqdm(desc=what, total=total, file=sys.stdout, delay=DELAY, disable=not progress)


def _embed(make_batches, tower, data, batch_size, bar, folder=None, shard_size=2048):
    """All embeddings [N, D], shard by shard, from the cache in `folder` where it has them."""
    if pick_device().type == "cpu":
        batch_size = min(batch_size, ON_CPU)
    output = torch.empty(len(data), tower.dim)
    shards = [rows for rows in torch.arange(len(data)).split(shard_size) if len(rows)]
    missing = [rows for rows in shards if folder is None or not read_shard(folder, rows, output)]
    bar.update(len(data) - sum(map(len, missing)))
    if not missing:
        return output
    with (
        _frozen(tower),
        closing(make_batches(tower, data, missing, batch_size)) as batches,
        closing(embed_batches(tower, batches)) as embedded,
    ):
        for rows in missing:
            parts = []
            for part in islice(embedded, math.ceil(len(rows) / batch_size)):
                parts.append(part)
                bar.update(len(part[0]))
            # Only now, so that a GPU is never waited for between two batches.
            for batch, embeds in parts:
                output[batch] = embeds.float().cpu()
            if folder is not None:
                write_shard(folder, rows, output)
    return output


@contextmanager
def _frozen(tower):
    """The tower on the best device and in eval mode; afterwards each module as it was."""
    home = next(tower.parameters()).device
    try:
        with training_mode(tower, False):
            yield tower.to(pick_device())
    finally:
        tower.to(home)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(tower, data: dict) -> str:
    """Names all that shapes the embeddings that this tower makes of this data."""
    key = {"weights": weights_digest(tower), "settings": settings(tower), **data}
    return _digest(json.dumps(key, sort_keys=True).encode())[:24]
