"""helpers/transfer.py against a real server that misbehaves in every way that servers do."""

from __future__ import annotations

import hashlib
import io
import re

import numpy as np
import pytest
from tqdm import tqdm

from helpers.storage import download
from helpers.storage.download import DownloadError, fetch
from tests.faulty_server import serve

CONTENT = b"PK" + np.random.default_rng(0).bytes(700_001)  # more than two chunks
HALF = len(CONTENT) // 2
NEVER = (0, 0, 0)


class Scene:
    """A server with one file, and where it goes."""

    def __init__(self, server, folder, pauses):
        self.server, self.path, self.pauses = server, folder / "file.zip", pauses
        self.part = folder / "file.zip.part"
        self.bar = tqdm(file=io.StringIO(), unit="B", mininterval=0)

    def fetch(self, content=CONTENT, pauses=NEVER):
        url, md5 = f"{self.server.url}/zips/file.zip", hashlib.md5(content).hexdigest()
        fetch(url, self.path, len(content), md5, self.bar, pauses)

    def succeeds(self, **options):
        self.fetch(**options)
        assert self.path.read_bytes() == CONTENT and not self.part.exists()
        return [asked for _, asked in self.server.requests]

    def fails(self, message, **options):
        with pytest.raises(DownloadError, match=message) as caught:
            self.fetch(**options)
        assert re.match(r"http://127\.0\.0\.1:\d+/zips/file\.zip [a-z].*[.?]$", str(caught.value))
        assert not self.path.exists()
        return [asked for _, asked in self.server.requests]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    with serve({"/zips/file.zip": CONTENT}) as server:
        yield Scene(server, tmp_path, pauses)


def test_a_good_server_is_asked_once(scene):
    assert scene.succeeds() == [None]
    assert scene.succeeds() == [None] and not scene.pauses  # what is whole is not asked for again


