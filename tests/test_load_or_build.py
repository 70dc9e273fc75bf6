"""Load or build: results files, means over seeds, the gallery, heads and when they are rebuilt."""

import json
from dataclasses import replace

import numpy as np
import pytest

from helpers import load_or_build
from helpers.config import ROOT, get_profile
from helpers.training import History


def test_over_seeds_is_mean_and_sample_deviation_beside_chance_and_attainable():
    runs = [{"a/b": 0.1, "a/c": 1.0}, {"a/b": 0.3, "a/c": 1.0}]
    result = load_or_build.over_seeds(runs, {"a/b": 0.9}, {"a/c": 0.5}, prefix="m/")
    deviation = round(float(np.std([0.1, 0.3], ddof=1)), 5)
    assert result["m/a/b"] == {"mean": 0.2, "std": deviation, "attainable": 0.9, "seeds": 2}
    assert result["m/a/c"] == {"mean": 1.0, "std": 0.0, "chance": 0.5, "seeds": 2}


def test_results_are_written_unless_a_training_was_interrupted(smoke, capsys):
    metrics, whole = {"m/t/recall@1": {"mean": 0.5}}, History([{"epoch": 1}])
    path = load_or_build.save_results(smoke, "99", metrics, 1.23, [whole])
    content = json.loads(path.read_text())
    assert (content["notebook"], content["profile"], content["seconds"]) == ("99", "smoke", 1.2)
    assert set(content["machine"]) == {"cpu", "cores", "gpu"} and content["metrics"] == metrics
    assert [file.name for file in path.parent.iterdir()] == ["99.json"]
    cut = [whole, History([], interrupted=True)]
    assert load_or_build.save_results(smoke, "99", {}, 2.0, cut) is None
    assert "interrupted" in capsys.readouterr().out and json.loads(path.read_text()) == content


def test_the_gallery_is_the_same_with_and_without_data(smoke):
    drawings, captions = load_or_build.gallery(smoke, 5)
    assert not smoke.data.exists()
    load_or_build.data(smoke, "val")
    images, again = load_or_build.gallery(smoke, 5)
    assert captions == again
    for a, b in zip(drawings, images):  # apart from JPEG's rounding
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 4


def test_heads_are_trained_once_and_again_for_other_towers(smoke, monkeypatch, capsys):
    trainings, fit = [], load_or_build.fit
    monkeypatch.setattr(load_or_build, "fit", lambda *a, **k: trainings.append(1) or fit(*a, **k))
    first, again = load_or_build.heads(smoke), load_or_build.heads(smoke)
    assert len(trainings) == 1 and not first.training and not again.training
    for a, b in zip(first.image_head.parameters(), again.image_head.parameters()):
        assert a.equal(b)
    assert not again.history.interrupted and len(first.history) == smoke.head_epochs
    for row, loaded in zip(first.history, again.history, strict=True):
        assert loaded.items() <= row.items() and "losses" not in loaded
    load_or_build.heads(smoke, rebuild=True)
    monkeypatch.setattr(load_or_build, "weights_digest", lambda tower: "another tower")
    load_or_build.heads(smoke)
    assert len(trainings) == 3 and list(load_or_build.models(smoke)) == ["projection"]


@pytest.mark.parametrize(
    "change", [{"embed_dim": 32}, {"head_epochs": 2}, {"seed": 3}, {"train_images": 40}]
)
def test_models_made_of_something_else_stay_where_they_are_and_are_not_used(smoke, change, capsys):
    kept = smoke.trained / "heads/seed-0/heads.safetensors"
    first, before = load_or_build.heads(smoke, seed=0), kept.read_bytes()
    load_or_build.save_finetuned(smoke, first, {})
    assert load_or_build.finetuned(smoke) is not None
    other = replace(smoke, **change, data=smoke.data.with_name("minicoco-other"))
    model = load_or_build.heads(other, seed=0)
    assert model.dims["embed_dim"] == other.embed_dim and kept.read_bytes() == before
    assert len(model.history) == other.head_epochs
    again = load_or_build.heads(other, seed=0)  # kept beside
    assert again.logit_scale.equal(model.logit_scale)
    capsys.readouterr()
    assert load_or_build.finetuned(other) is None
    said = capsys.readouterr().out
    assert "left aside" in said and "scripts.train" in said


def test_a_changed_profile_of_this_name_does_not_write_over_the_committed_results(tmp_path):
    assert replace(get_profile("mini"), data=tmp_path).results == ROOT / "data/results/mini"


def test_interrupted_heads_are_not_kept(smoke, monkeypatch, capsys):
    path = smoke.trained / "heads/seed-0/heads.safetensors"
    load_or_build.heads(smoke)
    before = path.read_bytes()
    for rows in ([], [{"epoch": 1, "dev_loss": 2.0}]):
        cut = History(rows, interrupted=True)
        monkeypatch.setattr(load_or_build, "fit", lambda *_, cut=cut, **__: cut)
        model = load_or_build.heads(smoke, rebuild=True)
        assert model.history.interrupted and not model.training and path.read_bytes() == before
        assert "interrupted: its heads are not kept" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        load_or_build.heads(smoke, seed=7)
    assert not (smoke.trained / "heads/seed-7").exists()
