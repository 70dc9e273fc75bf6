"""The house: imports go one way, the notebooks hold the lesson, and nothing grows too long."""

import ast
import copy
import graphlib
import re
import subprocess
import sys

import pytest

from scripts.run_notebooks import ROOT
from tests.notebooks import NOTEBOOKS, code_cells, prose, python

HELPERS = {path: path.read_text(encoding="utf-8") for path in (ROOT / "helpers").rglob("*.py")}

# A module imports from its own layer and those above it.
LAYERS = [
    "exercises config storage",
    "minicoco encoders",
    "data",
    "losses model features",
    "training_context evaluation probes distributed published_clip",
    "training",
    "load_or_build",
    "attention max_flow saliency_metrics",
    "viz",
]
LAYER = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
CORE = """losses model encoders data features evaluation training_context training attention
max_flow""".split()

# What a notebook defines in full: the same code as in the helper.
LESSON = {
    "02": "masked_mean ImageTower TextTower embed_batches",
    "03": "same_image clip_loss ProjectionHead CLIP ranks retrieval",
    "04": "parameter_groups warmup_cosine some_patches take_step dev_metrics fit average_weights",
    "05": "siglip_loss",
    "06": "prompt class_embeds classify",
    "07": "record fuse_heads rollout max_flow_to_inputs attention_flow relevance pointing_game",
    "08": "Gather gathered_clip_loss sigmoid_block pass_on ring_siglip_loss chunked_siglip_loss "
    "cached_backward",
}
each_lesson = pytest.mark.parametrize(
    "number, name", [(number, name) for number, names in LESSON.items() for name in names.split()]
)
each_helper = pytest.mark.parametrize("path", HELPERS, ids=lambda p: str(p.relative_to(ROOT)))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
DEFINITION = ast.FunctionDef, ast.ClassDef


# Arrows


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """The modules of ours that a helper imports, at the top of the file or in a function."""
    names = set()
    for node in ast.walk(ast.parse(HELPERS[path])):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {module(path) for path in HELPERS} - {"helpers"}
    outside = "scripts", "tests", "benchmarks"
    return {name for name in names if name in files or name.startswith(outside)}


@each_helper
def test_imports_go_one_way(path):
    own = [*module(path).split("."), ""][1]
    others = {name.split(".")[1] if name.startswith("helpers.") else name for name in imports(path)}
    up = {name for name in others if LAYER.get(name, len(LAYERS)) > LAYER.get(own, 0)}
    assert not up, f"{module(path)} must not import {up}"
    assert own not in CORE or not others & {"viz", "minicoco"}
    assert own != "exercises" or not others


def test_every_module_has_its_layer_and_imports_go_in_no_circle():
    graph = {module(path): imports(path) - {module(path)} for path in HELPERS}
    assert list(graphlib.TopologicalSorter(graph).static_order())
    assert {name.split(".")[1] for name in graph if name != "helpers"} == set(LAYER)


def test_workers_of_max_flow_and_downloads_need_no_torch():
    code = "import sys, helpers.max_flow, helpers.storage.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# The lesson


def definitions(source):
    return {node.name: node for node in ast.parse(source).body if isinstance(node, DEFINITION)}


def meaning(node):
    """A definition's code without docstrings and annotations."""
    node = copy.deepcopy(node)
    for part in ast.walk(node):
        if isinstance(part, DEFINITION) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
        if isinstance(part, ast.FunctionDef):
            part.returns = None
        if isinstance(part, ast.arg):
            part.annotation = None
    return ast.dump(node)


FLAT = [definitions(text) for path, text in HELPERS.items() if path.parent.name == "helpers"]


def of_helpers(name):
    """The definitions of that name in helpers/*.py."""
    return [module[name] for module in FLAT if name in module]


def notebook(number):
    return next(path for path in NOTEBOOKS if path.name.startswith(number))


@each_lesson
def test_the_notebook_defines_what_the_helper_holds_and_the_helper_leads_there(number, name):
    cells = [definitions(python(cell)) for cell in code_cells(notebook(number))]
    assert any(name in cell for cell in cells), f"notebook {number} does not define {name}"
    (node,) = of_helpers(name)  # the same code: see test_what_both_define_is_the_same
    assert number in dict(places(ast.get_docstring(node))), f'Taught in notebook {number}, "…"'


def places(text):
    """The numbers of notebooks and the headings that docstrings lead to."""
    return re.findall(r'Taught in notebook (\d\d), "(.+?)"', " ".join((text or "").split()))


@each_helper
def test_what_docstrings_lead_to_exists(path):
    for number, heading in places(HELPERS[path]):
        headings = re.findall(r"^#+ +(.+?) *$", prose(notebook(number)), re.M)
        assert heading in headings


@each_notebook
def test_what_both_define_is_the_same(path):
    for cell in code_cells(path):
        for name, node in definitions(python(cell)).items():
            twins = [meaning(twin) for twin in of_helpers(name)]
            assert not twins or meaning(node) in twins, f"{name} is another one in helpers/"


# Sizes


def code_lines(source):
    """The numbers of the lines that hold code: no comments, no docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, *DEFINITION)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, source.splitlines()), 1)
    return {i for i, line in lines if line and line[0] != "#"} - docstrings


@each_helper
def test_modules_and_functions_are_short_and_a_line_holds_one_statement(path):
    lines = code_lines(HELPERS[path])
    assert len(lines) <= 220
    for node in ast.walk(ast.parse(HELPERS[path])):
        assert not isinstance(node, ast.NamedExpr), f":= in line {node.lineno}"
        if isinstance(node, ast.FunctionDef):
            own = sum(node.lineno <= line <= node.end_lineno for line in lines)
            assert own <= 60, f"{node.name} has {own} lines of code"
    statements = [node for node in ast.walk(ast.parse(HELPERS[path])) if isinstance(node, ast.stmt)]
    assert len({node.lineno for node in statements}) == len(statements)


@each_notebook
def test_cells_are_short(path):
    for number, cell in enumerate(code_cells(path), 1):
        body = ast.parse(python(cell)).body
        most = 60 if len(body) == 1 and isinstance(body[0], DEFINITION) else 30
        assert len(code_lines(python(cell))) <= most, f"code cell {number}"
