"""Profiles: names, sizes, paths, and what the environment changes."""

import pytest
import torch

from helpers.config import ROOT, get_profile, machine, pick_device


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Empty variables count as unset."""
    names = "PROFILE COCO_DIR DEVICE RESULTS TRAINED IMAGE_MODEL TEXT_MODEL DATA"
    for name in names.split():
        monkeypatch.setenv(f"CLIP_{name}", "")


def test_mini_is_the_default_and_the_environment_wins(monkeypatch):
    assert get_profile().name == "mini"
    monkeypatch.setenv("CLIP_PROFILE", "smoke")
    assert get_profile().name == get_profile("coco").name == "smoke"
    assert get_profile().cache == ROOT / "data/cache/smoke"


def test_other_towers_make_another_profile(monkeypatch):
    mini = get_profile("mini")
    monkeypatch.setenv("CLIP_IMAGE_MODEL", mini.image_model)
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
    assert get_profile("coco").data == ROOT / "data/coco"
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


def test_device_and_machine(monkeypatch):
    assert pick_device().type in ("cpu", "cuda")
    monkeypatch.setenv("CLIP_DEVICE", "meta")
    assert pick_device() == torch.device("meta")
    row = machine()
    assert set(row) == {"cpu", "cores", "gpu"} and row["cpu"] and row["cores"] >= 1
