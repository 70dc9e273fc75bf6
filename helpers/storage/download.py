"""COCO 2017 from its site to disk, unpacked whole or not at all.

    <root>/val2017.zip.part → val2017.zip → .unpacking/val2017/ → val2017/

A folder has its name only when everything is in it, so a run may be stopped anywhere and started again.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from tqdm import tqdm

from helpers.config import Profile

PAUSES = (1, 2, 4, 8, 16, 32)  # seconds before the next try, after each failure in a row
PATIENCE = 60  # seconds without a byte, then the connection counts as broken
LONGEST_PAUSE = 300  # seconds that a server may ask for
CHUNK = 1 << 18  # bytes


class DownloadError(OSError):
    """What went wrong and what to do about it, in a sentence."""


class _Broken(Exception):
    """A transfer that ended early and is worth another try, after `wait` seconds or more."""

    def __init__(self, reason, wait: int = 0):
        super().__init__(reason)
        self.wait = wait


def fetch(url: str, path: Path, size: int, md5: str, bar: tqdm, pauses=PAUSES) -> None:
    """The zip at `path`, of `size` bytes and checked. What has come of it is kept in <path>.part and completed.

    Raises DownloadError where the server has another file, and where nothing more comes for all of `pauses`.
    """
    part = part_of(path)
    if path.is_file():
        if _md5(path, size, bar) == md5:
            return
        os.replace(path, part)  # perhaps a beginning
    begun = bytes_of(part)
    _complete(url, part, size, bar, pauses)
    if (found := _md5(part, size, bar)) != md5:
        part.unlink()
        if (
            begun
        ):  # by an earlier run, perhaps of another or a longer file: once more, from the start
            return fetch(url, path, size, md5, bar, pauses)
        raise DownloadError(
            f"{url} came with the MD5 {found}, the true one has {md5}. Nothing of it is kept."
        )
    os.replace(part, path)


def part_of(path: Path) -> Path:
    """Where the beginning of a file is kept."""
    return path.with_name(path.name + ".part")


def bytes_of(path: Path) -> int:
    """The size of a file, 0 without one."""
    return path.stat().st_size if path.is_file() else 0


def stage(bar: tqdm, text: str, total: int, done: int = 0) -> None:
    """From here on the bar shows another piece of work: its bytes, rate and time left."""
    bar.reset(total)
    bar.initial = bar.n = bar.last_print_n = done
    bar.set_description(text)


def _md5(path: Path, size: int, bar: tqdm) -> str:
    """The file's MD5; "" at once for a file of another size."""
    if bytes_of(path) != size:
        return ""
    stage(bar, f"checking {path.name}", size)
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _complete(url: str, part: Path, size: int, bar: tqdm, pauses) -> None:
    """Asks for the rest of `part` until it has `size` bytes; gives up when nothing more comes for all of `pauses`."""
    failures, most, text = 0, bytes_of(part), f"fetching {part.stem}"
    stage(bar, text, size, most)
    while (offset := bytes_of(part)) < size:
        reason, wait = "the connection was cut", 0
        try:
            with open(part, "r+b" if part.exists() else "wb") as file:
                for start, chunk in _chunks(url, offset, size):
                    file.seek(start)
                    file.write(chunk)
                    file.flush()  # a killed run keeps what came
                    if start != bar.n:  # from the beginning again
                        stage(bar, text, size, start)
                    bar.update(len(chunk))
        except _Broken as error:
            reason, wait = error, error.wait
        if (now := bytes_of(part)) > most:
            failures, most = 0, now
        if now < size:
            if failures == len(pauses):
                kept = f"{now / size:.0%} of it are kept, and the next run goes on from there"
                raise DownloadError(f"{url} could not be fetched: {reason}. {kept}.")
            pause = max(pauses[failures], wait)
            failures += 1
            bar.set_postfix_str(f"{reason}: again in {pause} s")
            time.sleep(pause)
            bar.set_postfix_str("")


def _chunks(url: str, offset: int, size: int) -> Iterator[tuple[int, bytes]]:
    """(position, bytes) from `offset` on, as they come; from 0 on where the server ignores what was asked for.

    Raises _Broken for what may pass, DownloadError for what will not.
    """
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            position, total = _span(response)
            chunk = response.read1(CHUNK)
            if position == 0 and chunk and not chunk.startswith(b"PK"):
                fix = "Does this network want you to sign in first?"
                raise DownloadError(f"{url} sends no zip archive but {chunk[:24]!r}… {fix}")
            if position not in (0, offset):
                raise DownloadError(
                    f"{url} does not answer from byte {offset:,} on, as it was asked to."
                )
            if total not in (None, size):
                raise DownloadError(
                    f"{url} has {total:,} bytes and not {size:,}: it is another file."
                )
            while chunk:
                if position + len(chunk) > size:
                    raise DownloadError(f"{url} has more than {size:,} bytes: it is another file.")
                yield position, chunk
                position += len(chunk)
                chunk = response.read1(CHUNK)
    except DownloadError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        told = f"{error.code} {error.reason}"
        if error.code < 500 and error.code not in (408, 425, 429):
            raise DownloadError(f"{url} answers {told}.") from None
        asked = error.headers.get("Retry-After", "")  # seconds, or a date, which is not obeyed
        wait = int(asked) if re.fullmatch(r"\d{1,6}", asked) else 0
        raise _Broken(told, wait if wait <= LONGEST_PAUSE else 0) from None
    except (
        OSError,
        http.client.HTTPException,
    ) as error:  # no such host, no route, reset, timed out, cut in a header …
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _span(response) -> tuple[int, int | None]:
    """Where an answer begins in the file (-1: it does not say), and how long the file is (None: it does not say)."""
    if response.status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        return (int(told[1]), None if told[2] == "*" else int(told[2])) if told else (-1, None)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


