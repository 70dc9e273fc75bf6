"""COCO's archives in small, from a real server, unpacked into whole folders only."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from helpers import load_or_build
from helpers.config import get_profile
from helpers.data import load_split
from helpers.probes import Instances
from helpers.storage import download
from helpers.storage.download import HELP
from scripts.download_coco import main
from tests.coco_files import IDS, profile, write_captions, write_images
from tests.faulty_server import serve
from tests.processes import die, dying_at, killed, two_at_once
from tests.test_probes import write_instances

MIRROR = "/a/mirror/"
ANNOTATIONS = f"{MIRROR}annotations/annotations_trainval2017.zip"
VAL, TRAIN = f"{MIRROR}zips/val2017.zip", f"{MIRROR}zips/train2017.zip"
NAMES = {"annotations": ANNOTATIONS, "val2017": VAL, "train2017": TRAIN}


def zipped(root, folder):
    """A zip of a folder below `root`, with an entry for the folder itself, as COCO's have."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in (root / folder, *sorted((root / folder).iterdir())):
            archive.write(path, path.relative_to(root))
    return content.getvalue()


def write_folder(root, ids, folder="val2017"):
    write_captions(root, {i: [f"a dog {i}", "a cat"] for i in ids}, folder)
    write_instances(root, [], ids, folder)
    write_images(root, ids, folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """COCO's three archives with 12 images in val and 5 in train."""
    root = tmp_path_factory.mktemp("site")
    write_folder(root, IDS)
    write_folder(root, range(1, 6), "train2017")
    (root / "annotations/person_keypoints_val2017.json").write_text("{}")
    return {path: zipped(root, name) for name, path in NAMES.items()}


@pytest.fixture
def small(files, monkeypatch):
    """The table of the small archives in place of COCO's."""
    facts = {path: (len(zip), hashlib.md5(zip).hexdigest()) for path, zip in files.items()}
    table = {name: (path.removeprefix(MIRROR), *facts[path]) for name, path in NAMES.items()}
    monkeypatch.setattr(download, "COCO_2017", table)
    monkeypatch.setattr(download, "PAUSES", (0, 0))
    return table


@pytest.fixture
def server(files, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serve(dict(files)) as server:
        server.url += MIRROR
        monkeypatch.setenv("CLIP_COCO_URL", server.url)
        yield server


def row_of(root, name="coco-val"):
    coco = dataclasses.replace(get_profile("coco"), data=root, dev_images=1)
    return profile(root) if name == "coco-val" else coco


@pytest.fixture
def root(tmp_path):
    return tmp_path / "coco"


@pytest.fixture
def get(root, small):
    """Runs the download into `root` with the small archives."""
    return lambda name="coco-val", **options: download.download(row_of(root, name), **options)


def tree(root):
    """What is in a folder and when it was written; locks do not count."""
    paths = [path for path in root.rglob("*") if path.name != ".lock"]
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in paths}


def assert_whole(root, name="coco-val"):
    row = row_of(root, name)
    sizes = [len(load_split(row, split)) for split in ("train", "dev", "val")]
    assert sizes == ([5, 3, 4] if name == "coco-val" else [4, 1, 12])
    for folder in {row.train_folder, row.val_folder}:
        assert Instances(root, f"instances_{folder}.json").names
    assert not (root / ".unpacking").exists() and not list(root.glob("*.part"))


def paths(server):
    return [path for path, _ in server.requests]


def assert_nothing_looks_complete(root):
    """No folder has its final name, and no annotation file, unless it is whole."""
    if (root / "val2017").exists():
        assert len(list((root / "val2017").iterdir())) == len(IDS)
    for path in root.glob("annotations/*"):
        json.loads(path.read_text())
    assert not (root / ".unpacking").exists()


# What there is afterwards


def test_coco_val_then_coco_and_a_further_call_touches_nothing(get, root, server):
    get()
    assert_whole(root)
    assert paths(server) == [ANNOTATIONS, VAL]
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    images = {f"val2017/{i:012d}.jpg" for i in IDS}
    notes = {f"annotations/{kind}_val2017.json" for kind in ("captions", "instances")}
    assert names - {".lock"} == images | notes | {"val2017.zip", "annotations_trainval2017.zip"}
    written = {path: time for path, time in tree(root).items() if path in images}
    get("coco", delete_zips=True)
    assert_whole(root, "coco")
    # The annotations' zip was still there.
    assert paths(server) == [ANNOTATIONS, VAL, TRAIN]
    before = tree(root)
    assert written.items() <= before.items()
    get("coco")
    get()
    assert tree(root) == before and len(server.requests) == 3


def test_a_copy_of_ones_own_is_left_alone(get, server, root):
    """Only val2017/ and annotations/, and perhaps not to be written to."""
    write_folder(root, IDS)
    before = tree(root)
    get()
    assert_whole(root)
    assert tree(root) == before and not (root / ".lock").exists() and server.requests == []


def test_a_copy_without_some_images(get, root, server):
    get()
    (root / "val2017" / f"{IDS[0]:012d}.jpg").unlink()
    with pytest.raises(OSError, match=r"val2017 holds 11 of its 12 images: move that folder"):
        get()
    (root / "val2017").rename(root / "mine")
    get()
    assert_whole(root)


def test_what_is_rendered_or_of_ones_own_is_not_fetched(server, tmp_path):
    own = {"train_folder": "holiday", "val_folder": "holiday"}
    for name, changes in (("mini", {}), ("smoke", {}), ("coco-val", own)):
        place = tmp_path / "minicoco-of-ones-own"
        download.download(dataclasses.replace(get_profile(name), data=place, **changes))
    assert server.requests == [] and not list(tmp_path.iterdir())


# Everything that goes wrong on the way


@pytest.mark.parametrize("at", [0, 1], ids=["annotations", "images"])
@pytest.mark.parametrize("fault", ["cut", 404, "wrong bytes"], ids=str)
def test_one_fault_and_then_a_good_server(get, server, fault, at, root):
    """Success at once, or a sentence and success at the next call."""
    server.faults = [None] * at + [fault]
    try:
        get()
    except OSError as error:
        assert server.url in str(error) and str(error).endswith(HELP) and "\n" not in str(error)
        assert_nothing_looks_complete(root)
        get()
    assert_whole(root)


def test_no_room(get, server, root, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Mock(free=1000))
    with pytest.raises(OSError, match=r"in .*coco: it takes [\d.]+ GB more, 0\.0 GB are fr"):
        get()
    assert server.requests == [] and list(tree(root)) == []


# Killed, and two at once


def fetch(root, table, site, stop=1000):
    """The download in a process of its own, which dies in a pause or before this file is there."""
    shutil.copyfileobj = dying_at(stop, shutil.copyfileobj)
    download.time = Mock(sleep=lambda seconds: die())
    download.COCO_2017 = table
    os.environ |= {"CLIP_COCO_URL": site, "no_proxy": "*"}
    download.download(profile(Path(root)))


def test_killed_in_the_middle_of_the_download(get, server, small, files, root):
    server.faults = [None, "cut"]
    killed(fetch, root, small, server.url)
    assert not (root / "val2017").exists() and not (root / "val2017.zip").exists()
    size = len(files[VAL]) // 2
    assert (root / "val2017.zip.part").stat().st_size == size
    get()
    assert_whole(root)
    assert server.requests[-1] == (VAL, f"bytes={size}-")


@pytest.mark.parametrize("stop", [2, 14], ids=["in the annotations", "before the last image"])
def test_killed_in_the_middle_of_unpacking(get, server, small, root, stop):
    killed(fetch, root, small, server.url, stop)
    assert not (root / "val2017").exists() and (root / ".unpacking").is_dir()
    assert (root / "annotations").exists() == (stop > 2)
    (root / ".unpacking" / "val2017").mkdir(exist_ok=True)
    (root / ".unpacking" / "val2017" / "stray.jpg").touch()
    get()
    assert_whole(root)
    # What was left does not get in, and nothing is fetched twice.
    assert len(list((root / "val2017").iterdir())) == len(IDS) and len(server.requests) == 2


def test_two_at_once_fetch_once(server, small, root):
    root.mkdir()
    code = f"from tests.test_download import fetch; fetch({str(root)!r}, {small}, {server.url!r})"
    idle = {"meanwhile": lambda: server.requests == []}
    two_at_once(root / ".lock", f"into {root}: waiting for it.\n", "-c", code, **idle)
    assert_whole(root)
    assert sorted(paths(server)) == [ANNOTATIONS, VAL]


# From the command line and from notebooks


def test_the_command(server, small, root, monkeypatch, capsys):
    monkeypatch.setenv("CLIP_COCO_DIR", str(root))
    monkeypatch.delenv("CLIP_PROFILE", raising=False)
    for argv in (["--profile", "coco-val", "--delete-zips"], []):
        main(argv)
        assert capsys.readouterr().out.endswith(f"{root}: complete\n")
        assert_whole(root)
        assert not list(root.glob("*.zip")) and len(server.requests) == 2


def test_notebooks_fetch_what_they_need(server, small, root):
    row = profile(root)
    assert [len(load_or_build.data(row, split)) for split in ("train", "dev", "val")] == [5, 3, 4]
    assert len(load_or_build.gallery(row, 2)[0]) == 2 and len(server.requests) == 2
