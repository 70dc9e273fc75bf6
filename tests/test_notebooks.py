"""The notebooks: each runs alone on the smoke profile, and is fit to be read on GitHub."""

import json

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from scripts.run_notebooks import ROOT, SOLUTION, execute, problems
from tests.notebooks import NOTEBOOKS, code_cells, copy_course, prose, read, said

SETUP = (ROOT / "notebooks/setup_cell.py").read_text(encoding="utf-8").strip()

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@each_notebook
def test_runs_alone_on_smoke_and_each_cell_can_be_run_again(path, tmp_path):
    """In a fresh copy of the repository without data/: nothing of earlier notebooks can help."""
    copy_course(tmp_path)
    results, twice = tmp_path / "results", tmp_path / f"notebooks/{path.name}"
    cells = [new_code_cell(cell.source) for cell in code_cells(path) for _ in range(2)]
    nbformat.write(new_notebook(cells=cells), twice)
    before = twice.read_bytes()
    env = {"CLIP_PROFILE": "smoke", "CLIP_RESULTS": str(results)}
    executed = execute(twice, cwd=tmp_path / "notebooks", env=env, timeout=300)
    assert twice.read_bytes() == before
    for first, again in zip(executed.cells[::2], executed.cells[1::2], strict=True):
        for run in (first, again):
            assert problems(new_notebook(cells=[run])) == [], first.source
        assert said(again.outputs) <= said(first.outputs), first.source
    for file in results.glob("*.json"):
        result = json.loads(file.read_text())
        assert file.stem == result["notebook"] == path.name[:2]
        assert {"profile", "machine", "seconds", "metrics"} <= set(result)
        for name, metric in result["metrics"].items():
            assert "mean" in metric and name.count("/") == 2


@each_notebook
def test_opens_as_the_others_do(path):
    cells, setup = read(path).cells, code_cells(path)[0]
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    opening = "\n".join(cell.source for cell in cells[: cells.index(setup)])
    for part in ("You will learn", "You need", "It takes", "colab.research.google.com"):
        assert part in opening, f"{part!r} belongs before the set-up cell"
    assert setup.source.strip() == SETUP, "not the text of notebooks/setup_cell.py"


@each_notebook
def test_committed_as_executed_from_top_to_bottom_and_clean(path):
    counts = [cell.execution_count for cell in code_cells(path) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make outputs`"
    assert problems(read(path)) == []


@each_notebook
def test_solutions_are_strict_folded_and_give_nothing_away(path):
    exercises = 0
    for cell in code_cells(path):
        exercises += "answer = ..." in cell.source
        if "strict=True)" in cell.source and "check(" in cell.source:
            exercises -= 1
            assert cell.source.startswith(SOLUTION)
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), "not folded in Jupyter"
            assert cell.metadata.get("cellView") == "form", "not folded in Colab"
            assert cell.outputs == [], "run `make outputs`"
    assert exercises == 0, "each exercise has one solution"


@each_notebook
def test_links_and_pictures_of_the_repository_exist(path):
    for target in [part.split(")")[0].split("#")[0] for part in prose(path).split("](")[1:]]:
        if target and not target.startswith(("http", "data:", "attachment:")):
            assert (path.parent / target.split(" ")[0]).exists(), f"{target} does not exist"