SITE = "http://images.cocodataset.org/"
FETCH = "`python -m scripts.download_coco --profile coco-val` fetches COCO 2017"
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
        "annotations/annotations_trainval2017.zip",
        252_907_541,
        "f4bbac642086de4f52a3fdda2de5fa2c",
        600_000_000,
    ),
    "val2017": Archive(
        "zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 850_000_000
    ),
    "train2017": Archive(
        "zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 19_900_000_000
    ),
}


def download(
    profile: Profile, delete_zips: bool = False, archives=COCO_2017, pauses=PAUSES
) -> None:
    """Brings what `profile` needs of COCO 2017 into `profile.data`, unless it is there or its pictures are rendered.

    A copy of your own counts: annotations/{captions,instances}_*.json and as many pictures as the captions are for.
    `delete_zips` deletes what has been unpacked. `pauses`: see `transfer.fetch`. Raises DownloadError, a sentence.
    """
    root, folders = Path(profile.data), sorted({profile.train_folder, profile.val_folder})
    if profile.rendered:
        return
    parts = {
        "annotations": [
            f"annotations/{kind}_{f}.json" for f in folders for kind in ("captions", "instances")
        ]
    }
    parts |= {folder: [folder] for folder in folders}
    try:
        if _missing(root, parts):
            root.mkdir(parents=True, exist_ok=True)
            with _one_process(root):
                if missing := _missing(
                    root, parts
                ):  # another process may have brought it in the meantime
                    _bring(root, missing, archives, delete_zips, pauses)
        for folder in folders:
            _require_pictures(root, folder)
    except DownloadError as error:
        raise DownloadError(f"{error} {HELP}") from None
    except OSError as error:  # no room left, no right to write …
        raise DownloadError(
            f"COCO 2017 could not be laid out in {root}: {error}. {HELP}"
        ) from error


def _missing(root: Path, parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """What is not there of the files and folders in each archive; an empty folder is not there."""

    def there(path):
        return path.is_file() or (path.is_dir() and any(path.iterdir()))

    found = {
        name: [part for part in wanted if not there(root / part)] for name, wanted in parts.items()
    }
    return {name: wanted for name, wanted in found.items() if wanted}


def _require_pictures(root: Path, folder: str) -> None:
    """Raises if there are fewer pictures than have captions. Cheap: counts, and parses nothing."""
    file = root / "annotations" / f"captions_{folder}.json"
    listed = file.read_bytes().count(b'"file_name"')
    found = sum(entry.name.endswith(".jpg") for entry in os.scandir(root / folder))
    if found < listed:
        fix = "Move that folder away and start again: it is fetched whole."
        raise DownloadError(
            f"{root / folder} holds {found:,} of the {listed:,} pictures in {file.name}. {fix}"
        )


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
        raise DownloadError(
            f"CLIP_COCO_URL is {site!r}, which is no address. Give one like {SITE}, or none."
        )
    staging = root / ".unpacking"
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed
    _require_space(root, [archives[name] for name in missing], delete_zips)
    with tqdm(unit="B", unit_scale=True, file=sys.stdout, mininterval=0.5, leave=False) as bar:
        for name, parts in missing.items():
            archive = archives[name]
            path = _zip(root, archive)
            fetch(
                site.rstrip("/") + "/" + archive.path, path, archive.size, archive.md5, bar, pauses
            )
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
    need = (max(to_come) if delete_zips else sum(to_come)) + sum(
        archive.unpacked for archive in archives
    )
    if need > (free := shutil.disk_usage(root).free):
        fix = "Make room" + ("." if delete_zips else ", or take --delete-zips, which needs less.")
        raise DownloadError(
            f"COCO 2017 takes {need / 1e9:.1f} GB more in {root}; {free / 1e9:.1f} GB are free. {fix}"
        )


def _unpack(path: Path, staging: Path, parts: list[str], bar: tqdm) -> None:
    """The files and folders `parts` out of a zip, into the folder `staging`."""
    inside = tuple(part + "/" for part in parts)
    with zipfile.ZipFile(path) as archive:
        members = [
            m for m in archive.infolist() if f"{m.filename}/".startswith(inside) and not m.is_dir()
        ]
        stage(bar, f"unpacking {path.name}", sum(member.file_size for member in members))
        for member in members:
            if ".." in member.filename.split("/"):
                raise DownloadError(
                    f"{path} would write to {member.filename!r}: it is not COCO's own. Delete it."
                )
            target = staging / member.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            bar.update(member.file_size)
