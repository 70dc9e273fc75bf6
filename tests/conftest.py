"""Fixtures that several test files share."""

import multiprocessing

import matplotlib
import pytest

from tests.coco_files import elsewhere

# What tests start as forks need not import PyTorch anew.
multiprocessing.set_forkserver_preload(["helpers.training", "hypothesis", "pytest"])
# No windows; set here and not in the environment, which the kernels of notebooks inherit.
matplotlib.use("Agg")
LONGEST = ["test_notebooks.py", "test_coco_profile.py", "test_run_again.py", "test_browser.py"]


def pytest_collection_modifyitems(items):
    """The longest files first: two processes run the tests, and neither waits long at the end."""
    order = {name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture
def no_figure_stays_open():
    import matplotlib.pyplot as plt

    yield
    assert plt.get_fignums() == []


@pytest.fixture
def styled():
    """The style of the course's figures; what is open afterwards is closed."""
    from helpers.viz import figures

    figures.style()
    yield
    figures.plt.close("all")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile with folders of its own."""
    folder = tmp_path_factory.mktemp("smoke")
    return elsewhere("smoke", folder, data=folder / "minicoco-smoke")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """64 photographs in COCO's layout."""
    from tests.coco_folder import write_coco

    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=64)
    return root
