"""Writes README's tables from data/results/*.json, each between its two markers. Nothing in them is typed by hand.

The table holds the headline numbers; everything else that notebooks measure stays in the JSON files. A number that
several notebooks report is taken from the first of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"
GPU_START, GPU_END = "<!-- gpu -->", "<!-- /gpu -->"
MAPS_START, MAPS_END = "<!-- maps -->", "<!-- /maps -->"

MODELS = {
    "projection": "Projection heads",
    "finetuned-image": "Image tower tuned",
    "finetuned-text": "Text tower tuned",
    "finetuned": "Both towers tuned",
    "siglip": "SigLIP loss",
}
HEADLINES = {
    "text_to_image/recall@1": "Text → image, recall@1",
    "text_to_image/recall@5": "Text → image, recall@5",
    "image_to_text/recall@1": "Image → text, recall@1",
    "image_to_text/recall@5": "Image → text, recall@5",
    "classification/top1": "Single objects, top-1",
    "classification/map": "Scenes, mean average precision",
    "classification_unseen_drawing/top1": "Unseen drawings of known categories, top-1",
    "zero_shot/top1": "Zero-shot: never captioned, top-1",
    "zero_shot_unseen/top1": "Zero-shot: never seen at all, top-1",
    "zero_shot_pairs/top1": "Zero-shot: new colour–category pairs, top-1",
    "compositional/accuracy": "Which of two captions with swapped words is true",
}
METHODS = {
    "relevance": "Relevance, all layers",
    "relevance-last": "Relevance, last layer",
    "rollout": "Rollout",
    "raw": "Attention of the last layer",
    "flow": "Attention flow",
    "untrained": "*Relevance, untrained tower*",
    "centre": "*The centre of the picture*",
    "first-layer-columns": "*First layer's column sums*",
    "wrong-caption": "*Relevance of another object's caption*",
    "random": "*Random*",
}


def number(metric: dict) -> str:
    """mean ± standard deviation, and the 95 % interval in brackets where there is one."""
    text = f"{metric['mean']:.3f}"
    if metric.get("seeds", 1) > 1 and metric.get("std") is not None:
        text += f" ± {metric['std']:.3f}"
    if metric.get("interval"):
        low, high = metric["interval"]
        text += f" [{low:.2f}, {high:.2f}]"
    return text


def bound(metric: dict, name: str) -> str:
    return "" if metric.get(name) is None else f"{metric[name]:.3f}"


def table(results: list[dict], study: dict | None = None) -> str:
    """The Markdown table of `results`, the parsed JSON files in the order of their notebooks.

    study: the file of the study, named as the source of some of these numbers, for the machine it ran on.
    """
    metrics: dict[str, dict] = {}
    for result in results:
        metrics = {**result["metrics"], **metrics}
    models = [
        model for model in MODELS if any(f"{model}/{headline}" in metrics for headline in HEADLINES)
    ]
    if not models:
        return "No results yet: `make outputs` measures them."
    lines = [
        "| | Chance | " + " | ".join(MODELS[model] for model in models) + " | Ceiling |",
        "|---|---|" + "---|" * len(models) + "---|",
    ]
    for headline, label in HEADLINES.items():
        row = {
            model: metrics[f"{model}/{headline}"]
            for model in models
            if f"{model}/{headline}" in metrics
        }
        if row:
            cells = [number(row[model]) if model in row else "" for model in models]
            first = next(iter(row.values()))
            lines.append(
                f"| {label} | {bound(first, 'chance')} | {' | '.join(cells)} | {bound(first, 'ceiling')} |"
            )
    ran = [*results, study] if study else results
    machines = {f"{result['machine']['cpu']}, {result['machine']['cores']} cores" for result in ran}
    profiles = {result["profile"] for result in results}
    where = f"Profile {', '.join(sorted(profiles))}, measured on {'; '.join(sorted(machines))}."
    how = "Mean ± standard deviation over seeds; brackets: 95 % confidence interval. Made by `make readme`."
    lines += ["", f"{where} {how}"]
    return "\n".join(lines)


def maps_table(metrics: dict) -> str:
    """The Markdown table of what maps are worth, from the metrics of notebook 07; baselines in italics."""

    def cell(method: str, metric: str) -> str:
        found = metrics.get(f"{method}/{metric}")
        return "" if found is None else f"{found['mean']:.3f} ± {found['error']:.3f}"

    known = [method for method in METHODS if f"{method}/pointing_game/accuracy" in metrics]
    if not known:
        return "No maps measured yet: `make outputs` does."
    lines = ["| | Points at the named object | … with heads alone | Energy inside it | Follows a swapped caption |",
             "|---|---|---|---|---|"]  # fmt: skip
    for method in known:
        names = ("accuracy", f"{method}-before"), ("energy", method), ("swap", method)
        others = [cell(model, f"pointing_game/{metric}") for metric, model in names]
        lines.append(
            f"| {METHODS[method]} | {cell(method, 'pointing_game/accuracy')} | {' | '.join(others)} |"
        )
    first = metrics["relevance/pointing_game/accuracy"]
    few = {
        method for method in known if metrics[f"{method}/pointing_game/accuracy"]["n"] < first["n"]
    }
    counts = f"{first['n']} pictures with a caption that names one of their objects"
    if few:
        less = metrics[f"{sorted(few)[0]}/pointing_game/accuracy"]["n"]
        counts += f" ({', '.join(METHODS[method].lower() for method in METHODS if method in few)}: {less})"
    lines += ["", f"Notebook 07, {counts}; the image tower tuned. A patch taken at random touches the object in "
              f"{first['chance']:.3f} of cases. Mean ± standard error. Made by `make readme`."]  # fmt: skip
    return "\n".join(lines)


def gpu_table(result: dict | None) -> str:
    """The Markdown table of data/results/gpu.json, or what writes it."""
    if result is None:
        return "On a GPU nothing has been measured yet: `python -m benchmarks.gpu` does."
    names = {"no": "32 bits", "bf16": "bf16", "fp16": "fp16, scaled loss"}
    lines = ["| Precision | Images/s | TFLOP/s | Peak of memory, GB |", "|---|---|---|---|"]
    for precision, row in result["fine_tuning"].items():
        peak = "" if row["peak_gb"] is None else f"{row['peak_gb']:.1f}"
        numbers = f"{row['images_per_second']:.0f} | {row['tflop_per_second']:.1f} | {peak}"
        lines.append(f"| {names[precision]} | {numbers} |")
    card, taken = f"{result['machine']['gpu']}, {result['memory_gb']:.0f} GB", result["extraction"]
    lines += [
        "",
        f"{card}: both towers tuned, of ViT-B/16's and BERT-base's shape, weights and pictures random; batches of "
        f"{result['batch_size']}, {result['patches']:.0%} of the patches. Features of {taken['images']:,} JPEGs and "
        f"{taken['captions']:,} captions took {taken['seconds']:.0f} s. Made by `python -m benchmarks.gpu`.",
    ]
    return "\n".join(lines)


def fill(readme: str, text: str, start: str = START, end: str = END) -> str:
    """`readme` with `text` between two markers. Raises ValueError where a marker is missing."""
    if start not in readme or end not in readme:
        raise ValueError(f"README.md needs the markers {start} and {end}, in this order.")
    before, rest = readme.split(start, 1)
    return f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"


def load() -> list[dict]:
    """The committed results of the notebooks, in their order."""
    return [
        json.loads(path.read_text())
        for path in sorted((ROOT / "data/results").glob("[0-9][0-9].json"))
    ]


def filled(readme: str) -> str:
    """`readme` with every table as data/results says."""
    gpu, results = ROOT / "data/results/gpu.json", load()
    maps = next((result["metrics"] for result in results if result["notebook"] == "07"), {})
    study = ROOT / "data/results/study.json"
    readme = fill(
        readme, table(results, json.loads(study.read_text()) if study.is_file() else None)
    )
    readme = fill(readme, maps_table(maps), MAPS_START, MAPS_END)
    return fill(
        readme,
        gpu_table(json.loads(gpu.read_text()) if gpu.is_file() else None),
        GPU_START,
        GPU_END,
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    partial = readme.with_name(".README.md.partial")
    partial.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    os.replace(partial, readme)
    print(f"README.md: tables from {len(load())} result files.")
