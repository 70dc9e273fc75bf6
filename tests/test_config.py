"""Profiles: names, sizes, paths, and what the environment changes."""

import pytest
import torch

from helpers.config import ROOT, get_profile, machine, pick_device


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    names = ["CLIP_PROFILE", "CLIP_COCO_DIR", "CLIP_DEVICE", "CLIP_RESULTS", "CLIP_TRAINED"]
    for name in [*names, "CLIP_IMAGE_MODEL", "CLIP_TEXT_MODEL"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["smoke", "mini", "coco-val", "coco"])
def test_every_profile_is_complete(name):
    profile = get_profile(name)
    assert profile.name == name and profile.cache == ROOT / "data/cache" / name
    assert profile.train_images is None or profile.train_images > profile.dev_images
    assert profile.seeds >= 1 and profile.head_epochs >= 1 and profile.max_length == 64


def test_mini_is_the_default_and_the_environment_wins(monkeypatch):
    assert get_profile().name == "mini"
    monkeypatch.setenv("CLIP_PROFILE", "smoke")
    assert get_profile().name == get_profile("coco").name == "smoke"


def test_other_towers_make_another_profile(monkeypatch):
    mini = get_profile("mini")
    monkeypatch.setenv("CLIP_IMAGE_MODEL", mini.image_model)
    monkeypatch.setenv("CLIP_TEXT_MODEL", "")
    assert get_profile("mini") == mini
    monkeypatch.setenv("CLIP_TEXT_MODEL", "FacebookAI/roberta-base")
    other = get_profile("mini")
    assert other.name.startswith("mini-tiny-vit-roberta-base-")
    assert other.text_model == "FacebookAI/roberta-base" and other.data == mini.data
    for place in ("cache", "trained", "results"):
        assert getattr(other, place) not in (mini.cache, mini.trained, mini.results)
    monkeypatch.setenv("CLIP_TEXT_MODEL", "elsewhere/roberta-base")
    assert get_profile("mini").name != other.name


def test_unknown_profile_lists_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match="PROFILE is 'big'.*smoke, mini, coco-val, coco"):
        get_profile("big")
    monkeypatch.setenv("CLIP_PROFILE", "huge")
    with pytest.raises(ValueError, match="CLIP_PROFILE is 'huge'"):
        get_profile("mini")


def test_paths_follow_the_environment(monkeypatch, tmp_path):
    assert get_profile("mini").results == ROOT / "data/results"
    assert get_profile("smoke").results == ROOT / "data/results/smoke"
    assert get_profile("mini").trained == ROOT / "assets"
    monkeypatch.setenv("CLIP_COCO_DIR", str(tmp_path))
    monkeypatch.setenv("CLIP_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("CLIP_TRAINED", str(tmp_path / "trained"))
    assert get_profile("coco").data == get_profile("coco-val").data == tmp_path
    assert get_profile("mini").results == tmp_path / "results"
    assert get_profile("mini").trained == tmp_path / "trained"
    assert get_profile("smoke").trained == get_profile("smoke").cache


def test_an_empty_variable_counts_as_unset(monkeypatch):
    for name in ("CLIP_PROFILE", "CLIP_COCO_DIR", "CLIP_DEVICE", "CLIP_RESULTS", "CLIP_TRAINED"):
        monkeypatch.setenv(name, "")
    assert get_profile("coco").data == ROOT / "data/coco"
    assert get_profile("mini").results == ROOT / "data/results"
    assert get_profile("mini").trained == ROOT / "assets"
    assert pick_device().type in ("cpu", "cuda")


def test_device_and_machine(monkeypatch):
    monkeypatch.setenv("CLIP_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    row = machine()
    assert set(row) == {"cpu", "cores", "gpu"} and row["cpu"] and row["cores"] >= 1
