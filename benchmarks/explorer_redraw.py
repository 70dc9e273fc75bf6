"""How long does the explorer take to answer a control? `python -m benchmarks.explorer_redraw`

Seconds from a control's change to the PNG bytes of the new image, for each method: a new image of
val with its own caption, and another layer (raw) or another start of the layers (the others) on the
same image. The baseline is what every answer needs: both towers' forward pass on that image and
caption. Methods take turns; medians over IMAGES.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from transformers.utils import logging

from helpers import load_or_build
from helpers.attention import METHODS
from helpers.config import ROOT, get_profile, machine
from helpers.storage.files import atomic_write
from helpers.viz import widgets

RESULT = ROOT / "data" / "results" / "bench_explorer_redraw.json"
IMAGES = 15
BARS = {method: 1.5 if method == "flow" else 0.5 for method in METHODS}  # seconds


def seconds(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def redraw(box, name, value) -> float:
    """Seconds that the explorer takes after a control is set; RuntimeError if it shows an error."""
    before = box.image.value
    taken = seconds(setattr, box.controls[name], "value", value)
    if box.message.value or box.image.value == before:
        raise RuntimeError(f"{name} = {value} drew nothing new: {box.message.value}")
    return taken


def both_towers(model, image, caption) -> None:
    model.encode_images([image])
    model.encode_texts([caption])


def measure(model, val) -> tuple[dict[str, list], list[float]]:
    """Seconds of each method's two answers, [IMAGES] pairs, and of both towers alone."""
    box = widgets.explorer(model, val)
    layers = box.controls["layer"].max
    times, towers = {method: [] for method in METHODS}, []
    for number in range(2, 2 + (1 + IMAGES) * len(METHODS)):
        method = METHODS[number % len(METHODS)]
        box.paused = True
        for name, value in (("method", method), ("layer", layers), ("layers", (1, layers))):
            box.controls[name].value = value
        box.paused = False
        image = redraw(box, "number", number)
        other = ("layer", layers - 1) if method == "raw" else ("layers", (2, layers))
        times[method].append((image, redraw(box, *other)))
        pair = val.image(number - 1), box.controls["caption"].value
        towers.append(seconds(both_towers, model, *pair))
    warm = {method: rows[1:] for method, rows in times.items()}  # the first round warms up
    return warm, towers[len(METHODS) :]


def main() -> int:
    logging.set_verbosity_error()
    profile = get_profile("mini")
    model = list(load_or_build.models(profile).values())[-1][0]
    times, towers = measure(model, load_or_build.data(profile, "val"))
    baseline, results = float(np.median(towers)), {}
    print(f"both towers alone: {baseline:.3f} s; {torch.get_num_threads()} threads")
    print("    method   new picture   slowest    layers     bar  / towers")
    for method, rows in times.items():
        image, layers = np.median(rows, axis=0).tolist()
        slowest, ratio = max(rows)[0], image / baseline
        results[method] = {"picture": image, "slowest": slowest, "layers": layers, "ratio": ratio}
        numbers = f"{image:12.3f} s{slowest:8.3f} s{layers:8.3f} s{BARS[method]:6.1f} s"
        print(f"{method:>10}{numbers}{ratio:10.1f}")
    slow = [m for m, row in results.items() if max(row["picture"], row["layers"]) > BARS[m]]
    about = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "pictures": IMAGES,
        "bars": BARS,
        "baseline": "both towers' forward pass, one picture, one caption",
        "baseline_seconds": baseline,
        "results": results,
    }
    atomic_write(RESULT, json.dumps(about, indent=2) + "\n")
    print(f"slower than the bar: {', '.join(slow)}" if slow else "all bars are met")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
