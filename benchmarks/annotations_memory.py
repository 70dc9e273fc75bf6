"""What do the captions of COCO's train2017 cost, and do workers share them? `python -m benchmarks.annotations_memory`

The baseline is `torchvision.datasets.CocoCaptions`, which keeps pycocotools' COCO object; against it stands
`CaptionedImages`, on the same file of full size: 118,287 images, 591,753 captions. Each loads it in a process of its
own. Then worker processes, forked and spawned, read every caption, and tell how much memory is theirs alone beyond that
of a worker without data. Linux only.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import psutil
from torchvision.datasets import CocoCaptions

from helpers.config import ROOT, machine
from helpers.data import CaptionedImages
from helpers.storage.files import atomic_write
from tests.big_coco import CAPTIONS, IMAGES, write_big_captions

RESULT = ROOT / "data" / "results" / "bench_annotations_memory.json"
FOLDER = "train2017"
WORKERS = 2
MB = 10**6
UNITS = {
    "seconds": 1,
    "peak": MB,
    "held": MB,
    "sent to spawned": MB,
    "private, forked": MB,
    "private, spawned": MB,
}
MOST = {
    "seconds": 10,
    "peak": 1500 * MB,
    "held": 300 * MB,
    "private, forked": 20 * MB,
    "private, spawned": 20 * MB,
}


def load(way: str, root: Path):
    """The data set, without its pictures."""
    if way == "ours":
        return CaptionedImages(root, FOLDER)
    with contextlib.redirect_stdout(io.StringIO()):  # it chatters
        return CocoCaptions(root / FOLDER, root / "annotations" / f"captions_{FOLDER}.json")


def captions(way: str, images, i: int) -> list[str]:
    """The captions of image i; for torchvision what its [] does beside opening the picture."""
    return images.captions(i) if way == "ours" else images._load_target(images.ids[i])


def status(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def work(way: str, images, answers, together) -> None:
    """A worker: reads every caption, waits until all have, and tells how much memory is mapped by itself alone."""
    found = sum(len(captions(way, images, i)) for i in range(len(images or ())))
    together.wait()
    answers.put((found, psutil.Process().memory_full_info().uss))
    together.wait()


def private(way: str, method: str, images) -> int:
    """Bytes that each of several workers has for itself, on average."""
    context = multiprocessing.get_context(method)
    answers, together = context.Queue(), context.Barrier(WORKERS)
    workers = [
        context.Process(target=work, args=(way, images, answers, together)) for _ in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    told = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert {found for found, _ in told} == {CAPTIONS if images is not None else 0}
    return sum(size for _, size in told) // WORKERS


def measure(way: str, root: Path) -> dict:
    """Bytes and seconds of one way to hold the captions, in this process and its workers."""
    before = status("VmRSS")
    start = time.perf_counter()
    images = load(way, root)
    row = {"seconds": time.perf_counter() - start, "peak": status("VmHWM")}
    gc.collect()
    row["held"] = status("VmRSS") - before
    row["sent to spawned"] = len(ForkingPickler.dumps(images))
    for method in ("fork", "spawn"):
        row[f"private, {method}ed"] = private(way, method, images) - private(way, method, None)
    return row


def main() -> int:
    start, rows = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "annotations", f"captions_{FOLDER}.json")
        write_big_captions(file)
        about = {"images": IMAGES, "captions": CAPTIONS, "file_bytes": file.stat().st_size}
        for way in ("ours", "torchvision"):
            command = [sys.executable, "-m", "benchmarks.annotations_memory", way, folder]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            rows[way] = json.loads(done.stdout)
    ratios = {name: rows["ours"][name] / rows["torchvision"][name] for name in UNITS}
    print(f"{'':18}{'ours':>12}{'torchvision':>14}{'ratio':>8}{'at most':>12}")
    for name, unit in UNITS.items():
        ours, theirs = (
            f"{rows[way][name] / unit:,.1f} {'MB' if unit == MB else ' s'}" for way in rows
        )
        most = f"{MOST[name] / unit:,.0f} {'MB' if unit == MB else ' s'}" if name in MOST else ""
        print(f"{name:18}{ours:>12}{theirs:>14}{ratios[name]:8.3f}{most:>12}")
    record = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 1),
        "baseline": "torchvision",
    }
    content = {
        **record,
        **about,
        "workers": WORKERS,
        "at_most": MOST,
        "results": rows,
        "ratios": ratios,
    }
    atomic_write(RESULT, json.dumps(content, indent=2) + "\n")
    over = [name for name, most in MOST.items() if rows["ours"][name] > most]
    print(f"over: {', '.join(over)}" if over else "all within what is allowed")
    return bool(over)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
    else:
        sys.exit(main())
