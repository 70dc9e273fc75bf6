"""What was tried before the study: which trials, in which order, what the recipe takes of it."""

import json

import torch

from benchmarks import recipe
from benchmarks.recipe import best, freeze, missing, trial
from helpers import load_or_build
from helpers.config import ROOT, get_profile
from helpers.load_or_build import ALPHA, HEADS
from scripts.run_study import DECLARED


def rows_of(todo, score):
    return [settings | {"score": score(settings)} for settings in todo]


def towers_peak(settings):
    """A score with one best rate for heads and one best pair for towers."""
    if settings["name"] != "finetuned":
        return -100 * abs(settings["lr"] - 1e-3)
    wrong = (settings["image_lr"] != 1e-3) + (settings["text_lr"] != 1e-4)
    return -wrong - settings["frozen_layers"] - (settings["lr"] != 3e-4)


def test_every_pair_of_rates_then_the_rest_around_the_best():
    first = missing([])
    assert len(first) == 3 * len(HEADS) + 9
    rows = rows_of(first, towers_peak)
    second = missing(rows)
    assert all(s["image_lr"] == 1e-3 and s["text_lr"] == 1e-4 for s in second)
    found = sorted((s["lr"], s["frozen_layers"]) for s in second)
    assert found == [(1e-4, 0), (3e-4, 3), (1e-3, 0)]
    assert missing(rows + rows_of(second, towers_peak)) == []


def test_an_edge_among_the_best_is_extended_for_all_heads_and_of_equal_rates_the_lowest_taken():
    rows = rows_of(missing([]), towers_peak)
    best(rows, name="siglip-projection", lr=3e-3)["score"] = 9e-4
    assert missing(rows) == [{"name": name, "lr": 1e-2} for name in HEADS]
    assert best(rows, name="siglip-projection")["lr"] == 1e-3


def test_what_is_frozen_keeps_its_weights_under_their_names(smoke, monkeypatch):
    def evaluate(profile, model, split):
        size = model.text_head[1].weight.abs().sum().item()
        return dict.fromkeys(DECLARED, {"value": size})

    monkeypatch.setattr(recipe, "evaluate", evaluate)
    rates = {"lr": 1e-3, "image_lr": 1e-3, "text_lr": 1e-3}
    row = trial(smoke, {"name": "finetuned", "frozen_layers": 3} | rates)
    assert list(row["dev"]) == ["0.0", "0.3", "0.5", "0.7", "1.0"]
    assert row["dev"]["0.0"] != row["dev"]["1.0"]
    part = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    before = part.state_dict()
    freeze(part)
    assert not list(part.parameters()) and part.state_dict().keys() == before.keys()
    assert part(torch.ones(1, 2)).shape == (1, 2)


def test_the_committed_recipe_is_what_the_search_found_best():
    rows = json.loads((ROOT / "data/results/search.json").read_text())["rows"]
    assert missing(rows) == []
    for name, (_, lr) in HEADS.items():
        assert lr == best(rows, name=name)["lr"]
    winner, settings = best(rows, name="finetuned"), load_or_build.tuning(get_profile("mini"))
    assert winner["frozen_layers"] == 0
    rates = ("lr", "image_lr", "text_lr")
    assert [winner[n] for n in rates] == [settings[n] for n in rates]
    assert json.loads((ROOT / "data/results/study.json").read_text())["alphas"] == ALPHA
