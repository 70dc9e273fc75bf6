"""What was tried before the recipe of the study stood: `python -m benchmarks.recipe`.

One seed, measured on dev alone. Heads: three rates for each loss and starting factor, and more
where one at the edge is among the best. Scores within a tenth of a point count as equal, and the
lowest rate of equal ones is taken. Both towers: three rates each; then, with the best two, three
for the heads, and the lower three layers of the text tower frozen (its word and position vectors
always are). A tuned model counts as good as the average that `choose_alpha` picks. The rows stand
in `<results>/search.json`; the winners are written into HEADS and `tuning` of load_or_build.py, and
the profile.
"""

from __future__ import annotations

import copy
import json
from itertools import product
from pathlib import Path

from helpers import load_or_build
from helpers.config import Profile, get_profile, machine
from helpers.load_or_build import DEV_LOOKED_AT, HEADS, first, fresh_heads
from helpers.model import average_weights
from helpers.probes import evaluate
from helpers.storage.files import atomic_write
from helpers.training import fit
from scripts.run_study import ALPHAS, choose_alpha, recipe, trained

HEAD_RATES = [3e-4, 1e-3, 3e-3]
FARTHER = {3e-4: 1e-4, 3e-3: 1e-2}  # beyond an edge among the best, for all heads alike
EQUAL = 0.001  # a difference between scores that decides nothing
IMAGE_RATES = [1e-4, 3e-4, 1e-3]
TEXT_RATES = [3e-5, 1e-4, 3e-4]
TUNED_HEAD_RATES = [3e-4, 1e-4, 1e-3]  # the first beside all rates of the towers


def missing(rows: list[dict]) -> list[dict]:
    """The settings that have to be tried next, in the light of the rows so far."""
    wanted = [{"name": name, "lr": lr} for name in HEADS for lr in HEAD_RATES]
    if all(tried(rows, settings) for settings in wanted):
        rates = {row["lr"] for name in HEADS for row in as_good(rows, name=name)}
        farther = [FARTHER[lr] for lr in sorted(rates) if lr in FARTHER]
        wanted += [{"name": name, "lr": lr} for name in HEADS for lr in farther]
    tuned = {"name": "finetuned", "lr": TUNED_HEAD_RATES[0], "frozen_layers": 0}
    towers = product(IMAGE_RATES, TEXT_RATES)
    wanted += [tuned | {"image_lr": image, "text_lr": text} for image, text in towers]
    todo = [settings for settings in wanted if not tried(rows, settings)]
    if not todo:
        winner = best(rows, **tuned)
        pair = tuned | {name: winner[name] for name in ("image_lr", "text_lr")}
        wanted = [pair | {"lr": lr} for lr in TUNED_HEAD_RATES] + [pair | {"frozen_layers": 3}]
        todo = [settings for settings in wanted if not tried(rows, settings)]
    return todo


def tried(rows: list[dict], settings: dict) -> list[dict]:
    """The rows with these settings."""
    return [row for row in rows if settings.items() <= row.items()]


def as_good(rows: list[dict], **settings) -> list[dict]:
    """Of the rows with these settings the one with the highest score, and those that equal it."""
    rows = tried(rows, settings)
    highest = max(row["score"] for row in rows)
    return [row for row in rows if row["score"] >= highest - EQUAL]


def best(rows: list[dict], **settings) -> dict:
    """Of the best rows with these settings the one with the lowest rate of the heads."""
    return min(as_good(rows, **settings), key=lambda row: row["lr"])


def trial(profile: Profile, settings: dict) -> dict:
    """Train with some settings and measure on dev: a row of the search."""
    measure = try_heads if settings["name"] in HEADS else try_towers
    return settings | measure(profile, **settings) | {"machine": machine()}


def try_heads(profile: Profile, name: str, lr: float) -> dict:
    """Heads at one rate."""
    model = fresh_heads(profile, name, profile.seed)
    train, dev = (load_or_build.examples(profile, split) for split in ("train", "dev"))
    fit(model, train, dev, seed=profile.seed, **recipe(profile, name) | {"lr": lr})
    table = evaluate(profile, model.eval(), "dev")
    return {"score": choose_alpha({0.0: [table]})[1], "dev": values(table)}


def try_towers(profile: Profile, name: str, frozen_layers: int, **rates) -> dict:
    """Both towers at some rates, averaged with what they were."""
    before = trained(profile, "projection", profile.seed)[0]
    model = copy.deepcopy(before)
    for layer in model.text_tower.model.encoder.layer[:frozen_layers]:
        freeze(layer)
    train, dev = (load_or_build.examples(profile, split) for split in ("train", "dev"))
    settings = recipe(profile, name) | rates | {"dev_per_epoch": 1}
    fit(model, train, first(dev, DEV_LOOKED_AT), seed=profile.seed, **settings)
    after = copy.deepcopy(before)  # in which what was frozen is a parameter
    after.load_state_dict(model.cpu().state_dict())
    tables = {
        alpha: [evaluate(profile, average_weights(before, after, alpha), "dev")] for alpha in ALPHAS
    }
    alpha, score = choose_alpha(tables)
    dev = {str(alpha): values(table) for alpha, (table,) in tables.items()}
    return {"score": score, "alpha": alpha, "dev": dev}


def freeze(part) -> None:
    """No parameter of a module learns any more: they become buffers, under the names they had."""
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def values(table: dict) -> dict[str, float]:
    """The numbers of a table alone, without chance and hits."""
    return {name: round(row["value"], 4) for name, row in table.items()}


def search(profile: Profile) -> Path:
    """Try what is missing and write `<results>/search.json` after each trial."""
    path = Path(profile.results, "search.json")
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    while todo := missing(rows):
        print("==", todo[0], flush=True)
        rows.append(trial(profile, todo[0]))
        atomic_write(path, json.dumps({"profile": profile.name, "rows": rows}, indent=1) + "\n")
    return path


if __name__ == "__main__":
    print(f"Written: {search(get_profile())}")
