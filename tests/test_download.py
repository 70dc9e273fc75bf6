"""helpers/download.py: COCO's archives in small, from a real server, through every fault, into whole folders only."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial

import pytest

from helpers import data
from helpers.config import ROOT, get_profile
from helpers.data import load_split
from helpers.probes import Instances
from helpers.storage import download
from helpers.storage.download import COCO_2017, Archive, DownloadError
from scripts.download_coco import main
from tests.coco_files import IDS, write_captions, write_images
from tests.faulty_server import serve
from tests.test_probes import write_instances

ANNOTATIONS = "/annotations/annotations_trainval2017.zip"
VAL, TRAIN = "/zips/val2017.zip", "/zips/train2017.zip"
ALL_FAULTS = [
    *[
        "hang up",
        "cut",
        "cut",
        "no range",
        "cut, unsaid",
        "no range, cut",
        503,
        (503, "0"),
        429,
        404,
        500,
    ],
    *["page", "page as long as the file", "shorter", "longer", "longer, unsaid", "wrong bytes"],
    *["another range", "no word on the range"],
]


def zipped(root, *folders, more=()):
    """A zip of folders below `root`, with entries for the folders themselves, as COCO's have."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for folder in folders:
            archive.mkdir(folder) if hasattr(archive, "mkdir") else archive.writestr(
                folder + "/", b""
            )
            for path in sorted((root / folder).iterdir()):
                archive.write(path, f"{folder}/{path.name}")
        for name, data in more:
            archive.writestr(name, data)
    return content.getvalue()


