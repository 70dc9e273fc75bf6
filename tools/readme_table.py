"""Writes README's table of results from data/results/*.json, between its two markers. Nothing in it is typed by hand.

The table holds the headline numbers; everything else that notebooks measure stays in the JSON files. A number that
several notebooks report is taken from the first of them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- results -->", "<!-- /results -->"

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


def table(results: list[dict]) -> str:
    """The Markdown table of `results`, the parsed JSON files in the order of their notebooks."""
    metrics: dict[str, dict] = {}
    for result in results:
        metrics = {**result["metrics"], **metrics}
    models = [model for model in MODELS if any(f"{model}/{headline}" in metrics for headline in HEADLINES)]
    if not models:
        return "No results yet: `make outputs` measures them."
    lines = [
        "| | Chance | " + " | ".join(MODELS[model] for model in models) + " | Ceiling |",
        "|---|---|" + "---|" * len(models) + "---|",
    ]
    for headline, label in HEADLINES.items():
        row = {model: metrics[f"{model}/{headline}"] for model in models if f"{model}/{headline}" in metrics}
        if row:
            cells = [number(row[model]) if model in row else "" for model in models]
            first = next(iter(row.values()))
            lines.append(f"| {label} | {bound(first, 'chance')} | {' | '.join(cells)} | {bound(first, 'ceiling')} |")
    machines = {f"{result['machine']['cpu']}, {result['machine']['cores']} cores" for result in results}
    profiles = {result["profile"] for result in results}
    where = f"Profile {', '.join(sorted(profiles))}, measured on {'; '.join(sorted(machines))}."
    how = "Mean ± standard deviation over seeds; brackets: 95 % confidence interval. Made by `make readme`."
    lines += ["", f"{where} {how}"]
    return "\n".join(lines)


def fill(readme: str, results: list[dict]) -> str:
    """`readme` with the table between its markers. Raises ValueError where a marker is missing."""
    if START not in readme or END not in readme:
        raise ValueError(f"README.md needs the markers {START} and {END}, in this order.")
    before, rest = readme.split(START, 1)
    return f"{before}{START}\n{table(results)}\n{END}{rest.split(END, 1)[1]}"


def load() -> list[dict]:
    """The committed results of the notebooks, in their order."""
    return [json.loads(path.read_text()) for path in sorted((ROOT / "data/results").glob("[0-9][0-9].json"))]


if __name__ == "__main__":
    readme = ROOT / "README.md"
    filled = fill(readme.read_text(encoding="utf-8"), load())
    partial = readme.with_name(".README.md.partial")
    partial.write_text(filled, encoding="utf-8")
    os.replace(partial, readme)
    print(f"README.md: table from {len(load())} result files.")
