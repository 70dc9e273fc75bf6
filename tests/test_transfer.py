"""One file, from a real server that misbehaves: cut off, out of order, another file."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from helpers.storage import download
from tests.faulty_server import serve

CONTENT = b"PK" + np.random.default_rng(0).bytes(700_001)  # more than two chunks
HALF = len(CONTENT) // 2
MD5 = hashlib.md5(CONTENT).hexdigest()


class Scene:
    """A server with one file, and where it goes."""

    def __init__(self, server, folder):
        self.server, self.path, self.part = server, folder / "file.zip", folder / "file.zip.part"
        self.pauses = []

    def fetch(self, faults=(), always=None):
        """Fetches the file; the Range of each request."""
        self.server.faults, self.server.always = list(faults), always
        download.fetch(f"{self.server.url}/zips/file.zip", self.path, len(CONTENT), MD5)
        assert self.path.read_bytes() == CONTENT and not self.part.exists()
        return [span for _, span in self.server.requests]

    def fails(self, fault, message):
        """The number of requests of a failing fetch."""
        with pytest.raises(OSError, match=message) as caught:
            self.fetch(always=fault)
        assert re.match(r"http://127\.0\.0\.1:\d+/zips/file\.zip [a-z]", str(caught.value))
        assert not self.path.exists()
        return len(self.server.requests)


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (1, 2, 4))
    monkeypatch.setattr(download, "PATIENCE", 2)
    with serve({"/zips/file.zip": CONTENT}) as server:
        scene = Scene(server, tmp_path)
        monkeypatch.setattr(download.time, "sleep", scene.pauses.append)
        yield scene


def test_cut_several_times_and_resumed_by_range(scene):
    spans = scene.fetch(["cut"] * 5)
    sizes = [len(CONTENT) - len(CONTENT) // 2**k for k in range(1, 6)]
    assert spans[0] is None and len(spans) == 6
    for span, size in zip(spans[1:], sizes, strict=True):
        assert abs(int(span[6:-1]) - size) < 6


def test_what_passes_is_tried_again_and_progress_starts_the_pauses_anew(scene):
    scene.fetch(["cut", "hang up", "cut", "hang up", "stall", "hang up"])
    assert scene.pauses == [1, 2] * 3


def test_what_does_not_pass_ends_in_a_sentence(scene):
    scene.part.write_bytes(CONTENT[:HALF])
    message = rf"could not be fetched \(.*closed.*\); {HALF:,} bytes of it are kept"
    assert scene.fails("hang up", message) == 4 and scene.pauses == [1, 2, 4]
    scene.fetch()


@pytest.mark.parametrize("status", [403, 404, 503])
def test_what_the_server_refuses_is_not_tried_again(scene, status):
    assert scene.fails(status, rf"could not be fetched \(.*{status}") == 1 and not scene.pauses


# Each with what is kept of the half that has come already.
ANOTHER = {
    "page": ("another file", HALF),
    "another length": ("another file", HALF),
    "no range": ("another file", HALF),
    "wrong bytes": ("came with the wrong MD5; nothing of it is kept", 0),
}


@pytest.mark.parametrize("fault", ANOTHER)
def test_another_file(scene, fault):
    scene.part.write_bytes(CONTENT[:HALF])
    message, kept = ANOTHER[fault]
    assert scene.fails(fault, message) == 1
    assert (scene.part.stat().st_size if scene.part.exists() else 0) == kept
    scene.fetch()


# Under its own name, too, as another program leaves it that writes there from the start.
@pytest.mark.parametrize("name", ["file.zip", "file.zip.part"])
@pytest.mark.parametrize(
    "size, spans", [(len(CONTENT), []), (HALF, [f"bytes={HALF}-"]), (0, [None])]
)
def test_a_beginning_is_gone_on_from(scene, name, size, spans):
    scene.path.with_name(name).write_bytes(CONTENT[:size])
    assert scene.fetch() == spans
