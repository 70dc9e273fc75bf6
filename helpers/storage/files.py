"""Files and folders that are there in full or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError


@contextmanager
def replace_when_complete(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under; once all is written, it is `path`.

    An error leaves what was there before and nothing else; a killed process leaves a hidden
    `.<name>.<process>.tmp`. Raises OSError, with the file and what helps, where there is no room
    or no permission.
    """
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}{end}.tmp") for end in ("", ".old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        # A folder cannot be replaced in one go.
        if path.is_dir():
            os.replace(path, old)
        os.replace(partial, path)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        fix = "Free some disk space, or make its folder writable, and run this again"
        raise OSError(
            f"{path} could not be written ({reason}). {fix}: what was finished before is kept."
        ) from error
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for rest in (partial, old):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Writes the file in full or not at all; makes its folder. Raises OSError as above."""
    with replace_when_complete(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def one_process(file: Path, task: str) -> AbstractContextManager:
    """A context that one process at a time is in; the others say which `task` they wait for.

    The lock is on `file`, and goes when its process ends.
    """
    lock = FileLock(file)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is {task}: waiting for it.")
        return lock.acquire()
