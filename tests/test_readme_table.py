"""README's tables of results are what data/results says."""

from scripts.readme_table import ROOT, filled, maps_table, table

MACHINE = {"cpu": "a CPU", "cores": 2, "gpu": None}


def study(**metrics):
    rows = [{"machine": machine} for machine in (MACHINE, MACHINE, MACHINE | {"gpu": "a GPU"})]
    return {"profile": "mini", "rows": rows, "metrics": metrics}


def test_rows_columns_numbers_and_marks():
    recall = {"mean": 0.8123, "std": 0.0044, "seeds": 5, "chance": 0.005, "attainable": 0.957}
    name = "text_to_image/recall@5"
    tuned = recall | {"mean": 0.9, "change": {"verdict": "gain"}, "seeds": 3}
    worse = recall | {"mean": 0.7, "change": {"verdict": "loss"}}
    same = recall | {"change": {"verdict": "no difference shown"}}
    metrics = {
        f"projection/{name}": recall,
        f"finetuned/{name}": tuned,
        f"finetuned-averaged/{name}": worse,
        f"siglip-projection/{name}": same,
        "projection/zero_shot/top1": recall,  # not measured for all: no row
        f"projection@2000/{name}": recall,
    }
    lines = table(study(**metrics)).splitlines()
    head = "|  | Chance | Heads | Both towers tuned | … averaged | SigLIP heads | Attainable |"
    cells = "0.812 ± 0.004 | 0.900 ± 0.004 ▲ | 0.700 ± 0.004 ▼ | 0.812 ± 0.004"
    assert lines[0] == head
    assert lines[2] == f"| Text → image, recall@5 | 0.005 | {cells} | 0.957 |"
    assert "Profile mini, 3 or 5 seeds, a CPU, 2 cores and a GPU. " in lines[-1] and len(lines) == 5


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


def test_readme_is_up_to_date():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(readme) == readme, "not what data/results says: run `make readme`."
