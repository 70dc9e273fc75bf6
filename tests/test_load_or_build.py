"""Load-or-build: results files, means over seeds, the gallery, and heads that are rebuilt when the towers change."""

import json

import numpy as np

from helpers import load_or_build


def test_over_seeds_is_mean_and_sample_deviation_with_chance_and_ceiling():
    runs = [{"a/b": 0.1, "a/c": 1.0}, {"a/b": 0.3, "a/c": 1.0}]
    result = load_or_build.over_seeds(runs, ceiling={"a/b": 0.9}, chance={"a/c": 0.5}, prefix="m/")
    deviation = round(float(np.std([0.1, 0.3], ddof=1)), 5)
    assert result["m/a/b"] == {"mean": 0.2, "std": deviation, "ceiling": 0.9, "seeds": 2}
    assert result["m/a/c"] == {"mean": 1.0, "std": 0.0, "chance": 0.5, "seeds": 2}


def test_results_are_written_whole(smoke):
    path = load_or_build.save_results(smoke, "99", {"m/t/recall@1": {"mean": 0.5}}, 1.23)
    content = json.loads(path.read_text())
    assert (
        content["notebook"] == "99" and content["profile"] == "smoke" and content["seconds"] == 1.2
    )
    assert set(content["machine"]) == {"cpu", "cores", "gpu"} and [
        p.name for p in path.parent.iterdir()
    ] == ["99.json"]


def test_the_gallery_is_the_same_with_and_without_data(smoke):
    drawn, told = load_or_build.gallery(smoke, 5)
    assert not smoke.data.exists()
    load_or_build.data(smoke, "val")
    read, again = load_or_build.gallery(smoke, 5)
    assert told == again
    for a, b in zip(drawn, read):  # apart from JPEG's rounding
        assert np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() < 4


def test_heads_are_trained_once_and_again_for_other_towers(smoke, monkeypatch, capsys):
    trained = []
    real = load_or_build.fit
    monkeypatch.setattr(load_or_build, "fit", lambda *a, **k: trained.append(1) or real(*a, **k))
    first = load_or_build.heads(smoke)
    again = load_or_build.heads(smoke)
    assert len(trained) == 1 and not first.training and not again.training
    for a, b in zip(first.image_head.parameters(), again.image_head.parameters()):
        assert a.equal(b)
    load_or_build.heads(smoke, rebuild=True)
    monkeypatch.setattr(load_or_build, "weights_digest", lambda tower: "another tower")
    load_or_build.heads(smoke)
    assert len(trained) == 3 and list(load_or_build.models(smoke)) == ["projection"]
