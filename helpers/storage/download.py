"""COCO 2017 from its site to disk, unpacked whole or not at all.

    <root>/val2017.zip.part → val2017.zip → .unpacking/val2017/ → val2017/

A folder has its name only when everything is in it, so a run may be stopped anywhere and started
again.
"""

import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from functools import partial
from pathlib import Path

from tqdm import tqdm

from helpers.config import Profile
from helpers.storage.files import one_process

SITE = "http://images.cocodataset.org/"
# Path below the site's address, bytes, MD5.
COCO_2017 = {
    "annotations": ("annotations/annotations_trainval2017.zip", 252_907_541,
                    "f4bbac642086de4f52a3fdda2de5fa2c"),
    "val2017": ("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
    "train2017": ("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
}  # fmt: skip
# An archive and its content beside each other: images take as much again, annotations a bit more.
ROOM = 2.1
PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before the next try, after each failure in a row
PATIENCE = 60  # seconds without a byte, then the connection counts as broken
CHUNK = 1 << 18  # bytes
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)

WHERE = (
    "Notebook 01 renders MiniCOCO; `python -m scripts.download_coco --profile coco-val` fetches "
    "COCO 2017; CLIP_COCO_DIR names a copy you already have."
)
HELP = "CLIP_COCO_URL names a mirror, CLIP_COCO_DIR a copy that you have or another place for it."


def download(profile: Profile, delete_zips: bool = False) -> None:
    """Brings what `profile` needs of COCO 2017 into `profile.data`, unless it is there.

    A copy of your own counts: annotations/{captions,instances}_*.json and as many images as the
    captions are for. `delete_zips` deletes what has been unpacked. Raises OSError with what helps.
    """
    root, folders = Path(profile.data), {profile.train_folder, profile.val_folder}
    folders = [] if profile.rendered else sorted(folders & COCO_2017.keys())
    kinds = ("captions", "instances")
    notes = [f"annotations/{kind}_{folder}.json" for folder in folders for kind in kinds]
    parts = {"annotations": notes} | {folder: [folder] for folder in folders}
    try:
        if _missing(root, parts):
            root.mkdir(parents=True, exist_ok=True)
            with one_process(root / ".lock", f"fetching COCO 2017 into {root}"):
                # Another process may have brought it in the meantime.
                missing = _missing(root, parts)
                _require_space(root, missing)
                for name, paths in missing.items():
                    _bring(root, name, paths, delete_zips)
        for folder in folders:
            _require_images(root, folder)
    except OSError as error:
        raise OSError(f"COCO 2017 could not be laid out in {root}: {error}. {HELP}") from error


def _missing(root: Path, parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """The files and folders of each archive that are not there."""
    rest = {name: [p for p in paths if not (root / p).exists()] for name, paths in parts.items()}
    return {name: paths for name, paths in rest.items() if paths}


def _require_space(root: Path, names) -> None:
    zips = [root / Path(COCO_2017[name][0]).name for name in names]
    have = sum(_size(path) + _size(_part(path)) for path in zips)
    need = sum(ROOM * COCO_2017[name][1] for name in names) - have
    free = shutil.disk_usage(root).free
    if need > free:
        raise OSError(f"it takes {need / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")


def _require_images(root: Path, folder: str) -> None:
    """Raises if there are fewer images than have captions. Counts, and parses nothing."""
    listed = (root / f"annotations/captions_{folder}.json").read_bytes().count(b'"file_name"')
    count = sum(entry.name.endswith(".jpg") for entry in os.scandir(root / folder))
    if count < listed:
        fix = "move that folder away and start again, then it is fetched whole"
        raise OSError(f"{folder} holds {count:,} of its {listed:,} images: {fix}")


def _bring(root: Path, name: str, paths: list[str], delete_zips: bool) -> None:
    """Fetches an archive and unpacks the files and folders `paths` of it."""
    address, size, md5 = COCO_2017[name]
    archive, staging = root / Path(address).name, root / ".unpacking"
    site = os.environ.get("CLIP_COCO_URL") or SITE
    fetch(f"{site.rstrip('/')}/{address}", archive, size, md5)
    # Perhaps of a run that was killed.
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as content:
            members = [m for m in content.infolist() if m.filename.startswith(tuple(paths))]
            with _bar(f"unpacking {name}", sum(m.file_size for m in members)) as bar:
                for member in members:
                    content.extract(member, staging)
                    bar.update(member.file_size)
        for path in paths:
            (root / path).parent.mkdir(exist_ok=True)
            os.replace(staging / path, root / path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if delete_zips:
        archive.unlink()
    print(f"{name}: checked and unpacked in {root}.")


def fetch(url: str, path: Path, size: int, md5: str) -> None:
    """The file at `path`, of `size` bytes and checked; what has come of it is kept in <path>.part.

    A broken connection is tried again, the last time when nothing more has come after all PAUSES.
    Raises OSError then, and at once where the server refuses or has another file.
    """
    part, failures = _part(path), 0
    if path.exists():
        # Whole, or a beginning that another program left.
        os.replace(path, part)
    while _size(part) < size:
        before = _size(part)
        try:
            _continue(url, part, size)
        except BROKEN as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > len(PAUSES) or isinstance(error, urllib.error.HTTPError):
                kept = f"{_size(part):,} bytes of it are kept, and the next run goes on from there"
                raise OSError(f"{url} could not be fetched ({error}); {kept}") from error
            time.sleep(PAUSES[failures - 1])
    if _md5(part) != md5:
        part.unlink()
        raise OSError(f"{url} came with the wrong MD5; nothing of it is kept, fetch it again")
    os.replace(part, path)


def _continue(url: str, part: Path, size: int) -> None:
    """Adds to `part` what it lacks."""
    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=PATIENCE) as response:
        length = response.headers["Content-Length"]
        # Before anything that is kept is touched: a page to sign in, say, has another length.
        if length != str(size - start):
            raise OSError(f"{url} sends {length} bytes and not {size - start}: another file?")
        with open(part, "ab") as file, _bar(f"fetching {part.stem}", size, start) as bar:
            for chunk in iter(partial(response.read1, CHUNK), b""):
                file.write(chunk)
                bar.update(len(chunk))
    if _size(part) < size:
        raise ConnectionError("the connection was cut")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, _bar(f"checking {path.name}", _size(path)) as bar:
        for chunk in iter(partial(file.read, CHUNK), b""):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(text: str, total: int, done: int = 0) -> tqdm:
    looks = {"unit": "B", "unit_scale": True, "mininterval": 0.5, "leave": False}
    return tqdm(desc=text, total=total, initial=done, file=sys.stdout, **looks)
