"""The notebook runner: what it names, what it leaves alone, what it strips."""

import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from scripts.run_notebooks import ROOT, WIDGET_VIEW, NotebookError, execute, problems, save, settle


def write(path, *sources, **metadata):
    nbformat.write(
        new_notebook(cells=[new_code_cell(source) for source in sources], metadata=metadata), path
    )
    return path


def run(*args):
    command = [sys.executable, "scripts/run_notebooks.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_first_error_names_notebook_and_cell(tmp_path):
    broken = write(tmp_path / "01_broken.ipynb", "a = 1", "# the division\na / 0", "a = 2")
    later = write(tmp_path / "02_later.ipynb", "a = 3")
    before = broken.read_bytes()
    result = run("--out", tmp_path / "out", broken, later)
    assert result.returncode == 1
    assert "01_broken.ipynb, cell 2 ('# the division') failed" in result.stdout
    assert "ZeroDivisionError" in result.stdout and "02_later" not in result.stdout
    assert broken.read_bytes() == before and not (tmp_path / "out").exists()


def test_out_leaves_the_source_untouched(tmp_path):
    source = write(tmp_path / "01_fine.ipynb", "import os\nos.environ['CLIP_PROFILE']", "1 + 1")
    before = source.read_bytes()
    result = run("--out", tmp_path / "out", "--profile", "smoke", "--only", "01", "--", source)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "01_fine.ipynb" in result.stdout and " s\n" in result.stdout
    assert source.read_bytes() == before
    cells = nbformat.read(tmp_path / "out/01_fine.ipynb", 4).cells
    assert cells[0].outputs[0].data["text/plain"] == "'smoke'"
    assert [cell.execution_count for cell in cells] == [1, 2]


def test_out_keeps_results_and_models_beside_the_copies(tmp_path):
    told = "from helpers.profiles import get_profile\np = get_profile('mini')\nprint(p.results, p.trained, sep='\\n')"
    told = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{told}"
    result = run("--out", tmp_path / "build/notebooks", write(tmp_path / "01_where.ipynb", told))
    assert result.returncode == 0, result.stdout + result.stderr
    text = nbformat.read(tmp_path / "build/notebooks/01_where.ipynb", 4).cells[0].outputs[0].text
    assert text.split() == [str(tmp_path / "build/results"), str(tmp_path / "build/trained")]
    for part in ("heads/seed-0/heads.safetensors", "finetuned/heads.json"):
        assert (tmp_path / "build/trained" / part).read_bytes() == (
            ROOT / "assets" / part
        ).read_bytes()


def test_in_place_refuses_noise(tmp_path):
    noisy = write(tmp_path / "01_noisy.ipynb", "import sys\nprint('careful', file=sys.stderr)")
    before = noisy.read_bytes()
    result = run("--in-place", noisy)
    assert (
        result.returncode == 1 and "cell 1: stderr" in result.stdout and "careful" in result.stdout
    )
    assert noisy.read_bytes() == before


def test_widgets_are_stripped_and_metadata_normalised(tmp_path):
    sources = ["import ipywidgets\nipywidgets.Button()", "print('kept')"]
    stale = {"widgets": {"x": {}}, "kernelspec": {"name": "mine", "display_name": "Mine"}}
    path = write(tmp_path / "01_widget.ipynb", *sources, **stale)
    notebook = execute(path, cwd=tmp_path)
    assert [len(cell.outputs) for cell in notebook.cells] == [0, 1]
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert problems(notebook) == []


def test_a_progress_bar_keeps_its_last_state(tmp_path):
    bar = "import sys\nfrom tqdm import tqdm\nfor _ in tqdm(range(50), file=sys.stdout, mininterval=0): pass"
    text = execute(write(tmp_path / "01_bar.ipynb", bar), cwd=tmp_path).cells[0].outputs[0].text
    assert "\r" not in text and text.count("it/s") == 1 and "50/50" in text


def test_settle_is_what_a_terminal_shows():
    assert settle("10%\r100%\ndone\n") == "100%\ndone\n"
    assert settle("a long line\rshort") == "shortg line"
    assert settle("bar\r   \r") == ""
    assert settle("\x1b[31mred\x1b[0m") == "red"


def test_kernel_death_and_timeouts_are_named(tmp_path):
    with pytest.raises(NotebookError, match=r"01_dead.ipynb, cell 1"):
        execute(write(tmp_path / "01_dead.ipynb", "import os\nos._exit(1)"), cwd=tmp_path)
    with pytest.raises(NotebookError, match=r"02_slow.ipynb, cell 1"):
        execute(
            write(tmp_path / "02_slow.ipynb", "import time\ntime.sleep(60)"),
            cwd=tmp_path,
            timeout=1,
        )


def test_problems_finds_what_must_not_be_committed():
    home = "/" + "home/somebody/course"
    cell = new_code_cell(
        "x", outputs=[nbformat.v4.new_output("stream", name="stdout", text=f"saved to {home}")]
    )
    big = new_code_cell(
        "y", outputs=[nbformat.v4.new_output("display_data", {"image/png": "A" * 300_000})]
    )
    view = new_code_cell(
        "z", outputs=[nbformat.v4.new_output("display_data", {WIDGET_VIEW: {"model_id": "1"}})]
    )
    source = new_markdown_cell(f"See {home}")
    fine = new_markdown_cell("See https://example.org/home/page, ~/tmp/x, and/or assets/work/x")
    notebook = new_notebook(cells=[cell, big, view, source, fine], metadata={"widgets": {}})
    found = "\n".join(problems(notebook))
    expected = (
        "metadata.widgets",
        "cell 1: a path",
        "cell 2: an output of",
        "cell 3: a saved widget",
        "cell 4: a path",
    )
    assert [part for part in expected if part not in found] == []
    assert "cell 5" not in found


def test_save_is_atomic_and_leaves_no_partial_file(tmp_path):
    save(new_notebook(), tmp_path / "deep/01.ipynb")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["01.ipynb"]
