"""Writes README's tables from data/results/*.json, each between its two markers.

Nothing in them is typed by hand. The first table holds the headline numbers of the study;
everything else that is measured stays in the JSON files.
"""

import json
from pathlib import Path

from helpers.storage.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
# The names of columns and rows, by the names of models, metrics and methods in the results.
MODELS, HEADLINES, METHODS = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
).values()
MARKS = {"gain": " ▲", "loss": " ▼"}
PRECISIONS = {"no": "32 bits", "bf16": "bf16", "fp16": "fp16, scaled loss"}


def markdown(head: list[str], rows: list[list[str]], caption: str) -> str:
    """A table and the line under it."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, "", caption])


def number(metric: dict | None) -> str:
    """mean ± deviation over seeds, or ± error."""
    if metric is None:
        return ""
    spread = metric.get("error", metric.get("std") if metric.get("seeds", 1) > 1 else None)
    return f"{metric['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def bound(metric: dict, name: str) -> str:
    return "–" if metric.get(name) is None else f"{metric[name]:.3f}"


def table(study: dict | None) -> str:
    """The Markdown table of data/results/study.json: a column a model, a row a question.

    A mark says that tuning has changed a number beyond luck, by the rule of `difference`.
    """
    if study is None:
        return "No results yet: `make study` measures them."
    metrics = study["metrics"]
    models = [m for m in MODELS if any(f"{m}/{headline}" in metrics for headline in HEADLINES)]
    rows, seeds = [], set()
    for headline, label in HEADLINES.items():
        cells = [metrics.get(f"{model}/{headline}") for model in models]
        if all(cells):
            marked = [number(c) + MARKS.get(c.get("change", {}).get("verdict"), "") for c in cells]
            ends = [bound(cells[0], name) for name in ("chance", "attainable")]
            rows.append([label, ends[0], *marked, ends[1]])
            seeds |= {cell["seeds"] for cell in cells}
    machines = [row["machine"] for row in study["rows"]]
    names = [m["gpu"] or f"{m['cpu']}, {m['cores']} cores" for m in machines]
    caption = f"Profile {study['profile']}, {' or '.join(map(str, sorted(seeds)))} seeds, "
    caption += f"{' and '.join(dict.fromkeys(names))}. Mean ± standard deviation over "
    caption += "seeds; ▲ gain and ▼ loss against the heads before tuning, where the 95 % "
    caption += "intervals over seeds and over pictures both exclude 0 (recall@5, scenes "
    caption += "and swapped words are not compared). Made by `make readme`."
    return markdown(["", "Chance", *(MODELS[m] for m in models), "Attainable"], rows, caption)


def maps_table(metrics: dict) -> str:
    """The Markdown table of what maps are worth, from the metrics of notebook 07."""
    accuracy = {method: metrics.get(f"{method}/pointing_game/accuracy") for method in METHODS}
    accuracy = {method: metric for method, metric in accuracy.items() if metric}
    if not accuracy:
        return "No maps measured yet: `make outputs` does."
    head = ["", "Points at the named object", "… with heads alone", "Energy inside it"]
    rows = []
    for method in accuracy:
        names = "accuracy", "before", "energy", "swap"
        cells = {name: metrics.get(f"{method}/pointing_game/{name}") for name in names}
        cells["before"] = metrics.get(f"{method}-before/pointing_game/accuracy")
        rows.append([METHODS[method], *map(number, cells.values())])
    first = accuracy["relevance"]
    few = {METHODS[m].lower(): r["n"] for m, r in accuracy.items() if r["n"] < first["n"]}
    few = f" ({', '.join(few)}: {min(few.values())})" if few else ""
    caption = f"Notebook 07, {first['n']} pictures with a caption that names one of their objects"
    caption += f"{few}; both towers tuned and averaged. A patch at random touches the object in "
    caption += f"{first['chance']:.3f} of cases. Mean ± standard error. Made by `make readme`."
    return markdown([*head, "Follows a swapped caption"], rows, caption)


def gpu_table(result: dict | None) -> str:
    """The Markdown table of data/results/gpu.json, or what writes it."""
    if result is None:
        return "The speed of a GPU has not been measured yet: `python -m benchmarks.gpu` does."
    rows = []
    for precision, row in result["fine_tuning"].items():
        speed = f"{row['images_per_second']:.0f}", f"{row['tflop_per_second']:.1f}"
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        rows.append([PRECISIONS[precision], *speed, peak])
    read = result["extraction"]
    caption = f"{result['machine']['gpu']}, {result['memory_gb']:.0f} GB: both towers tuned, of "
    caption += "ViT-B/16's and BERT-base's shape, weights and pictures random; batches of "
    caption += f"{result['batch_size']}, {result['patches']:.0%} of the patches. Features of "
    caption += f"{read['images']:,} JPEGs and {read['captions']:,} captions took "
    caption += f"{read['seconds']:.0f} s. Made by `python -m benchmarks.gpu`."
    return markdown(["Precision", "Images/s", "TFLOP/s", "Peak of memory, GB"], rows, caption)


def fill(readme: str, name: str, text: str) -> str:
    """`readme` with `text` between the two markers of that name. ValueError without them."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in readme or end not in readme:
        raise ValueError(f"README.md needs the markers {start} and {end}, in this order.")
    before, rest = readme.split(start, 1)
    return f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"


def filled(readme: str) -> str:
    """`readme` with every table as data/results says."""
    paths = sorted((ROOT / "data/results").glob("*.json"))
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    readme = fill(readme, "results", table(files.get("study")))
    readme = fill(readme, "maps", maps_table(files.get("07", {}).get("metrics", {})))
    return fill(readme, "gpu", gpu_table(files.get("gpu")))


if __name__ == "__main__":
    readme = ROOT / "README.md"
    atomic_write(readme, filled(readme.read_text(encoding="utf-8")))
    print("README.md: its tables are those of data/results.")
