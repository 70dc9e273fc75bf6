"""The notebooks as the tests read them."""

import ast
import functools
import re
import shutil

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from scripts.run_notebooks import ROOT, settle

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@functools.cache
def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def python(cell):
    """A cell's source as Python: what only IPython understands has become calls."""
    return TransformerManager().transform_cell(cell.source)


def taken(path, *names):
    """Functions that no helper holds, as the notebook's cells define them."""
    body = [node for cell in code_cells(path) for node in ast.parse(python(cell)).body]
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    functions = [node for node in body if getattr(node, "name", None) in names]
    space = {}
    exec(compile(ast.Module([*imports, *functions], []), path.name, "exec"), space)
    return [space[name] for name in names]


def prose(path):
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


TIMES = re.compile(r"\d/\d+ \[|\d (s|ms|seconds?|minutes?)\b|/s\b|a second|speed-up|faster|peaks")
COLUMN = re.compile(r".*seconds here(\n.+)*")  # of a table


def said(outputs):
    """The lines of a cell's outputs, without progress and times: the same in every run."""
    text = ""
    for output in outputs:
        text += output.get("text", "")
        if "text/plain" in output.get("data", {}):
            text += output["data"]["text/plain"] + "\n"
    lines = COLUMN.sub("", settle(text)).splitlines()
    return {line for line in lines if not TIMES.search(line)}


def copy_course(folder, *paths):
    """What notebooks need of the repository, and the notebooks at `paths`, in another folder."""
    for name in ("helpers", "assets", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    return [shutil.copy(path, folder / "notebooks") for path in paths]
