"""The long experiments, on the smoke profile: what they train and write, and nothing twice."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import load_or_build
from helpers.load_or_build import HEADS
from helpers.model import average_weights
from helpers.probes import packed
from helpers.storage.checkpoints import weights_digest
from helpers.training import History
from scripts import run_study
from scripts.run_study import DECLARED, TUNED, choose_alpha, jobs, one_run, summarise, trained


def test_a_run_is_trained_averaged_measured_and_leaves_the_shared_towers_alone(smoke, monkeypatch):
    monkeypatch.setattr(run_study, "evaluate", lambda profile, model, split: weights_digest(model))
    before = [weights_digest(tower) for tower in load_or_build.towers(smoke)]
    start = one_run(smoke, "projection", 0, 1)
    row = one_run(smoke, "finetuned", 0, 1)
    assert [weights_digest(tower) for tower in load_or_build.towers(smoke)] == before
    model, history = trained(smoke, "finetuned", 0)  # from the cache
    after = [weights_digest(tower) for tower in (model.image_tower, model.text_tower)]
    assert all(a != b for a, b in zip(after, before))
    assert history == row["history"] and row["minutes"] > 0
    assert list(start["measured"]) == ["1.0"] and list(row["measured"]) == "0.3 0.5 0.7 1.0".split()
    averaged = average_weights(trained(smoke, "projection", 0)[0], model, 0.3)
    assert row["measured"]["0.3"] == dict.fromkeys(("dev", "val"), weights_digest(averaged))
    assert not list((smoke.cache / "study").glob("*.checkpoints"))
    assert row["fingerprint"] != start["fingerprint"]


def test_growth_takes_as_many_steps_on_a_part_of_the_images(smoke):
    settings = run_study.recipe(smoke, "finetuned", 1 / 3)
    assert settings["epochs"] == 3 * run_study.recipe(smoke, "finetuned")["epochs"]
    history = trained(smoke, "projection", 0, 1 / 3)[1]
    assert history[-1]["step"] == smoke.head_epochs


def test_an_interrupted_run_stops_the_study_and_keeps_nothing(smoke, monkeypatch):
    monkeypatch.setattr(run_study, "fit", lambda *_, **__: History([], interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        one_run(smoke, "siglip-projection", 0, 1)
    assert not list((smoke.cache / "study").glob("siglip-projection*"))


ENDS = ("projection", "finetuned")


def row_of(name, seed, values, share=1):
    """A row with the recall and one probe of each alpha: {alpha: (recall, probe)}."""
    measured = {}
    for alpha, (recall, probe) in values.items():
        hits = packed(np.arange(32) < 32 * recall)
        table = {metric: {"value": recall, "chance": 0.01, "hits": hits} for metric in DECLARED}
        table["text_to_image/recall@1"] |= {"hits": hits * 5}
        table["zero_shot/top1"] = {"value": probe, "chance": 0.25, "n": 32, "hits": hits}
        measured[alpha] = {"dev": table, "val": table}
    return {"name": name, "seed": seed, "share": share, "minutes": 0.5, "measured": measured}


def test_alpha_is_the_best_on_dev_that_loses_no_probe():
    values = {"0.0": (0.5, 0.8), "0.3": (0.6, 0.795), "0.5": (0.7, 0.78)}
    values |= {"0.7": (0.8, 0.7), "1.0": (0.9, 0.5)}

    def chosen(values):
        rows = [row_of("finetuned", seed, values)["measured"] for seed in range(2)]
        return choose_alpha({float(a): [row[a]["dev"] for row in rows] for a in values})

    assert chosen(values) == pytest.approx((0.3, 0.6))
    values["0.5"] = (0.7, 0.7901)
    assert chosen(values) == pytest.approx((0.5, 0.7))
    worse = {alpha: (0.4, 0.9) for alpha in values if alpha != "0.0"}
    assert chosen(values | worse) == pytest.approx((0.0, 0.5))


def test_means_intervals_and_the_change_against_the_start(smoke):
    load_or_build.data(smoke, "val")
    rows = [row_of("projection", seed, {"1.0": (0.25, 0.8)}) for seed in range(2)]
    values = dict.fromkeys(("0.3", "0.5", "0.7", "1.0"), (0.5, 0.8))
    rows += [row_of("finetuned", seed, values) for seed in range(2)]
    metrics, alphas = summarise(smoke, rows)
    assert alphas == {"projection": 0.3}
    recall = metrics["finetuned-averaged/text_to_image/recall@1"]
    assert recall["mean"] == 0.5 and recall["values"] == [0.5, 0.5] and recall["chance"] == 0.01
    assert 0.5 < recall["attainable"] <= 1
    wider = replace(smoke, seeds=2)  # three runs of each: none is complete
    assert summarise(wider, rows) == ({}, {})
    assert recall["change"]["mean"] == 0.25 and recall["change"]["verdict"] == "gain"
    low, high = metrics["projection/zero_shot/top1"]["interval"]
    assert low < 0.8 < high and not any(name.startswith("siglip") for name in metrics)


def test_rows_that_hold_are_not_run_again_and_others_are(smoke, monkeypatch):
    done = []

    def run(profile, name, seed, share):
        done.append((name, share, seed))
        if len(done) == 3:
            raise KeyboardInterrupt
        values = dict.fromkeys(("0.3", "0.5", "0.7", "1.0"), (0.5, 0.8))
        mark = {"fingerprint": run_study.fingerprint(profile, name, share)}
        return row_of(name, seed, values, share) | mark

    monkeypatch.setattr(run_study, "weights_digest", lambda tower: "a tower")
    monkeypatch.setattr(run_study, "one_run", run)
    monkeypatch.setattr(run_study, "keep_best", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        run_study.study(smoke)
    run_study.study(smoke)
    assert done[:2] + done[3:] == jobs(smoke) and {name for name, *_ in done} == {*HEADS, *TUNED}
    content = json.loads((smoke.results / "study.json").read_text())
    assert content["minutes"] == 0.5 * len(content["rows"]) == 0.5 * len(jobs(smoke))
    assert content["versions"]["torch"] == torch.__version__ and content["machine"]["cores"]
    content["rows"][0]["fingerprint"] = "of another recipe"
    (smoke.results / "study.json").write_text(json.dumps(content))
    run_study.study(smoke)
    assert done[len(jobs(smoke)) + 1 :] == [jobs(smoke)[0]]


def test_what_is_best_on_dev_is_averaged_and_kept(smoke):
    assert load_or_build.finetuned(smoke) is None
    run_study.keep_best(smoke, [row_of("finetuned", 0, {"0.5": (0.5, 0.8)})], 0.5)
    model, ends = load_or_build.finetuned(smoke), [trained(smoke, n, 0)[0] for n in ENDS]
    expected = average_weights(*ends, 0.5)
    for (name, weight), kept in zip(expected.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(weight, kept, atol=1e-3, rtol=1e-3), name
    words = "text_tower.model.embeddings.word_embeddings.weight"
    assert model.get_parameter(words).equal(ends[0].get_parameter(words))
    assert sum(path.stat().st_size for path in (smoke.trained / "finetuned").iterdir()) < 30e6
