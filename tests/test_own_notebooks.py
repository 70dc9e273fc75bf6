"""Every notebook runs on a reader's pictures: few, one caption each, no boxes and no labels."""

import pytest

from scripts.run_notebooks import execute, problems
from tests.notebooks import NOTEBOOKS, copy_course
from tests.test_own_data import write_pictures, write_table

# Cells that say what such data lacks; whatever else needs it shows nothing.
SAY_SO = {"00": 0, "01": 3, "02": 1, "03": 0, "04": 1, "05": 0, "06": 3, "07": 1, "08": 0, "09": 0}


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A copy of the course, and 48 pictures beside it."""
    folder = tmp_path_factory.mktemp("own")
    copy_course(folder, *NOTEBOOKS)
    write_table(folder / "photos", write_pictures(folder / "photos", count=48), "csv")
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_own_pictures_and_says_what_they_lack(path, course):
    env = {"CLIP_PROFILE": "smoke", "CLIP_DATA": str(course / "photos")}
    env["CLIP_RESULTS"] = str(course / "results")
    copy = course / "notebooks" / path.name
    executed = execute(copy, cwd=copy.parent, env=env, timeout=300)
    # Large pictures and the reader's own paths are no fault on the reader's machine; warnings are.
    assert [problem for problem in problems(executed) if "stderr" in problem] == []
    outputs = [str(cell.get("outputs")) for cell in executed.cells]
    assert sum("This data has no" in text for text in outputs) == SAY_SO[path.name[:2]]