def described(files):
    """The table of archives for the files of a server."""
    names = {"annotations": ANNOTATIONS, "val2017": VAL, "train2017": TRAIN}
    return {
        name: Archive(path[1:], len(files[path]), hashlib.md5(files[path]).hexdigest(), 100_000)
        for name, path in names.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """COCO's three archives with 12 images in val and 5 in train."""
    root = tmp_path_factory.mktemp("site")
    for folder, ids in (("val2017", IDS), ("train2017", range(1, 6))):
        write_captions(root, {i: [f"a dog {i}", "a cat"] for i in ids}, folder)
        write_instances(root, [], ids, folder)
        write_images(root, ids, folder)
    more = [("annotations/person_keypoints_val2017.json", "{}")]
    return {
        ANNOTATIONS: zipped(root, "annotations", more=more),
        VAL: zipped(root, "val2017"),
        TRAIN: zipped(root, "train2017"),
    }


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serve(dict(files)) as server:
        monkeypatch.setenv("CLIP_COCO_URL", server.url)
        yield server


def profile(root, name="coco-val", **changes):
    sizes = (
        {"train_images": 8, "dev_images": 3, "val_images": 4}
        if name == "coco-val"
        else {"dev_images": 1}
    )
    return dataclasses.replace(get_profile(name), data=root, **(sizes | changes))


@pytest.fixture
def get(tmp_path, files):
    """Runs the download into tmp_path/coco with the table of the small archives."""
    small = described(files)

    def run(name="coco-val", archives=small, pauses=(0, 0), **options):
        download.download(
            profile(tmp_path / "coco", name), archives=archives, pauses=pauses, **options
        )
        return tmp_path / "coco"

    return run


def tree(root):
    """What is in a folder and when it was written; locks do not count."""
    return {
        str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.name != ".lock"
    }


def assert_whole(root, name="coco-val"):
    row = profile(root, name)
    sizes = {split: len(load_split(row, split)) for split in ("train", "dev", "val")}
    assert sizes == (
        {"train": 5, "dev": 3, "val": 4}
        if name == "coco-val"
        else {"train": 4, "dev": 1, "val": 12}
    )
    for folder in {row.train_folder, row.val_folder}:
        assert Instances(root, f"instances_{folder}.json").names
    assert not (root / ".unpacking").exists() and not list(root.glob("*.part"))


def assert_nothing_looks_complete(root):
    """No folder has its final name, and no annotation file, unless it is whole."""
    if (root / "val2017").exists():
        assert len(list((root / "val2017").iterdir())) == len(IDS)
    for path in root.glob("annotations/*"):
        json.loads(path.read_text())
    assert not (root / ".unpacking").exists()


# What there is afterwards


def test_coco_val_needs_two_archives(get, server):
    root = get()
    assert_whole(root)
    assert [path for path, _ in server.requests] == [ANNOTATIONS, VAL]
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {
        ".lock"
    }
    pictures = {f"val2017/{i:012d}.jpg" for i in IDS}
    notes = {f"annotations/{kind}_val2017.json" for kind in ("captions", "instances")}
    assert files == pictures | notes | {"val2017.zip", "annotations_trainval2017.zip"}


def test_coco_needs_three(get, server):
    root = get("coco", delete_zips=True)
    assert_whole(root, "coco")
    assert [path for path, _ in server.requests] == [ANNOTATIONS, TRAIN, VAL]
    assert not list(root.glob("*.zip"))


def test_a_second_call_touches_nothing(get, server):
    root = get(delete_zips=True)
    before, asked = tree(root), len(server.requests)
    get()
    assert tree(root) == before and len(server.requests) == asked


def test_from_coco_val_to_coco(get, server):
    get()
    kept = {path: time for path, time in tree(get()).items() if path.startswith("val2017/")}
    root = get("coco")
    assert_whole(root, "coco")
    assert [path for path, _ in server.requests] == [
        ANNOTATIONS,
        VAL,
        TRAIN,
    ]  # the annotations' zip was still there
    assert kept.items() <= tree(root).items()


def test_zips_that_somebody_fetched_by_hand(get, server, tmp_path, files):
    (tmp_path / "coco" / "val2017").mkdir(parents=True)  # empty
    (tmp_path / "coco" / "val2017.zip").write_bytes(files[VAL])
    (tmp_path / "coco" / "annotations_trainval2017.zip").write_bytes(files[ANNOTATIONS][:500])
    assert_whole(get())
    assert server.requests == [(ANNOTATIONS, "bytes=500-")]


def test_a_copy_of_ones_own_is_left_alone(get, server, tmp_path):
    """Only val2017/ and annotations/, and not to be written to."""
    root = tmp_path / "coco"
    write_captions(root, {i: ["a dog"] for i in IDS})
    write_instances(root, [])
    write_images(root, IDS)
    before = tree(root)
    for folder in (*root.iterdir(), root):
        folder.chmod(0o555)
    try:
        get()
        assert_whole(root)
        assert tree(root) == before and not (root / ".lock").exists() and server.requests == []
    finally:
        for folder in (root, *root.iterdir()):
            folder.chmod(0o755)


def test_a_copy_without_some_pictures(get, server):
    root = get()
    (root / "val2017" / f"{IDS[0]:012d}.jpg").unlink()
    with pytest.raises(
        DownloadError, match=r"val2017 holds 11 of the 12 pictures in captions_val2017\.json\. Move"
    ):
        get()
    (root / "val2017").rename(root / "mine")
    assert_whole(get())


def test_nothing_is_fetched_where_pictures_are_rendered(server, tmp_path):
    download.download(get_profile("mini"))
    download.download(dataclasses.replace(get_profile("smoke"), data=tmp_path / "minicoco-smoke"))
    assert server.requests == [] and not list(tmp_path.iterdir())


def test_the_published_facts():
    """As COCO's site gives them: the bytes of each archive, and room for pictures that a zip cannot make smaller."""
    assert {name: archive.size for name, archive in COCO_2017.items()} == {
        "annotations": 252_907_541,
        "val2017": 815_585_330,
        "train2017": 19_336_861_798,
    }
    for archive in COCO_2017.values():
        assert len(archive.md5) == 32 and int(archive.md5, 16) and archive.unpacked > archive.size
        assert archive.path.endswith("2017.zip")


# Everything that goes wrong on the way


@pytest.mark.parametrize("at", [0, 1], ids=["annotations", "pictures"])
@pytest.mark.parametrize("fault", ALL_FAULTS, ids=str)
def test_one_fault_and_then_a_good_server(get, server, fault, at, tmp_path):
    """Success at once, or a sentence and success at the next call."""
    server.faults = [None] * at + [fault]
    try:
        get()
    except DownloadError as error:
        assert str(error).startswith(server.url) and str(error).endswith(download.HELP)
        assert_nothing_looks_complete(tmp_path / "coco")
        get()
    assert_whole(tmp_path / "coco")


@pytest.mark.parametrize("fault", [f for f in ALL_FAULTS if f != "no range"], ids=str)
def test_a_server_that_does_nothing_else(get, server, fault, tmp_path):
    """A sentence, or, where each answer brings something, success; then success in any case."""
    server.always = fault
    try:
        get()
    except DownloadError as error:
        assert str(error).startswith(server.url) and "\n" not in str(error)
        assert_nothing_looks_complete(tmp_path / "coco")
    server.always = None
    assert_whole(get())


def test_no_room(get, server, files, tmp_path):
    vast = {name: archive._replace(unpacked=10**18) for name, archive in described(files).items()}
    message = r"COCO 2017 takes 2000000000\.0 GB more in .*coco; [\d.]+ GB are free\. Make room, or take --delete-zips"
    with pytest.raises(DownloadError, match=message):
        get(archives=vast)
    assert server.requests == [] and list(tree(tmp_path / "coco")) == []


def test_room_is_counted_for_what_is_yet_to_come(files, tmp_path, monkeypatch):
    row = described(files)["val2017"]
    rows = [
        row._replace(size=500, unpacked=1000),
        row._replace(path="zips/b.zip", size=300, unpacked=100),
    ]
    (tmp_path / "val2017.zip.part").write_bytes(bytes(200))

    def room(free, delete_zips):
        monkeypatch.setattr(
            download.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free})
        )
        try:
            return download._require_space(tmp_path, rows, delete_zips) is None
        except DownloadError:
            return False

    assert [room(free, False) for free in (1699, 1700)] == [
        False,
        True,
    ]  # 300 + 300, and 1100 unpacked
    assert [room(free, True) for free in (1399, 1400)] == [False, True]


