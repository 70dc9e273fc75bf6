"""What chunks and gradient caching save in memory, and cost in time.

    python -m benchmarks.loss_memory

Two baselines, each a value and its gradients by plain autograd: `siglip_loss` on embeddings, and a
whole training step through two deep heads. Against them stand `chunked_siglip_loss` and
`cached_backward`, with the plain loss and with the chunked one. Every measurement is a process of
its own: peak memory above what it held after a small warm-up.
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
MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD: larger blocks are the system's, not the heap's
SQUARES = 7  # [B, B] matrices of float32 that the plain loss may hold at once, generously
CUDA = torch.cuda.is_available()


def deep_head():
    """Enough activations a row to be worth saving."""
    layers = [[nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.1)] for _ in range(LAYERS)]
    return nn.Sequential(*(module for layer in layers for module in layer))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.image_head, self.text_head = deep_head(), deep_head()
        self.logit_scale = nn.Parameter(torch.tensor(2.3))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, batch):
        images = F.normalize(self.image_head(batch["image_features"]), dim=-1)
        texts = F.normalize(self.text_head(batch["text_features"]), dim=-1)
        ends = {"logit_scale": self.logit_scale, "logit_bias": self.logit_bias}
        return {"image_embeds": images, "text_embeds": texts, **ends}


def prepare(case, way, n):
    """A function without arguments that does what is to be measured, on n pairs."""
    torch.manual_seed(0)
    device = pick_device()
    images, texts = torch.randn(2, n, WIDTH, device=device)
    loss = partial(chunked_siglip_loss, chunk=CHUNK) if "chunked" in way else siglip_loss
    if case == "loss":
        inputs = [F.normalize(rows, dim=-1).requires_grad_() for rows in (images, texts)]
        ends = [torch.tensor(value, device=device, requires_grad=True) for value in (2.3, -10.0)]
        return lambda: loss(*inputs, *ends).backward()
    model, batch = Heads().to(device), {"image_features": images, "text_features": texts}
    if "cached" in way:
        return lambda: cached_backward(model, batch, loss, CHUNK)
    return lambda: loss(**model(batch)).backward()


def memory(name):
    """VmRSS (now) or VmHWM (peak since `forget_peak`) of this process in bytes, or the GPU's."""
    if CUDA:
        now = name == "VmRSS"
        return torch.cuda.memory_allocated() if now else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def forget_peak():
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here


def allocate_above(size):
    """From now on, larger blocks go back to the system as soon as they are freed (glibc)."""
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(MMAP_THRESHOLD, size)


def timed(run):
    """Seconds that a call takes, a GPU's work included."""
    start = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case, way, n):
    """Peak bytes of a first run, then the median seconds of three more."""
    prepare(case, way, 2 * CHUNK)()  # threads and kernels are there
    run = prepare(case, way, n)
    allocate_above(2**20)  # the peak is what was needed
    before = memory("VmRSS")
    forget_peak()
    first = timed(run)
    peak = memory("VmHWM") - before
    allocate_above(2**25)  # freed blocks stay at hand, as glibc keeps them, while the clock runs
    # Squares of a gigabyte are the system's own either way, and take long.
    again = 3 if n < BATCHES[-1] else int("chunked" in way)
    seconds = [timed(run) for _ in range(again)] or [first]
    return {"peak_bytes": peak, "seconds": float(np.median(seconds))}


def in_a_process(case, way, n):
    """`measure` in a fresh process; None, and a line that says why, without enough memory."""
    free = torch.cuda.mem_get_info()[0] if CUDA else psutil.virtual_memory().available
    need = 0 if "chunked" in way else SQUARES * 4 * n * n
    if need > free:
        sizes = f"may need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        print(f"{case}, {way}, batch {n:,}: skipped, {sizes}")
        return None
    command = [sys.executable, "-m", "benchmarks.loss_memory", case, way, str(n)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main():
    began, results = time.perf_counter(), {}
    print(f"{'':8}{'batch':>8}  {'':16}{'peak':>10}{'seconds':>9}   of plain: memory    time")
    for case, n, way in ((c, n, w) for c, ways in CASES.items() for n in BATCHES for w in ways):
        rows = results.setdefault(f"{case}/{n}", {})
        row = in_a_process(case, way, n)
        if row is None:
            continue
        line = f"{case:8}{n:8,}  {way:16}{row['peak_bytes'] / 2**20:7,.0f} MB"
        line += f"{row['seconds']:8.2f} s"
        if "plain" in rows:
            row["memory_ratio"] = row["peak_bytes"] / rows["plain"]["peak_bytes"]
            row["time_ratio"] = row["seconds"] / rows["plain"]["seconds"]
            line += f"{row['memory_ratio']:18.3f}{row['time_ratio']:8.2f}"
        rows[way] = row
        print(line, flush=True)
    head = {"machine": machine(), "seconds": round(time.perf_counter() - began, 1)}
    head |= {"baseline": "plain", "width": WIDTH, "layers": LAYERS, "chunk": CHUNK}
    atomic_write(RESULT, json.dumps({**head, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    else:
        main()
