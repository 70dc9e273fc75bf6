"""The notebook runner: what it names, what it leaves alone, what it strips."""

from functools import partial

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from scripts.run_notebooks import ROOT, WIDGET_VIEW, execute, problems
from tests.processes import finish

run = partial(finish, "scripts/run_notebooks.py")


def write(path, *sources, **metadata):
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


def test_first_error_names_notebook_and_cell(tmp_path):
    broken = write(tmp_path / "01_broken.ipynb", "a = 1", "# the division\na / 0", "a = 2")
    later = write(tmp_path / "02_later.ipynb", "a = 3")
    before = broken.read_bytes()
    text = run("--out", tmp_path / "out", broken, later, status=1)
    assert "ZeroDivisionError" in text and "02_later" not in text
    assert "01_broken.ipynb, cell 2 ('# the division') failed" in text
    assert broken.read_bytes() == before and not (tmp_path / "out").exists()


def test_copies_keep_results_and_models_beside_them_and_leave_the_source_untouched(tmp_path):
    where = "import os\nprint(os.environ['CLIP_RESULTS'], os.environ['CLIP_TRAINED'])"
    source = write(tmp_path / "01_where.ipynb", where, "#@title Solution\nprint('shown')")
    before = source.read_bytes()
    text = run("--out", tmp_path / "build/notebooks", "--only", "01", "--", source)
    assert "01_where.ipynb" in text and source.read_bytes() == before
    cells = nbformat.read(tmp_path / "build/notebooks/01_where.ipynb", 4).cells
    folders = [str(tmp_path / "build" / part) for part in ("results", "trained")]
    assert cells[0].outputs[0].text.split() == folders and cells[1].outputs[0].text == "shown\n"
    for part in ("heads/seed-0/heads.safetensors", "finetuned/heads.json"):
        copy = tmp_path / "build/trained" / part
        assert copy.read_bytes() == (ROOT / "assets" / part).read_bytes()


def test_in_place_refuses_noise_and_saves_solutions_without_their_output(tmp_path):
    solved = write(tmp_path / "01_solved.ipynb", "print(6)", "#@title Solution\nprint(7)")
    noisy = write(tmp_path / "02_noisy.ipynb", "import sys\nprint('careful', file=sys.stderr)")
    before = noisy.read_bytes()
    text = run("--in-place", solved, noisy, status=1)
    assert "cell 1: stderr" in text and "careful" in text
    assert noisy.read_bytes() == before
    # A solution is run like all cells.
    cells = nbformat.read(solved, 4).cells
    assert [(cell.execution_count, len(cell.outputs)) for cell in cells] == [(1, 1), (2, 0)]
    assert sorted(path.name[:2] for path in tmp_path.iterdir()) == ["01", "02"]


BAR = "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(50), file=sys.stdout): pass"


def test_widgets_are_stripped_metadata_normalised_and_a_progress_bar_keeps_its_last_state(tmp_path):
    stale = {"widgets": {"x": {}}, "kernelspec": {"name": "mine", "display_name": "Mine"}}
    source = write(tmp_path / "01.ipynb", "import ipywidgets\nipywidgets.Button()", BAR, **stale)
    notebook = execute(source, cwd=tmp_path)
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 1] and problems(notebook) == []
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec["name"] == "python3"
    text = notebook.cells[1].outputs[0].text
    assert "\r" not in text and text.count("it/s") == 1 and "50/50" in text


def test_problems_finds_what_must_not_be_committed():
    home = "/" + "home/somebody/course"
    outputs = {
        "cell 1: a path": new_output("stream", name="stdout", text=f"saved to {home}"),
        "cell 2: an output of": new_output("display_data", {"image/png": "A" * 300_000}),
        "cell 3: a saved widget": new_output("display_data", {WIDGET_VIEW: {"model_id": "1"}}),
        "cell 4: error": new_output("error", ename="E", evalue="e", traceback=[]),
    }
    cells = [new_code_cell("x", outputs=[output]) for output in outputs.values()]
    cells += map(new_markdown_cell, (home, "https://example.org/home/page, ~/tmp/x, assets/work/x"))
    found = problems(new_notebook(cells=cells, metadata={"widgets": {}}))
    expected = ["metadata.widgets", *outputs, "cell 5: a path"]
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))
