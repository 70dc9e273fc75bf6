"""Python in a process of its own, for tests that kill it or run two at once."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from helpers.config import ROOT


def start(*command):
    """`python command…` in the repository's folder, its output on pipes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(*command, status=0):
    """What `python command…` prints until it and its workers, who share its pipes, have ended."""
    process = start(*command)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == status, errors
    return output


def two_at_once(lock, waiting, *command, meanwhile=lambda: True):
    """What two processes print that both have to wait for a lock, and say so, before they go on.

    meanwhile: what must hold while both wait.
    """
    with FileLock(lock):
        pair = [start(*command) for _ in range(2)]
        assert all(waiting in process.stdout.readline() for process in pair)
        assert meanwhile()
    outputs = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    return [output for output, _ in outputs]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(number, function):
    """`function`, but the process dies in the call of this number, and leaves half a file."""
    calls = itertools.count(1)

    def call(*args, **options):
        if next(calls) == number:
            if isinstance(args[-1], Path):
                args[-1].write_bytes(b"half a file")
            die()
        return function(*args, **options)

    return call


def killed(function, *args):
    """Calls a function of a test file in a process of its own, which has to die of it."""
    process = multiprocessing.get_context("forkserver").Process(target=function, args=args)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
