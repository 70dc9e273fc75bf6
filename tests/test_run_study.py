"""The long experiments, on the smoke profile: what they train and write, and nothing twice."""

import json

import pytest
import torch
from transformers import ViTModel

from helpers import load_or_build
from helpers.model import load_model
from helpers.storage.checkpoints import weights_digest
from helpers.training import History
from scripts import run_study
from scripts.run_study import SETTINGS, TASKS, classes, evaluate, keep_best, one_run, summarise


def test_an_evaluation_says_everything_beside_its_chance(smoke):
    metrics = evaluate(smoke, load_or_build.heads(smoke))
    expected = {f"{task}/{top}" for task in TASKS.values() for top in ("top1", "top5")}
    expected |= {"text_to_image/recall@1", "image_to_text/recall@10"}
    assert expected | {"classification/map", "compositional/accuracy"} <= set(metrics)
    for name, row in metrics.items():
        assert 0 <= row["value"] <= (1 if "rank" not in name else 1e9), name
    assert metrics["text_to_image/recall@5"]["chance"] == 5 / smoke.val_images
    assert metrics["compositional/accuracy"]["chance"] == 0.5


def test_a_run_of_both_towers_is_kept_whole_and_leaves_the_shared_towers_alone(smoke):
    before = [weights_digest(tower) for tower in load_or_build.towers(smoke)]
    folder = smoke.cache / "study"
    one_run(smoke, "projection", 0, folder)
    row = one_run(smoke, "finetuned", 0, folder)
    assert [weights_digest(tower) for tower in load_or_build.towers(smoke)] == before
    model, meta = load_model(folder / "finetuned-0")
    assert meta["tuned"] == ["image_tower", "text_tower"] and meta["setting"] == "finetuned"
    after = [weights_digest(tower) for tower in (model.image_tower, model.text_tower)]
    assert all(a != b for a, b in zip(after, before))
    assert row["seconds"] > 0 and row["minutes"] > 0 and len(row["history"]) == smoke.tune_epochs
    assert not list(folder.glob("*.checkpoints"))


def test_an_interrupted_run_stops_the_study_and_keeps_nothing(smoke, monkeypatch, tmp_path):
    monkeypatch.setattr(run_study, "fit", lambda *_, **__: History([], interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        one_run(smoke, "siglip-projection", 0, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def fake_row(seed, value):
    history = [{"dev_recall@1": value, "seconds": 1.0, "images_per_second": 10.0}]
    metrics = {"text_to_image/recall@1": {"value": value, "chance": 0.001}}
    metrics["zero_shot/top1"] = {"value": value, "chance": 0.25, "n": 100}
    return {"seed": seed, "metrics": metrics, "history": history, "seconds": 6.0, "minutes": 0.5}


def test_what_is_done_is_not_done_again(smoke, monkeypatch):
    done, best = [], []

    def run(profile, name, seed, folder):
        done.append((name, seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        return fake_row(seed, 0.5)

    monkeypatch.setattr(run_study, "one_run", run)
    monkeypatch.setattr(run_study, "keep_best", lambda profile: best.append(profile.name))
    with pytest.raises(KeyboardInterrupt):
        run_study.study(smoke)
    run_study.study(smoke)
    assert done == [*done[:3], *[(name, 0) for name in list(SETTINGS)[2:]]] and best == ["smoke"]
    content = json.loads((smoke.results / "study.json").read_text())
    assert content["minutes"] == 0.5 * len(SETTINGS) and set(content["runs"]) == set(SETTINGS)
    assert content["versions"]["torch"] == torch.__version__ and content["machine"]["cores"]


def test_means_spreads_and_intervals(smoke):
    load_or_build.data(smoke, "val")
    metrics = summarise(smoke, {"finetuned": [fake_row(0, 0.5), fake_row(1, 0.7)], "siglip": []})
    recall = metrics["finetuned/text_to_image/recall@1"]
    assert recall["mean"] == pytest.approx(0.6) and recall["std"] == pytest.approx(0.02**0.5)
    assert recall["seeds"] == 2 and recall["values"] == [0.5, 0.7] and recall["chance"] == 0.001
    assert 0.5 < recall["ceiling"] <= 1
    low, high = metrics["finetuned/zero_shot/top1"]["interval"]
    assert low < 0.6 < high and not any(name.startswith("siglip") for name in metrics)


def test_the_best_on_dev_is_what_is_kept(smoke):
    folder = smoke.cache / "study"
    for seed, value in enumerate((0.4, 0.6)):
        model = load_or_build.heads(smoke).cpu()
        model.logit_scale.data.fill_(value)
        run_study.save_model(model, folder / f"finetuned-image-{seed}", {}, ["image_tower"])
        (folder / f"finetuned-image-{seed}.json").write_text(json.dumps(fake_row(seed, value)))
    assert load_or_build.finetuned(smoke) is None
    destination = keep_best(smoke)
    assert load_or_build.finetuned(smoke).logit_scale.item() == pytest.approx(0.6)
    assert list(load_or_build.models(smoke)) == ["projection", "finetuned-image"]
    assert ViTModel.from_pretrained(destination / "image_tower").config.hidden_size == 128
    assert keep_best(smoke) == destination


def test_novel_combinations_are_classified_by_colour_and_category(smoke):
    load_or_build.data(smoke, "val")
    probe = run_study.load_probes(smoke)["novel_combinations"]
    names, labels = classes(probe)
    for label, category, colour in zip(labels, probe.labels, probe.colours, strict=True):
        assert names[label] == f"{colour} {probe.names[category]}"
