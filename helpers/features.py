"""Frozen embeddings: every picture and every distinct caption goes through its tower once, and the result is kept.

The cache is a folder of shards named after all that shapes an embedding: weights, data, preprocessing. A changed input
asks for another folder, so it never meets a stale one; a killed run goes on where its last finished shard ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from helpers.config import pick_device
from helpers.data import WORKERS, CaptionedImages, prefetch
from helpers.encoders import ImageTower, TextTower, weights_digest
from helpers.storage.files import replace_when_complete
from helpers.storage.images import open_image

ON_CPU = 32  # pictures or captions that one thread of a CPU embeds at a time, beside others: each core on its own
Batch = tuple[np.ndarray, dict[str, Tensor]]  # row numbers [B] and the tower's inputs for them


@dataclass
class Embeddings:
    """The frozen features of a set of captioned pictures, all on the CPU in float32."""

    image_embeds: Tensor  # [N, D_image]
    text_embeds: Tensor  # [M, D_text], one row per caption
    owner: Tensor  # int64 [M]: caption m describes image owner[m], an index into the N images
    image_ids: Tensor  # int64 [N]
    captions: list[str]  # [M]


def extract_embeddings(
    image_tower: ImageTower,
    text_tower: TextTower,
    dataset: CaptionedImages,
    cache: Path,
    batch_size: int = 128,
    shard_size: int = 2048,
    progress: bool = True,
) -> Embeddings:
    """Embed all pictures and captions of a dataset, or read what an earlier run has left in `cache`.

    Runs on the GPU in mixed precision when there is one. A shard of the cache holds `shard_size` rows; one that is
    missing, cut short or altered is computed again.
    """
    captions, owner = dataset.all_captions()
    texts, rows = _distinct(captions)
    image_key = {
        "data": dataset.fingerprint(),
        "ids": _digest(np.asarray(dataset.image_ids).tobytes()),
    }
    text_key = {"texts": _digest(json.dumps(texts).encode())}
    options = {"batch_size": batch_size, "shard_size": shard_size, "progress": progress}
    return Embeddings(
        image_embeds=_embed_images(
            image_tower, dataset, _folder(cache, "images", image_tower, image_key), **options
        ),
        text_embeds=_embed_texts(
            text_tower, texts, _folder(cache, "captions", text_tower, text_key), **options
        )[rows],
        owner=torch.as_tensor(owner),
        image_ids=torch.as_tensor(dataset.image_ids),
        captions=captions,
    )


def embed_images(
    tower: ImageTower, images, batch_size: int = 128, progress: bool = False
) -> Tensor:
    """Embed pictures without a cache: a dataset, or a list of PIL images or paths, to float32 [N, D] on the CPU."""
    return _embed_images(tower, images, None, batch_size, progress=progress)


def embed_texts(
    tower: TextTower, texts: list[str], batch_size: int = 128, progress: bool = False
) -> Tensor:
    """Embed captions without a cache, each distinct one once: M strings to float32 [M, D] on the CPU."""
    distinct, rows = _distinct(texts)
    return _embed_texts(tower, distinct, None, batch_size, progress=progress)[rows]


def _distinct(texts: list[str]) -> tuple[list[str], Tensor]:
    """The distinct texts, shortest first so that batches need little padding, and for each text its row in them."""
    distinct = sorted(set(texts), key=lambda text: (len(text), text))
    row = {text: i for i, text in enumerate(distinct)}
    return distinct, torch.tensor([row[text] for text in texts], dtype=torch.long)


def _embed_images(tower, images, folder, batch_size, shard_size=2048, progress=False) -> Tensor:
    batch_size = _at_once(batch_size)

    def load(rows: np.ndarray) -> list[Batch]:
        pictures = [tower.preprocess(_open(images, int(i), tower.size)) for i in rows]
        return [(rows, {"pixel_values": torch.stack(pictures)})]  # uint8 [B, 3, H, W]

    def units(shard: np.ndarray) -> list[np.ndarray]:
        return [shard[i : i + batch_size] for i in range(0, len(shard), batch_size)]

    return _embed(
        tower, len(images), load, units, folder, batch_size, shard_size, progress and "images"
    )


def _embed_texts(tower, texts, folder, batch_size, shard_size=2048, progress=False) -> Tensor:
    batch_size = _at_once(batch_size)

    def load(rows: np.ndarray) -> list[Batch]:
        tokens = tower.tokenize([texts[i] for i in rows])
        lengths = tokens["attention_mask"].sum(dim=1)
        batches = []
        for batch in lengths.argsort().split(
            batch_size
        ):  # texts of one length together, cut to the longest
            width = int(lengths[batch].max())
            batches.append(
                (rows[batch.numpy()], {name: t[batch, :width] for name, t in tokens.items()})
            )
        return batches

    # A whole shard at a time, so that there is something to sort; one thread, since a tokenizer is not thread-safe.
    name = progress and "captions"
    return _embed(
        tower,
        len(texts),
        load,
        lambda shard: [shard],
        folder,
        batch_size,
        shard_size,
        name,
        workers=1,
    )


def _at_once(batch_size: int) -> int:
    return min(batch_size, ON_CPU) if pick_device().type == "cpu" else batch_size


def _open(images, i: int, size: int) -> Image.Image:
    if hasattr(images, "image"):
        return images.image(i, size=size)
    return images[i] if isinstance(images[i], Image.Image) else open_image(images[i], size=size)


def _embed(
    tower: nn.Module,
    count: int,
    load: Callable[[np.ndarray], list[Batch]],
    units: Callable[[np.ndarray], list[np.ndarray]],
    folder: Path | None,
    batch_size: int,
    shard_size: int,
    progress: str | bool,
    workers: int = WORKERS,
) -> Tensor:
    """Fill [count, D] shard by shard, from the cache where it has them; `units` cuts a shard into what `load` loads."""
    output = torch.empty(count, tower.dim)
    shards = [
        np.arange(start, min(start + shard_size, count)) for start in range(0, count, shard_size)
    ]
    missing = [rows for rows in shards if folder is None or not _read_shard(folder, rows, output)]
    if not missing:
        return output
    total = sum(map(len, missing))
    bar = tqdm(
        total=count,
        initial=count - total,
        desc=progress or None,
        file=sys.stdout,
        disable=not progress,
    )
    loading = prefetch(load, (unit for rows in missing for unit in units(rows)), workers)
    with bar, closing(loading), _frozen(tower) as device, _forwards(tower, loading, device) as done:
        for rows in missing:
            parts = []
            for batch, features in islice(done, math.ceil(len(rows) / batch_size)):
                parts.append((batch, features))
                bar.update(len(batch))
            for (
                batch,
                features,
            ) in parts:  # only now, so that a GPU is never waited for between two batches
                output[batch] = features.float().cpu()
            if folder is not None:
                _write_shard(folder, rows, output)
    return output


@contextmanager
def _forwards(
    tower: nn.Module, loading: Iterable[list[Batch]], device: torch.device
) -> Iterator[Iterator]:
    """Each batch's row numbers with its features, in order.

    On a CPU one batch a core, each in one thread: cores that share a batch wait for each other in every operation.
    """

    def forward(batch: Batch) -> tuple[np.ndarray, Tensor]:
        return batch[0], _forward(tower, batch[1], device)

    batches, threads = chain.from_iterable(loading), torch.get_num_threads()
    if device.type != "cpu":
        yield map(forward, batches)
        return
    try:
        alone = partial(torch.set_num_threads, 1)
        with closing(prefetch(forward, batches, threads, threads, alone)) as done:
            yield done
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _frozen(tower: nn.Module) -> Iterator[torch.device]:
    """The tower on the best device and in eval mode; afterwards each module as it was."""
    home, modes = (
        next(tower.parameters()).device,
        [(module, module.training) for module in tower.modules()],
    )
    device = pick_device()
    try:
        tower.to(device).eval()
        yield device
    finally:
        tower.to(home)
        for module, mode in modes:
            module.training = mode


@torch.inference_mode()
def _forward(tower: nn.Module, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    if device.type == "cuda":
        inputs = {name: t.pin_memory().to(device, non_blocking=True) for name, t in inputs.items()}
    with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
        return tower(**{name: t.to(device) for name, t in inputs.items()})


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _folder(cache: Path, kind: str, tower: nn.Module, data: dict) -> Path:
    """The folder of the shards that this tower makes of this data."""
    key = {"weights": weights_digest(tower), "settings": tower.settings(), **data}
    return Path(cache) / f"{kind}-{_digest(json.dumps(key, sort_keys=True).encode())[:24]}"


def _shard_path(folder: Path, rows: np.ndarray) -> Path:
    return folder / f"{rows[0]:08d}-{rows[-1] + 1:08d}.safetensors"


def _write_shard(folder: Path, rows: np.ndarray, output: Tensor) -> None:
    """Keep output[rows] with its checksum: the file is there in full or not at all."""
    features = output[rows[0] : rows[-1] + 1]
    with replace_when_complete(_shard_path(folder, rows)) as partial:
        save_file({"features": features}, partial, metadata={"sha256": _digest(features.numpy())})


def _read_shard(folder: Path, rows: np.ndarray, output: Tensor) -> bool:
    """Fill output[rows] from the cache; False where there is no shard, or one that its checksum disowns."""
    path = _shard_path(folder, rows)
    try:
        with safe_open(path, framework="pt") as shard:
            features, expected = shard.get_tensor("features"), shard.metadata()["sha256"]
    except (OSError, SafetensorError, KeyError, TypeError):
        return False
    place = output[rows[0] : rows[-1] + 1]
    if (features.dtype, features.shape) != (place.dtype, place.shape) or _digest(
        features.numpy()
    ) != expected:
        return False
    place.copy_(features)  # tensors of a safetensors file can be unaligned; ours is not
    return True
