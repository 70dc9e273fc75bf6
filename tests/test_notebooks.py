"""The notebooks: each runs alone on the smoke profile, and what is committed is fit to be read on GitHub."""

import ast
import functools
import json
import shutil

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from scripts.run_notebooks import ROOT, execute, problems

EXPECTED = [
    "00_start_here.ipynb",
    "01_coco_captions.ipynb",
    "02_embedding_extraction.ipynb",
    "03_projection_training.ipynb",
    "04_full_finetuning.ipynb",
    "05_siglip_loss.ipynb",
    "06_zero_shot_and_retrieval.ipynb",
    "07_attention_flow.ipynb",
    "08_scaling_out.ipynb",
]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SETUP = (ROOT / "scripts/setup_cell.py").read_text(encoding="utf-8").strip()

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@functools.cache
def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def prose(path):
    return "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def definitions(source):
    """{name: what it does} of the functions and classes at the top level of `source`; docstrings do not count."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for inner in ast.walk(node):
                if (
                    isinstance(inner, (ast.FunctionDef, ast.ClassDef))
                    and ast.get_docstring(inner) is not None
                ):
                    inner.body = inner.body[1:] or [ast.Pass()]
            found[node.name] = ast.dump(node)
    return found


@functools.cache
def helper_definitions():
    """{name: {module: what it does}} over all of helpers/."""
    found = {}
    for module in sorted((ROOT / "helpers").glob("*.py")):
        for name, meaning in definitions(module.read_text(encoding="utf-8")).items():
            found.setdefault(name, {})[module.stem] = meaning
    return found


def test_the_course_is_complete():
    names = [path.name for path in NOTEBOOKS]
    assert [name for name in EXPECTED if name not in names] == []


@each_notebook
def test_runs_alone_on_smoke(path, tmp_path):
    """In a fresh copy of the repository without data/, so that nothing an earlier notebook left behind can help."""
    for folder in ("helpers", "assets", "scripts"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    (tmp_path / "notebooks").mkdir()
    copy = shutil.copy(path, tmp_path / "notebooks")
    env = {"CLIP_PROFILE": "smoke", "CLIP_RESULTS": str(tmp_path / "results")}
    executed = execute(
        tmp_path / "notebooks" / path.name, cwd=tmp_path / "notebooks", env=env, timeout=300
    )
    assert problems(executed) == []
    assert nbformat.read(copy, 4) == read(path)
    for file in (tmp_path / "results").glob("*.json"):
        result = json.loads(file.read_text())
        assert file.stem == result["notebook"] == path.name[:2]
        assert {"profile", "machine", "seconds", "metrics"} <= set(result)
        assert all(
            "mean" in metric and name.count("/") == 2 for name, metric in result["metrics"].items()
        )


@each_notebook
def test_opens_as_the_others_do(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# "), (
        "a title comes first"
    )
    opening = "\n".join(cell.source for cell in cells[: cells.index(code_cells(path)[0])])
    for part in ("You will learn", "You need", "It takes", "colab.research.google.com"):
        assert part in opening, f"{part!r} belongs before the set-up cell"
    assert code_cells(path)[0].source.strip() == SETUP, (
        "the first code cell is the text of scripts/setup_cell.py"
    )


@each_notebook
def test_committed_outputs_are_clean(path):
    assert problems(read(path)) == []


@each_notebook
def test_committed_as_executed_from_top_to_bottom(path):
    counts = [cell.execution_count for cell in code_cells(path) if cell.source.strip()]
    assert counts == list(range(1, len(counts) + 1)), "run `make outputs`"


@each_notebook
def test_cells_are_short(path):
    long = {
        i: n
        for i, c in enumerate(code_cells(path), 1)
        if (n := len(c.source.strip().splitlines())) > 30
    }
    assert long == {}, "code cells (by number) with over 30 lines"


@each_notebook
def test_functions_are_the_helpers_own(path):
    """Where a notebook defines what helpers/ also has, both are the same but for docstrings."""
    transform = TransformerManager().transform_cell
    for cell in code_cells(path):
        for name, meaning in definitions(transform(cell.source)).items():
            twins = helper_definitions().get(name, {})
            assert not twins or meaning in twins.values(), (
                f"{name} differs from the one in helpers/{list(twins)}"
            )


@each_notebook
def test_solutions_are_folded_and_strict(path):
    """A solution is checked strictly, in a cell that JupyterLab and Colab fold."""
    for cell in code_cells(path):
        if "strict=True" in cell.source and "check(" in cell.source:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), (
                "metadata: jupyter.source_hidden = true"
            )
            assert cell.metadata.get("cellView") == "form", "metadata: cellView = form"
    answers = prose(path) + "".join(cell.source for cell in code_cells(path))
    assert answers.count("answer = ...") <= answers.count("strict=True"), (
        "an exercise without a solution"
    )


@each_notebook
def test_links_and_pictures_of_the_repository_exist(path):
    for target in [part.split(")")[0].split("#")[0] for part in prose(path).split("](")[1:]]:
        if target and not target.startswith(("http", "data:", "attachment:")):
            assert (path.parent / target.split(" ")[0]).exists(), f"{target} does not exist"


def test_docstrings_do_not_count_but_code_does():
    plain = definitions("def f(x):\n    return x")
    assert (
        definitions('def f(x):\n    "Says what."\n    return x')
        == plain
        != definitions("def f(x):\n    return -x")
    )
