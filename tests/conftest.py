"""Fixtures that several test files share."""

import dataclasses

import pytest

from helpers.config import get_profile
from tests.coco_folder import write_coco
from tests.coco_val import hub_cache

LONGEST = ["test_notebooks.py", "test_coco_profile.py", "test_browser.py"]


def pytest_collection_modifyitems(items):
    """The longest files first: `make test` runs two at a time, and at its end neither waits long for the other."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile with folders of its own."""
    folder = tmp_path_factory.mktemp("smoke")

    class Elsewhere(type(get_profile("smoke"))):
        cache = folder / "cache"
        trained = folder / "trained"
        results = folder / "results"

    profile = get_profile("smoke")
    values = {f.name: getattr(profile, f.name) for f in dataclasses.fields(profile)}
    return Elsewhere(**{**values, "data": folder / "minicoco-smoke"})


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """64 photographs in COCO's layout."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, images=64)
    return root


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory):
    """The hub's cache with ViTConfig() and BertConfig(): 86 and 110 million weights."""
    return hub_cache(tmp_path_factory.mktemp("full-hub"))
