"""COCO 2017 from its site to disk, unpacked whole or not at all.

    <root>/val2017.zip.part → val2017.zip → .unpacking/val2017/ → val2017/

A folder has its name only when everything is in it, so a run may be stopped anywhere and started again.
"""

from __future__ import annotations

import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from helpers.transfer import CHUNK, PAUSES, DownloadError, bytes_of, fetch, part_of, stage

if TYPE_CHECKING:  # PyTorch comes with it, and is not needed here
    from helpers.profiles import Profile

SITE = "http://images.cocodataset.org/"
FETCH = "`python -m helpers.coco --profile coco-val` fetches COCO 2017"
WHERE = f"Notebook 01 renders MiniCOCO; {FETCH}; CLIP_COCO_DIR names a copy you already have."
HELP = "CLIP_COCO_URL names a mirror, CLIP_COCO_DIR a copy that you have or another place for it."


class Archive(NamedTuple):
    """A zip as its publisher describes it."""

    path: str  # below the site's address
    size: int  # bytes
    md5: str
    unpacked: int  # bytes that its content takes on disk, rounded up


COCO_2017 = {
    "annotations": Archive(
        "annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c", 600_000_000
    ),
    "val2017": Archive("zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 850_000_000),
    "train2017": Archive("zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 19_900_000_000),
}


def download(profile: Profile, delete_zips: bool = False, archives=COCO_2017, pauses=PAUSES) -> None:
    """Brings what `profile` needs of COCO 2017 into `profile.data`, unless it is there or its pictures are rendered.

    A copy of your own counts: annotations/{captions,instances}_*.json and as many pictures as the captions are for.
    `delete_zips` deletes what has been unpacked. `pauses`: see `transfer.fetch`. Raises DownloadError, a sentence.
    """
    root, folders = Path(profile.data), sorted({profile.train_folder, profile.val_folder})
    if profile.rendered:
        return
    parts = {"annotations": [f"annotations/{kind}_{f}.json" for f in folders for kind in ("captions", "instances")]}
    parts |= {folder: [folder] for folder in folders}
    try:
        if _missing(root, parts):
            root.mkdir(parents=True, exist_ok=True)
            with _one_process(root):
                if missing := _missing(root, parts):  # another process may have brought it in the meantime
                    _bring(root, missing, archives, delete_zips, pauses)
        for folder in folders:
            _require_pictures(root, folder)
    except DownloadError as error:
        raise DownloadError(f"{error} {HELP}") from None
    except OSError as error:  # no room left, no right to write …
        raise DownloadError(f"COCO 2017 could not be laid out in {root}: {error}. {HELP}") from error


def _missing(root: Path, parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is not there of the files and folders in each archive; an empty folder is not there."""

    def there(path):
        return path.is_file() or (path.is_dir() and any(path.iterdir()))

    found = {name: [part for part in wanted if not there(root / part)] for name, wanted in parts.items()}
    return {name: wanted for name, wanted in found.items() if wanted}


def _require_pictures(root: Path, folder: str) -> None:
    """Raises if there are fewer pictures than have captions. Cheap: counts, and parses nothing."""
    file = root / "annotations" / f"captions_{folder}.json"
    listed = file.read_bytes().count(b'"file_name"')
    found = sum(entry.name.endswith(".jpg") for entry in os.scandir(root / folder))
    if found < listed:
        fix = "Move that folder away and start again: it is fetched whole."
        raise DownloadError(f"{root / folder} holds {found:,} of the {listed:,} pictures in {file.name}. {fix}")


def _one_process(root: Path):
    """A context that one process at a time is in, freed also when that process is killed."""
    lock = FileLock(root / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is fetching COCO 2017 into {root}: waiting for it.")
        return lock.acquire()


def _bring(root: Path, missing: dict[str, list[str]], archives, delete_zips: bool, pauses) -> None:
    """Fetches and unpacks what is missing, one archive after the other, under one progress bar."""
    site = os.environ.get("CLIP_COCO_URL") or SITE
    if "://" not in site:
        raise DownloadError(f"CLIP_COCO_URL is {site!r}, which is no address. Give one like {SITE}, or none.")
    staging = root / ".unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    _require_space(root, [archives[name] for name in missing], delete_zips)
    with tqdm(unit="B", unit_scale=True, file=sys.stdout, mininterval=0.5, leave=False) as bar:
        for name, parts in missing.items():
            archive = archives[name]
            path = _zip(root, archive)
            fetch(site.rstrip("/") + "/" + archive.path, path, archive.size, archive.md5, bar, pauses)
            try:
                _unpack(path, staging, parts, bar)
                for part in parts:
                    (root / part).parent.mkdir(exist_ok=True)
                    os.replace(staging / part, root / part)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            if delete_zips:
                path.unlink()
    print(f"COCO 2017 is in {root}: {', '.join(missing)}, checked and unpacked.")


def _zip(root: Path, archive: Archive) -> Path:
    return root / Path(archive.path).name


def _require_space(root: Path, archives: list[Archive], delete_zips: bool) -> None:
    """Raises if the disk cannot hold what is yet to come of the archives and, beside them, their content."""
    to_come = []
    for archive in archives:
        path = _zip(root, archive)
        to_come.append(max(0, archive.size - max(bytes_of(path), bytes_of(part_of(path)))))
    need = (max(to_come) if delete_zips else sum(to_come)) + sum(archive.unpacked for archive in archives)
    if need > (free := shutil.disk_usage(root).free):
        fix = "Make room" + ("." if delete_zips else ", or take --delete-zips, which needs less.")
        raise DownloadError(f"COCO 2017 takes {need / 1e9:.1f} GB more in {root}; {free / 1e9:.1f} GB are free. {fix}")


def _unpack(path: Path, staging: Path, parts: list[str], bar: tqdm) -> None:
    """The files and folders `parts` out of a zip, into the folder `staging`."""
    inside = tuple(part + "/" for part in parts)
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if f"{m.filename}/".startswith(inside) and not m.is_dir()]
        stage(bar, f"unpacking {path.name}", sum(member.file_size for member in members))
        for member in members:
            if ".." in member.filename.split("/"):
                raise DownloadError(f"{path} would write to {member.filename!r}: it is not COCO's own. Delete it.")
            target = staging / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            bar.update(member.file_size)
