"""One file, from a real server that misbehaves: cut off, out of order, another file."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from helpers.storage import download
from helpers.storage.download import DownloadError, fetch
from tests.faulty_server import serve

CONTENT = b"PK" + np.random.default_rng(0).bytes(700_001)  # more than two chunks
HALF = len(CONTENT) // 2
MD5 = hashlib.md5(CONTENT).hexdigest()


class Scene:
    """A server with one file, and where it goes."""

    def __init__(self, server, folder, pauses):
        self.server, self.path, self.pauses = server, folder / "file.zip", pauses
        self.part = folder / "file.zip.part"

    def fetch(self):
        fetch(f"{self.server.url}/zips/file.zip", self.path, len(CONTENT), MD5)

    def succeeds(self):
        self.fetch()
        assert self.path.read_bytes() == CONTENT and not self.part.exists()
        return [span for _, span in self.server.requests]

    def fails(self, message):
        with pytest.raises(DownloadError, match=message) as caught:
            self.fetch()
        assert re.match(r"http://127\.0\.0\.1:\d+/zips/file\.zip [a-z]", str(caught.value))
        assert not self.path.exists()
        return [span for _, span in self.server.requests]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "PAUSES", (1, 2, 4))
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    with serve({"/zips/file.zip": CONTENT}) as server:
        yield Scene(server, tmp_path, pauses)


def test_a_good_server_is_asked_once(scene):
    assert scene.succeeds() == [None]
    # What is whole is not asked for again.
    assert scene.succeeds() == [None] and not scene.pauses


def test_cut_several_times_and_resumed_by_range(scene):
    scene.server.faults = ["cut"] * 5
    spans = scene.succeeds()
    sizes = [len(CONTENT) - len(CONTENT) // 2**k for k in range(1, 6)]
    assert spans[0] is None and len(spans) == 6
    for span, size in zip(spans[1:], sizes, strict=True):
        assert abs(int(span[6:-1]) - size) < 6


def test_progress_starts_the_pauses_anew(scene):
    scene.server.faults = ["cut", 503, "cut", 503, "cut", 503]
    scene.succeeds()
    assert scene.pauses == [1, 2] * 3


def test_a_server_that_ignores_range(scene):
    scene.server.faults = ["cut", "no range"]
    assert scene.succeeds() == [None, f"bytes={HALF}-"]


def test_a_server_that_ignores_range_and_cuts_at_the_same_place_every_time(scene):
    scene.server.always = "no range, cut"
    spans = scene.fails(rf"could not be fetched \(the connection was cut\); {HALF:,} bytes of it")
    # The first brought something, those after each pause nothing more.
    assert len(spans) == 4 and scene.pauses == [1, 2, 4]
    scene.server.always = None
    scene.succeeds()


@pytest.mark.parametrize("fault", ["hang up", "stall", 500, 503, 429])
def test_what_passes_is_tried_again(scene, fault, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    scene.server.faults = [fault]
    scene.succeeds()
    assert scene.pauses == [1]


@pytest.mark.parametrize("fault, reason", [(503, "503"), ("hang up", "closed")])
def test_what_does_not_pass_ends_in_a_sentence(scene, fault, reason):
    scene.server.always = fault
    assert len(scene.fails(rf"could not be fetched \(.*{reason}.*0 bytes of it are kept")) == 4
    assert scene.pauses == [1, 2, 4]


def test_no_server_at_all(scene):
    scene.server.server_close()
    scene.fails(r"could not be fetched \(.*refused")


@pytest.mark.parametrize("status", [403, 404])
def test_what_will_not_pass_is_not_tried_again(scene, status):
    scene.server.always = status
    assert scene.fails(rf"could not be fetched \(.*{status}") == [None] and not scene.pauses


@pytest.mark.parametrize("fault", ["page", "another length"])
def test_another_file(scene, fault):
    scene.part.write_bytes(CONTENT[:HALF])
    scene.server.always = fault
    assert len(scene.fails(rf"is another file: it has \d+ bytes and not {len(CONTENT)}")) == 1
    # What had come is kept.
    assert scene.part.read_bytes() == CONTENT[:HALF]
    scene.server.always = None
    scene.succeeds()


@pytest.mark.parametrize("fault", ["wrong bytes", "page as long as the file"])
def test_wrong_bytes(scene, fault):
    scene.server.always = fault
    assert scene.fails("came with the wrong MD5; nothing of it is kept") == [None]
    assert not scene.part.exists()
    scene.server.always = None
    scene.succeeds()


@pytest.mark.parametrize("begun", [b"PK" + bytes(HALF), CONTENT + b"more"])
def test_the_beginning_of_another_file(scene, begun):
    scene.part.write_bytes(begun)
    scene.fails("wrong MD5")
    scene.succeeds()


def test_a_beginning_that_is_the_whole(scene):
    scene.part.write_bytes(CONTENT)
    assert scene.succeeds() == []


@pytest.mark.parametrize("size, spans", [(HALF, [f"bytes={HALF}-"]), (0, [None])])
def test_a_file_under_its_own_name_that_is_not_whole(scene, size, spans):
    """As another program leaves it that writes under the last name from the start."""
    scene.path.write_bytes(CONTENT[:size])
    assert scene.succeeds() == spans
