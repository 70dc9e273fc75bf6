"""One large file over HTTP: resumed after any break, tried again with growing pauses, checked by size and MD5."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

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
        if begun:  # by an earlier run, perhaps of another or a longer file: once more, from the start
            return fetch(url, path, size, md5, bar, pauses)
        raise DownloadError(f"{url} came with the MD5 {found}, the true one has {md5}. Nothing of it is kept.")
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
                raise DownloadError(f"{url} does not answer from byte {offset:,} on, as it was asked to.")
            if total not in (None, size):
                raise DownloadError(f"{url} has {total:,} bytes and not {size:,}: it is another file.")
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
    except (OSError, http.client.HTTPException) as error:  # no such host, no route, reset, timed out, cut in a header …
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from None


def _span(response) -> tuple[int, int | None]:
    """Where an answer begins in the file (-1: it does not say), and how long the file is (None: it does not say)."""
    if response.status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        return (int(told[1]), None if told[2] == "*" else int(told[2])) if told else (-1, None)
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None