def test_the_disk_fills_up_meanwhile(get, server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "copyfileobj", full)
        with pytest.raises(
            DownloadError,
            match=r"could not be laid out in .*coco: .*No space left on device\. CLIP_",
        ):
            get()
    assert_nothing_looks_complete(tmp_path / "coco")
    assert not (tmp_path / "coco" / "annotations").exists()
    assert_whole(get())
    assert [path for path, _ in server.requests] == [ANNOTATIONS, VAL]  # nothing was fetched twice


def test_a_place_that_cannot_be_written(files, server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(
        DownloadError,
        match=r"could not be laid out in .*file/coco: .*CLIP_COCO_DIR a copy that you",
    ):
        download.download(profile(tmp_path / "file" / "coco"), archives=described(files))


def test_an_address_that_is_none(get, server, monkeypatch):
    monkeypatch.setenv("CLIP_COCO_URL", "my/mirror")
    with pytest.raises(DownloadError, match=r"CLIP_COCO_URL is 'my/mirror', which is no address"):
        get()


@pytest.mark.parametrize("tail", ["", "/"])
def test_a_mirror(get, server, files, monkeypatch, tail):
    server.files = {f"/a/mirror{path}": content for path, content in files.items()}
    monkeypatch.setenv("CLIP_COCO_URL", f"{server.url}/a/mirror{tail}")
    assert_whole(get())


@pytest.mark.parametrize("name", ["val2017/../../evil.jpg", "val2017/a/../../../evil.jpg"])
def test_an_archive_that_would_write_elsewhere(get, server, files, name, tmp_path):
    evil = io.BytesIO(files[VAL])
    with zipfile.ZipFile(evil, "a") as archive:
        archive.writestr(name, b"evil")
    server.files[VAL] = evil.getvalue()
    with pytest.raises(
        DownloadError, match=r"val2017\.zip would write to 'val2017/.*evil\.jpg'.*Delete it"
    ):
        get(archives=described(files | {VAL: evil.getvalue()}))
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "coco" / "val2017").exists()
    assert_nothing_looks_complete(tmp_path / "coco")


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/tmp/evil.jpg", "evil.jpg", "val2017evil/a.jpg", "annotations/evil"]
)
def test_what_is_not_wanted_stays_in_the_archive(get, server, files, name, tmp_path):
    more = io.BytesIO(files[VAL])
    with zipfile.ZipFile(more, "a") as archive:
        archive.writestr(name, b"evil")
    server.files[VAL] = more.getvalue()
    assert_whole(get(archives=described(files | {VAL: more.getvalue()})))
    assert not [path for path in tmp_path.rglob("*") if "evil" in str(path.relative_to(tmp_path))]


# Killed, and two at once

CHILD = """
import json, shutil, sys, time
from pathlib import Path
from types import SimpleNamespace
from helpers.storage import download
root, table, stop = sys.argv[1:]
if stop != "no":  # stop for good after some files are unpacked
    copy, count = shutil.copyfileobj, 0
    def slow(*args):
        global count
        count += 1
        if count > int(stop):
            time.sleep(600)
        copy(*args)
    download.shutil.copyfileobj = slow
archives = {name: download.Archive(*row) for name, row in json.loads(table).items()}
row = SimpleNamespace(data=Path(root), rendered=False, train_folder="val2017", val_folder="val2017")
download.download(row, archives=archives, pauses=(0.1,) * 3)
print("done")
"""


