"""How long does the explorer take to answer a control? `python -m benchmarks.explorer_redraw`

Seconds from a control's change to the PNG bytes of the new picture, for each method: a new picture of val with its own
caption, and another layer (raw), another start of the layers (the others) on the same picture. The baseline is what
every answer needs: both towers' forward pass on that picture and caption. Methods take turns; medians over PICTURES.
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
PICTURES = 15
BARS = {method: 1.5 if method == "flow" else 0.5 for method in METHODS}  # seconds


def seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def turned(box, name, value) -> float:
    """Seconds that the explorer takes after a control is set. Raises RuntimeError if it shows an error."""
    before = box.picture.value
    taken = seconds(lambda: setattr(box.controls[name], "value", value))
    if box.message.value or box.picture.value == before:
        raise RuntimeError(
            f"{name} = {value} drew no new picture: {box.message.value or 'the bytes are as before'}"
        )
    return taken


def both_towers(model, image, caption) -> None:
    model.encode_images([image])
    model.encode_texts([caption])


def main() -> int:
    logging.set_verbosity_error()
    profile = get_profile("mini")
    model, val = (
        list(load_or_build.models(profile).values())[-1][0],
        load_or_build.data(profile, "val"),
    )
    box = widgets.explorer(model, val)
    layers = box.controls["layer"].max
    times = {method: {"picture": [], "layer": []} for method in METHODS}
    bare = []
    for k in range(-1, PICTURES):  # the first round warms up
        for i, method in enumerate(METHODS):
            box.paused = True
            box.controls["method"].value, box.controls["layer"].value = method, layers
            box.controls["layers"].value = 1, layers
            box.paused = False
            number = 2 + (k + 1) * len(METHODS) + i
            picture = turned(box, "number", number)
            layer = (
                turned(box, "layer", layers - 1)
                if method == "raw"
                else turned(box, "layers", (2, layers))
            )
            image, caption = val.image(number - 1), box.controls["caption"].value
            towers = seconds(
                lambda image=image, caption=caption: both_towers(model, image, caption)
            )
            if k >= 0:
                times[method]["picture"].append(picture)
                times[method]["layer"].append(layer)
                bare.append(towers)
    baseline, results, slow = float(np.median(bare)), {}, []
    print(f"both towers alone: {baseline:.3f} s; {torch.get_num_threads()} threads")
    print(
        f"{'method':>10}{'new picture':>14}{'slowest':>10}{'layers':>10}{'bar':>8}{'/ towers':>10}"
    )
    for method, found in times.items():
        new, worst, layer = (
            np.median(found["picture"]),
            max(found["picture"]),
            np.median(found["layer"]),
        )
        results[method] = {
            "picture": new,
            "slowest": worst,
            "layers": layer,
            "ratio": new / baseline,
        }
        print(
            f"{method:>10}{new:12.3f} s{worst:8.3f} s{layer:8.3f} s{BARS[method]:6.1f} s{new / baseline:10.1f}"
        )
        if max(new, layer) > BARS[method]:
            slow.append(method)
    about = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "pictures": PICTURES,
        "bars": BARS,
    }
    about |= {
        "baseline": "both towers' forward pass, one picture, one caption",
        "baseline_seconds": baseline,
    }
    atomic_write(RESULT, json.dumps({**about, "results": results}, indent=2) + "\n")
    print(f"slower than the bar: {', '.join(slow)}" if slow else "all bars are met")
    return bool(slow)


if __name__ == "__main__":
    sys.exit(main())
