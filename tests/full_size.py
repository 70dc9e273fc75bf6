"""Every notebook on `coco-val` with ViTConfig() and BertConfig(), on few images: `make full-size`.

No part of `make test`: there the same cells run with narrow towers of as many tokens, and the
helpers with these.
"""

import pytest

from tests.coco_val import FEW, run_notebook
from tests.notebooks import NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, coco, full_cache, tmp_path):
    run_notebook(path, coco, full_cache, tmp_path, FEW, timeout=900)
