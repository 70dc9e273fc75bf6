"""README's tables of results are what data/results says."""

import pytest

from scripts.readme_table import ROOT, fill, filled, gpu_table, maps_table, table

MACHINE = {"cpu": "a CPU", "cores": 2, "gpu": None}


def result(**metrics):
    return {"profile": "mini", "machine": MACHINE, "metrics": metrics}


def test_rows_columns_and_numbers():
    recall = {"mean": 0.8123, "std": 0.0044, "seeds": 3, "chance": 0.005, "ceiling": 0.957}
    once = {"mean": 0.5, "std": None, "seeds": 1, "chance": 0.0167, "interval": [0.41, 0.59]}
    name = "text_to_image/recall@5"
    first = result(**{f"projection/{name}": recall, "projection/text_to_image/mrr": recall})
    tuned = result(**{f"finetuned/{name}": recall | {"mean": 0.9}})
    again = result(
        **{f"projection/{name}": recall | {"mean": 0}, "projection/zero_shot/top1": once}
    )
    lines = table([first, tuned, again]).splitlines()
    assert lines[0] == "|  | Chance | Projection heads | Both towers tuned | Ceiling |"
    assert lines[2] == "| Text → image, recall@5 | 0.005 | 0.812 ± 0.004 | 0.900 ± 0.004 | 0.957 |"
    assert lines[3] == "| Zero-shot: never captioned, top-1 | 0.017 | 0.500 [0.41, 0.59] |  |  |"
    assert "a CPU, 2 cores. " in lines[-1] and len(lines) == 6
    study = {"machine": {**MACHINE, "cpu": "another CPU"}}
    assert "a CPU, 2 cores; another CPU, 2 cores. " in table([first], study)


def test_maps_stand_beside_their_baselines():
    row = {"mean": 0.8444, "error": 0.0162, "n": 500, "chance": 0.103}
    metrics = {
        "relevance/pointing_game/accuracy": row,
        "relevance-before/pointing_game/accuracy": row | {"mean": 0.8},
        "relevance/pointing_game/swap": row | {"mean": 0.7},
        "random/pointing_game/accuracy": row | {"mean": 0.0},
        "flow/pointing_game/accuracy": row | {"n": 100},
    }
    lines = maps_table(metrics).splitlines()
    cells = "0.844 ± 0.016 | 0.800 ± 0.016 |  | 0.700 ± 0.016"
    assert lines[2] == f"| Relevance, all layers | {cells} |"
    assert lines[3].startswith("| Attention flow |")
    assert lines[4] == "| *Random* | 0.000 ± 0.016 |  |  |  |"
    for part in ("500 pictures", "(attention flow: 100)", "0.103"):
        assert part in lines[-1]


def test_only_the_part_between_the_markers_changes():
    readme = "a\n<!-- maps -->\nold\n<!-- /maps -->\nb\n"
    new = fill(readme, "maps", maps_table({}))
    assert new.startswith("a\n<!-- maps -->\nNo maps") and new.endswith("<!-- /maps -->\nb\n")
    assert "old" not in new and fill(new, "maps", maps_table({})) == new
    with pytest.raises(ValueError, match="markers"):
        fill("no markers", "maps", "text")
    assert table([]).startswith("No results") and "benchmarks.gpu" in gpu_table(None)


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme) == readme, "not what data/results says: run `make readme`."
