"""Every notebook on `coco-val` with ViTConfig() and BertConfig(), on few pictures: `make full-size`.

No part of `make test`: there the same cells run with narrow towers of as many tokens, and the helpers with these.
"""

import pytest

from tests.coco_folder import write_coco
from tests.coco_val import FEW, NOTEBOOKS, hub_cache, run_notebook


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=64)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """86 and 110 million weights."""
    return hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, FEW)