def start(root, files, stop="no"):
    table = json.dumps(described(files))
    command = [sys.executable, "-u", "-c", CHILD, str(root), table, str(stop)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def kill_when(child, ready):
    """SIGKILL, as soon as `ready()`."""
    end = time.monotonic() + 300
    while not ready():
        assert child.poll() is None and time.monotonic() < end, (
            "it ended too early, or never came so far"
        )
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()


def test_killed_in_the_middle_of_the_download(get, server, files, tmp_path):
    root = tmp_path / "coco"
    half = len(files[VAL]) // 2
    server.faults = [None, "stall"]
    part = root / "val2017.zip.part"
    kill_when(start(root, files), lambda: part.exists() and part.stat().st_size >= half)
    assert not (root / "val2017").exists() and not (root / "val2017.zip").exists()
    assert_whole(get())
    assert server.requests[-1] == (VAL, f"bytes={half}-")


@pytest.mark.parametrize(
    "stop", [1, 5, 13]
)  # in the annotations; in the pictures; before the last picture
def test_killed_in_the_middle_of_unpacking(get, server, files, tmp_path, stop):
    root = tmp_path / "coco"
    # the file after `stop` whole ones has been opened for writing, and is empty
    kill_when(start(root, files, stop), lambda: unpacked(root) == stop + 1)
    assert not (root / "val2017").exists() and (root / ".unpacking").is_dir()
    assert (root / "annotations").exists() == (stop > 1)
    (root / ".unpacking" / "val2017").mkdir(exist_ok=True)
    (root / ".unpacking" / "val2017" / "stray.jpg").touch()  # what was left does not get in
    assert_whole(get())
    assert len(list((root / "val2017").iterdir())) == len(IDS)
    assert len(server.requests) == 2  # nothing is fetched twice


def unpacked(root):
    places = (
        root / ".unpacking" / "annotations",
        root / ".unpacking" / "val2017",
        root / "annotations",
    )
    return sum(len(list(place.iterdir())) for place in places if place.is_dir())


def test_a_second_process_waits_for_the_first(server, files, tmp_path):
    root = tmp_path / "coco"
    root.mkdir()
    with download._one_process(root):
        second = start(root, files)
        assert (
            second.stdout.readline()
            == f"Another process is fetching COCO 2017 into {root}: waiting for it.\n"
        )
        assert server.requests == []
    assert second.communicate(timeout=300)[0].endswith("done\n") and second.returncode == 0
    assert_whole(root)


def test_two_at_once_fetch_once(server, files, tmp_path):
    both = [start(tmp_path / "coco", files) for _ in range(2)]
    for child in both:
        assert child.communicate(timeout=300)[0].endswith("done\n") and child.returncode == 0
    assert_whole(tmp_path / "coco")
    assert sorted(path for path, _ in server.requests) == [ANNOTATIONS, VAL]


# From the command line and from notebooks


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["coco", *argv])
    try:
        main(list(argv))
        return 0, capsys.readouterr().out
    except SystemExit as error:
        return error.code, capsys.readouterr().out


def test_the_command(server, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_COCO_DIR", str(tmp_path / "coco"))
    small = partial(download.download, archives=described(files), pauses=(0,))
    monkeypatch.setattr(data, "download", small)
    code, out = command(monkeypatch, capsys, "--profile", "coco-val", "--delete-zips")
    assert code == 0 and out.endswith(f"{tmp_path / 'coco'}: complete\n")
    assert (
        f"COCO 2017 is in {tmp_path / 'coco'}: annotations, val2017, checked and unpacked." in out
    )
    assert_whole(tmp_path / "coco")
    assert not list((tmp_path / "coco").glob("*.zip"))
    assert command(monkeypatch, capsys) == (0, f"{tmp_path / 'coco'}: complete\n")
    assert "nothing to fetch" in command(monkeypatch, capsys, "--profile", "mini")[1]
    assert command(monkeypatch, capsys, "--profile", "huge")[0].startswith("PROFILE is 'huge'")


def test_the_command_as_users_type_it(server, tmp_path):
    """The genuine sizes and checksums, so that these files are refused: a sentence, no traceback."""
    env = {**os.environ, "CLIP_COCO_DIR": str(tmp_path / "coco"), "CLIP_COCO_URL": server.url}
    env.pop("CLIP_PROFILE", None)
    typed = [sys.executable, "-m", "scripts.download_coco", "--profile", "coco-val"]
    done = subprocess.run(typed, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    size = len(server.files[ANNOTATIONS])
    asked = f"{server.url}{ANNOTATIONS} has {size:,} bytes and not 252,907,541: it is another file. {download.HELP}\n"
    assert done.stderr == asked
    assert (
        not (tmp_path / "coco" / "annotations").exists()
        and not (tmp_path / "coco" / "val2017").exists()
    )


def test_notebooks_fetch_what_they_need(server, files, tmp_path, monkeypatch):
    from helpers import load_or_build

    monkeypatch.setattr(
        load_or_build, "download", partial(download.download, archives=described(files))
    )
    row = profile(tmp_path / "coco")
    assert [len(load_or_build.data(row, split)) for split in ("train", "dev", "val")] == [5, 3, 4]
    assert len(load_or_build.gallery(row, 2)[0]) == 2 and len(server.requests) == 2
