"""README's table of results is what data/results says."""

import pytest

from scripts.readme_table import ROOT, fill, filled, maps_table, table

MACHINE = {"cpu": "a CPU", "cores": 2, "gpu": None}


def result(notebook, **metrics):
    return {
        "notebook": notebook,
        "profile": "mini",
        "machine": MACHINE,
        "seconds": 1,
        "metrics": metrics,
    }


def test_rows_columns_and_numbers():
    recall = {"mean": 0.8123, "std": 0.0044, "seeds": 3, "chance": 0.005, "ceiling": 0.957}
    zero_shot = {
        "mean": 0.5,
        "std": None,
        "seeds": 1,
        "chance": 0.0167,
        "ceiling": None,
        "interval": [0.41, 0.59],
    }
    first = {"projection/text_to_image/recall@5": recall, "projection/text_to_image/mrr": recall}
    tuned = {"finetuned/text_to_image/recall@5": {**recall, "mean": 0.9}}
    again = {
        "projection/text_to_image/recall@5": {**recall, "mean": 0},
        "projection/zero_shot/top1": zero_shot,
    }
    lines = table(
        [result("03", **first), result("04", **tuned), result("06", **again)]
    ).splitlines()
    assert lines[0] == "| | Chance | Projection heads | Both towers tuned | Ceiling |"
    assert lines[2] == "| Text → image, recall@5 | 0.005 | 0.812 ± 0.004 | 0.900 ± 0.004 | 0.957 |"
    assert lines[3] == "| Zero-shot: never captioned, top-1 | 0.017 | 0.500 [0.41, 0.59] |  |  |"
    assert "a CPU, 2 cores." in lines[-1] and len(lines) == 6
    study = {"machine": {**MACHINE, "cpu": "another CPU"}}
    assert (
        "a CPU, 2 cores; another CPU, 2 cores."
        in table([result("03", **first)], study).splitlines()[-1]
    )


def test_only_the_part_between_the_markers_changes():
    readme = "a\n<!-- results -->\nold\n<!-- /results -->\nb\n"
    new = fill(readme, table([]))
    assert new.startswith("a\n<!-- results -->\nNo results yet") and new.endswith(
        "<!-- /results -->\nb\n"
    )
    assert "old" not in new and fill(new, table([])) == new
    with pytest.raises(ValueError, match="markers"):
        fill("no markers", "text")


def test_maps_stand_beside_their_baselines():
    row = {"mean": 0.8444, "error": 0.0162, "n": 500, "chance": 0.103}
    metrics = {
        "relevance/pointing_game/accuracy": row,
        "relevance-before/pointing_game/accuracy": {**row, "mean": 0.8},
        "relevance/pointing_game/swap": {**row, "mean": 0.7},
        "random/pointing_game/accuracy": {**row, "mean": 0.0},
        "flow/pointing_game/accuracy": {**row, "n": 100},
    }
    lines = maps_table(metrics).splitlines()
    assert (
        lines[2] == "| Relevance, all layers | 0.844 ± 0.016 | 0.800 ± 0.016 |  | 0.700 ± 0.016 |"
    )
    assert (
        lines[3].startswith("| Attention flow |")
        and lines[4] == "| *Random* | 0.000 ± 0.016 |  |  |  |"
    )
    assert (
        "500 pictures" in lines[-1]
        and "(attention flow: 100)" in lines[-1]
        and "0.103" in lines[-1]
    )
    assert maps_table({}).startswith("No maps")


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme) == readme, (
        "README's tables are not what data/results says: run `make readme`."
    )
