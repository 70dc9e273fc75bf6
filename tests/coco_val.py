"""What tests of `coco-val` share: a hub cache of random weights, and notebooks that read it."""

import json

import numpy as np

from helpers.storage import hub
from scripts.run_notebooks import execute, problems
from tests.fake_hub import published, write_cache
from tests.notebooks import copy_course

SIZES_OF = """

from dataclasses import replace

genuine = all_profiles
all_profiles = lambda: {{name: replace(row, **{sizes}) for name, row in genuine().items()}}
"""


def hub_cache(folder, **shape):
    """The hub's cache after a download: the published files' names, random weights."""
    write_cache(folder, published((hub.minilm() / "vocab.txt").read_bytes(), **shape))
    return folder


def run_notebook(path, coco, cache, tmp_path, sizes, timeout=300):
    """In a copy of the repository without data/, with these sizes; timeout: seconds a cell."""
    (copy,) = copy_course(tmp_path, path)
    with open(tmp_path / "helpers/config.py", "a", encoding="utf-8") as table:
        table.write(SIZES_OF.format(sizes=sizes))
    results = tmp_path / "results"
    env = {"CLIP_PROFILE": "coco-val", "CLIP_COCO_DIR": str(coco), "CLIP_RESULTS": str(results)}
    env |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    executed = execute(copy, cwd=tmp_path / "notebooks", env=env, timeout=timeout)
    # Photographs may weigh more, since these outputs are committed nowhere.
    assert [problem for problem in problems(executed) if " bytes, over " not in problem] == []
    first = next(cell for cell in executed.cells if cell.cell_type == "code")
    assert first.outputs[0].text.startswith("profile coco-val")
    for file in results.glob("*.json"):
        result = json.loads(file.read_text())
        assert (file.stem, result["profile"]) == (path.name[:2], "coco-val")
        assert all(np.isfinite(metric["mean"]) for metric in result["metrics"].values())
