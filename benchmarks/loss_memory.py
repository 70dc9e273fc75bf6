"""What chunks and gradient caching save in memory, and what they cost in time. `python -m benchmarks.loss_memory`

Two baselines, each a value and its gradients by plain autograd: `siglip_loss` on embeddings, and a whole training step
through two deep heads. Against them stand `chunked_siglip_loss` and `cached_backward`, with the plain loss and with the
chunked one. Every measurement is a process of its own: peak memory above what it held after a small warm-up.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import nn

from helpers.config import ROOT, machine, pick_device
from helpers.distributed import cached_backward, chunked_siglip_loss
from helpers.losses import siglip_loss
from helpers.storage.files import atomic_write

RESULT = ROOT / "data" / "results" / "bench_loss_memory.json"
BATCHES, WIDTH, LAYERS, CHUNK = (1024, 4096, 16384), 256, 12, 256
CASES = {"loss": ("plain", "chunked"), "step": ("plain", "cached", "cached, chunked")}
MMAP_THRESHOLD = (
    -3
)  # glibc's M_MMAP_THRESHOLD: larger blocks than this are the system's own, not the heap's
SQUARES = 7  # [B, B] matrices of float32 that the plain loss may hold at once, generously


class Heads(nn.Module):
    """Two deep heads: enough activations a row to be worth saving."""

    def __init__(self):
        super().__init__()
        self.image_head, self.text_head = (
            nn.Sequential(
                *(
                    nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1))
                    for _ in range(LAYERS)
                )
            )
            for _ in range(2)
        )
        self.logit_scale, self.logit_bias = (
            nn.Parameter(torch.tensor(2.3)),
            nn.Parameter(torch.tensor(-10.0)),
        )

    def forward(self, batch):
        images = F.normalize(self.image_head(batch["image_features"]), dim=-1)
        texts = F.normalize(self.text_head(batch["text_features"]), dim=-1)
        return {
            "image_embeds": images,
            "text_embeds": texts,
            "logit_scale": self.logit_scale,
            "logit_bias": self.logit_bias,
        }


def prepare(case: str, way: str, n: int):
    """A function without arguments that does what is to be measured, on n pairs."""
    torch.manual_seed(0)
    device = pick_device()
    features = dict(
        zip(("image_features", "text_features"), torch.randn(2, n, WIDTH, device=device))
    )
    loss = partial(chunked_siglip_loss, chunk=CHUNK) if "chunked" in way else siglip_loss
    if case == "loss":
        inputs = [F.normalize(rows, dim=-1).requires_grad_() for rows in features.values()]
        ends = [torch.tensor(value, device=device, requires_grad=True) for value in (2.3, -10.0)]
        return lambda: loss(*inputs, *ends).backward()
    model = Heads().to(device)
    if "cached" in way:
        return lambda: cached_backward(model, features, loss, CHUNK)
    return lambda: loss(**model(features)).backward()


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak since `forget_peak`) of this process in bytes, or the GPU's."""
    if torch.cuda.is_available():
        return (
            torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()
        )
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def mallopt(option: int, value: int) -> None:
    """glibc's mallopt, where there is one."""
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(option, value)


def forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here


def timed(run) -> float:
    """Seconds that a call takes, a GPU's work included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: str, way: str, n: int) -> dict:
    """Peak bytes of a first run, then the median seconds of three more (of one for the largest batch)."""
    prepare(case, way, 2 * CHUNK)()  # threads and kernels are there
    run = prepare(case, way, n)
    mallopt(
        MMAP_THRESHOLD, 2**20
    )  # freed memory goes back at once, so that the peak is what was needed
    before = memory("VmRSS")
    forget_peak()
    first = timed(run)
    peak = memory("VmHWM") - before
    mallopt(MMAP_THRESHOLD, 2**25)  # and stays at hand, as glibc keeps it, while the clock runs
    again = (
        3 if n < BATCHES[-1] else int("chunked" in way)
    )  # squares of a gigabyte are the system's own either way
    seconds = [timed(run) for _ in range(again)] or [first]
    return {"peak_bytes": peak, "seconds": float(np.median(seconds))}


def in_a_process(case: str, way: str, n: int) -> dict | None:
    """`measure` in a fresh process; None, and a line that says why, where memory does not suffice."""
    free = (
        torch.cuda.mem_get_info()[0]
        if torch.cuda.is_available()
        else psutil.virtual_memory().available
    )
    if "chunked" not in way and (need := SQUARES * 4 * n * n) > free:
        print(
            f"{case}, {way}, batch {n:,}: skipped, may need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        )
        return None
    command = [sys.executable, "-m", "benchmarks.loss_memory", case, way, str(n)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    began, results = time.perf_counter(), {}
    print(f"{'':8}{'batch':>8}  {'':16}{'peak':>10}{'seconds':>9}   of plain: memory    time")
    for case, ways in CASES.items():
        for n in BATCHES:
            row = results[f"{case}/{n}"] = {}
            for way in ways:
                if (found := in_a_process(case, way, n)) is None:
                    continue
                plain = row.get("plain") if way != "plain" else None
                for unit, ratio in (("peak_bytes", "memory_ratio"), ("seconds", "time_ratio")):
                    found |= {ratio: found[unit] / plain[unit]} if plain else {}
                row[way] = found
                ratios = f"{found['memory_ratio']:18.3f}{found['time_ratio']:8.2f}" if plain else ""
                peak, seconds = found["peak_bytes"] / 2**20, found["seconds"]
                print(
                    f"{case:8}{n:8,}  {way:16}{peak:7,.0f} MB{seconds:8.2f} s{ratios}", flush=True
                )
    about = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
        "baseline": "plain",
    }
    about |= {"width": WIDTH, "layers": LAYERS, "chunk": CHUNK}
    atomic_write(RESULT, json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
