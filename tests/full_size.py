"""Every notebook on `coco-val` with ViTConfig() and BertConfig(), on few images: `make full-size`.

No part of `make test`: there the same cells run with narrow towers of as many tokens.
"""

import pytest

from tests.coco_val import hub_cache, run_notebook
from tests.notebooks import NOTEBOOKS

FEW = {"train_images": 16, "dev_images": 8, "val_images": 8, "batch_size": 8}
FEW |= {"head_epochs": 2, "tune_epochs": 1, "seeds": 1}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The hub's cache: 86 and 110 million weights."""
    return hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, coco, cache, tmp_path):
    run_notebook(path, coco, cache, tmp_path, FEW, timeout=900)
