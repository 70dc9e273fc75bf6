"""Fixtures that several test files share."""

import dataclasses

import pytest

from helpers.profiles import get_profile


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