def test_cut_several_times_and_resumed_by_range(scene):
    scene.server.faults = ["cut"] * 5
    asked = scene.succeeds(pauses=(0,))
    kept = [len(CONTENT) - len(CONTENT) // 2**k for k in range(1, 6)]
    assert asked[0] is None and len(asked) == 6
    for request, size in zip(asked[1:], kept, strict=True):
        assert abs(int(request[6:-1]) - size) < 6


def test_progress_starts_the_pauses_anew(scene):
    scene.server.faults = ["cut", 503, "cut", 503, "cut", 503]
    scene.succeeds(pauses=(1, 2))
    assert scene.pauses == [1, 2] * 3


def test_a_server_that_ignores_range(scene):
    scene.server.faults = ["cut", "no range"]
    assert scene.succeeds() == [None, f"bytes={HALF}-"]


def test_a_server_that_ignores_range_and_cuts_at_the_same_place_every_time(scene):
    scene.server.always = "no range, cut"
    asked = scene.fails(r"could not be fetched: the connection was cut\. 50% of it are kept")
    assert len(asked) == 1 + len(
        NEVER
    )  # the first brought something, those after each pause nothing more
    scene.server.always = None
    scene.succeeds()


@pytest.mark.parametrize("fault", ["hang up", "stall", "cut, unsaid", 500, 503, 429, 408])
def test_what_passes_is_tried_again(scene, fault, monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", 0.2)
    scene.server.faults = [fault]
    scene.succeeds(pauses=(7,))
    assert scene.pauses == [7]


@pytest.mark.parametrize(
    "fault, told", [(503, "503 Service Unavailable"), ("hang up", "closed"), (500, "500")]
)
def test_what_does_not_pass_ends_in_a_sentence(scene, fault, told):
    scene.server.always = fault
    asked = scene.fails(rf"could not be fetched: .*{told}.*0% of it are kept", pauses=(1, 2, 4))
    assert len(asked) == 4 and scene.pauses == [1, 2, 4]


def test_no_server_at_all(scene):
    scene.server.server_close()
    scene.fails(r"could not be fetched: .*refused", pauses=(1,))
    assert scene.pauses == [1]


@pytest.mark.parametrize(
    "asked, pause",
    [("5", 5), ("1", 2), ("300", 300), ("301", 2), ("-1", 2), ("soon", 2), ("9" * 30, 2)],
)
def test_a_pause_that_the_server_asks_for(scene, asked, pause):
    scene.server.faults = [(503, asked)]
    scene.succeeds(pauses=(2,))
    assert scene.pauses == [pause]


@pytest.mark.parametrize(
    "status, told", [(404, "404 Not Found"), (403, "403 Forbidden"), (410, "410 Gone")]
)
def test_what_will_not_pass_is_not_tried_again(scene, status, told):
    scene.server.always = status
    assert scene.fails(f"answers {told}") == [None] and not scene.pauses


@pytest.mark.parametrize("fault", ["page", "page as long as the file"])
def test_a_page_in_place_of_the_file(scene, fault):
    scene.server.always = fault
    scene.fails(r"sends no zip archive but b'<!DOCTYPE html>.*sign in first")
    assert not scene.part.exists() or scene.part.stat().st_size == 0
    scene.part.write_bytes(CONTENT[:HALF])
    scene.fails("sends no zip archive")
    assert scene.part.read_bytes() == CONTENT[:HALF]  # what had come is kept
    scene.server.always = None
    scene.succeeds()


@pytest.mark.parametrize("fault", ["shorter", "longer"])
@pytest.mark.parametrize("kept", [0, HALF])
def test_a_file_of_another_length(scene, fault, kept):
    scene.server.always = fault
    scene.part.write_bytes(CONTENT[:kept])
    size = f"{len(CONTENT) + (10 if fault == 'longer' else -10):,}"
    assert len(scene.fails(f"has {size} bytes and not {len(CONTENT):,}: it is another file")) == 1


def test_a_file_that_is_longer_than_it_may_be_and_does_not_say_so(scene):
    scene.server.always = "longer, unsaid"
    scene.fails(rf"has more than {len(CONTENT):,} bytes")


@pytest.mark.parametrize("fault", ["another range", "no word on the range"])
def test_an_answer_from_somewhere_else_in_the_file(scene, fault):
    scene.server.always = fault
    scene.part.write_bytes(CONTENT[:HALF])
    scene.fails(f"does not answer from byte {HALF:,} on")
    assert scene.part.read_bytes() == CONTENT[:HALF]


def test_wrong_bytes(scene):
    scene.server.always = "wrong bytes"
    asked = scene.fails(
        f"came with the MD5 [0-9a-f]{{32}}, the true one has {hashlib.md5(CONTENT).hexdigest()}"
    )
    assert asked == [None] and not scene.part.exists()
    scene.server.always = None
    scene.succeeds()


def test_the_beginning_of_another_file(scene):
    scene.part.write_bytes(b"PK" + bytes(HALF))
    assert scene.succeeds() == [f"bytes={HALF + 2}-", None]


def test_a_beginning_that_is_longer_than_the_whole(scene):
    scene.part.write_bytes(CONTENT + b"more")
    assert scene.succeeds() == [None]


def test_a_beginning_that_is_the_whole(scene):
    scene.part.write_bytes(CONTENT)
    assert scene.succeeds() == []


@pytest.mark.parametrize("kept, asked", [(HALF, [f"bytes={HALF}-"]), (0, [None])])
def test_a_file_under_its_own_name_that_is_not_whole(scene, kept, asked):
    """As another program leaves it that writes under the last name from the start."""
    scene.path.write_bytes(CONTENT[:kept])
    assert scene.succeeds() == asked


def test_a_whole_file_with_flipped_bytes(scene):
    scene.path.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert scene.succeeds() == [None]


def test_the_bar_tells_what_is_done_how_fast_and_how_long_it_takes(scene):
    bar, update, seen = scene.bar, scene.bar.update, []
    bar.update = lambda n: (
        update(n),
        seen.append((bar.desc.rstrip(": "), bar.n, bar.total, str(bar))),
    )
    scene.part.write_bytes(CONTENT[:HALF])
    scene.server.faults = ["no range, cut", "cut"]
    scene.succeeds()
    for what in ("fetching file.zip", "checking file.zip.part"):
        assert [done for name, done, _, _ in seen if name == what][-1] == len(CONTENT)
    for what, done, total, shown in seen:
        assert total == len(CONTENT)
        rate = r"\d\d:\d\d<\d\d:\d\d, +[\d.?]+B/s"
        assert re.search(
            rf"{what}: +{100 * done / total:.0f}%\|.*{done}/{total} \[{rate}", shown
        ), shown
