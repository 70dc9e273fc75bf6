"""A table of embeddings on disk, in shards: some rows each, whole or not at all."""

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from helpers.storage.files import replace_when_complete


def shard_path(folder, rows):
    return folder / f"{rows[0]:08d}-{rows[-1] + 1:08d}.safetensors"


def write_shard(folder, rows, table):
    """Write table[rows]; rows [R] are consecutive."""
    with replace_when_complete(shard_path(folder, rows)) as partial:
        save_file({"features": table[rows]}, partial)


def read_shard(folder, rows, table):
    """Fill table[rows] [R, D] from disk; False where there is no whole shard of this shape."""
    try:
        features = load_file(shard_path(folder, rows))["features"]
    except (OSError, SafetensorError, KeyError):
        return False
    if features.shape != table[rows].shape:
        return False
    table[rows] = features
    return True
