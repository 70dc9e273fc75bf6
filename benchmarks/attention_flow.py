"""How much faster than networkx is our exact attention flow? `python -m benchmarks.attention_flow`

The baseline is what the paper's code does (github.com/samiraabnar/attention_flow): a DiGraph made
from one adjacency matrix over all layers, and `nx.maximum_flow_value` by Edmonds and Karp for each
input token. Against it stands `helpers.attention.attention_flow`, for all input tokens. Same random
attention, same source (the first token), one core. Every measurement is a process of its own: peak
memory is above what it held after a small warm-up. networkx is timed on a few targets, its graph
ready made, and given up after LIMIT seconds; ours builds its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import networkx as nx
import numpy as np
import torch

from helpers.attention import attention_flow, fuse_heads, one_token
from helpers.config import ROOT, machine
from helpers.max_flow import RESOLUTION
from helpers.storage.files import atomic_write

RESULT = ROOT / "data" / "results" / "bench_attention_flow.json"
TINY_VIT, VIT_B16 = (145, 6), (197, 12)
SIZES = {  # tokens, layers: targets that networkx is timed on
    (25, 3): 5,
    (25, 6): 5,
    (25, 12): 5,
    (50, 3): 5,
    (50, 6): 5,
    (50, 12): 3,
    (100, 3): 3,
    (100, 6): 1,
    (100, 12): 1,
    TINY_VIT: 1,
    (197, 3): 1,
    (197, 6): 0,
    VIT_B16: 1,
}
# The spread of the logits; its standard deviation in tiny-vit is 1.1 to 2.0, by layer.
HEADS, SPREAD = 4, 2.0
LIMIT = 600  # seconds for networkx at one size
# The bars: of one target's time against networkx, and of the seconds for all targets.
RATIO, SECONDS = {(50, 6): 100}, {TINY_VIT: 1.0, VIT_B16: 10.0}


def random_attention(tokens: int, layers: int) -> torch.Tensor:
    """The softmax of normal logits, [L, 1, H, N, N], float64."""
    generator, shape = torch.Generator().manual_seed(0), (layers, 1, HEADS, tokens, tokens)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (SPREAD * logits).softmax(dim=-1)


def targets(tokens: int, count: int) -> list[int]:
    return np.linspace(0, tokens - 1, count + 2).astype(int)[1:-1].tolist()


def timed(function, *args) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def ours(attentions: torch.Tensor, count: int) -> dict:
    """Median seconds of the flow to all input tokens."""
    source = one_token(0, 1, attentions.shape[-1])
    seconds, (values, *_) = zip(*(timed(attention_flow, attentions, source) for _ in range(3)))
    chosen = targets(attentions.shape[-1], count)
    return {"seconds": float(np.median(seconds)), "values": values[0][chosen].tolist()}


def networkx(attentions: torch.Tensor, count: int) -> dict:
    """Median seconds of the flow to one input token; node l·N + i is token i above layer l."""
    matrices = fuse_heads(attentions)[:, 0].numpy()  # [L, N, N]
    layers, n, _ = matrices.shape
    adjacency = np.zeros(((layers + 1) * n, (layers + 1) * n))
    for k, matrix in enumerate(matrices):
        adjacency[(k + 1) * n : (k + 2) * n, k * n : (k + 1) * n] = matrix
    graph = nx.from_numpy_array(adjacency, create_using=nx.DiGraph, edge_attr="capacity")
    karp = nx.algorithms.flow.edmonds_karp

    def flow_to(v):
        return nx.maximum_flow_value(graph, layers * n, v, flow_func=karp)

    seconds, values = zip(*(timed(flow_to, v) for v in targets(n, count)))
    return {"seconds_a_target": float(np.median(seconds)), "values": values}


WAYS = {"ours": ours, "networkx": networkx}


def memory(name: str) -> int:
    """VmRSS (now) or VmHWM (peak since it was reset) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def measure(way: str, tokens: int, layers: int, count: int) -> dict:
    torch.set_num_threads(1)
    WAYS[way](random_attention(8, 3), 1)
    attentions = random_attention(tokens, layers)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    result = WAYS[way](attentions, count)
    return {**result, "peak_bytes": memory("VmHWM") - before}


def in_a_process(*args) -> dict | None:
    """`measure` in a fresh process; None where it takes longer than LIMIT."""
    command = [sys.executable, "-m", "benchmarks.attention_flow", *map(str, args)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "check": True}
    try:
        return json.loads(subprocess.run(command, timeout=LIMIT, **options).stdout)
    except subprocess.TimeoutExpired:
        return None


def compare(tokens: int, layers: int, count: int) -> dict:
    """One size: seconds of all targets and of one, peak bytes, and networkx beside them."""
    row = in_a_process("ours", tokens, layers, count)
    values = row.pop("values")
    row["seconds_a_target"] = row["seconds"] / tokens
    if not count:
        return row
    other = in_a_process("networkx", tokens, layers, count)
    if other is None:
        return {**row, "networkx": None}
    theirs = other.pop("values")
    apart = np.subtract(theirs, values)
    # Each edge may lose less than one unit to rounding.
    if apart.min() < -1e-9 or apart.max() > layers * tokens**2 / RESOLUTION:
        raise AssertionError(f"{tokens} tokens, {layers} layers: {values}, networkx {theirs}")
    ratio = other["seconds_a_target"] / row["seconds_a_target"]
    return {**row, "networkx": {**other, "targets": count}, "ratio": ratio}


def line(tokens: int, layers: int, row: dict) -> str:
    text = f"{tokens:6}{layers:7}{row['seconds']:9.3f} s{1e3 * row['seconds_a_target']:8.2f} ms"
    text += f"{row['peak_bytes'] / 2**20:6.0f} MB"
    if "ratio" in row:
        other = row["networkx"]
        text += f"{other['seconds_a_target']:10.2f} s{other['peak_bytes'] / 2**20:6.0f} MB"
        return f"{text}{row['ratio']:10,.0f}"
    return f"{text}   not within {LIMIT} s" if "networkx" in row else text


def main() -> int:
    began, results, short = time.perf_counter(), {}, []
    print("tokens layers           ours: all, one, peak   networkx: one, peak     ratio")
    for size, count in SIZES.items():
        row = compare(*size, count)
        name = "x".join(map(str, size))
        results[name] = row
        print(line(*size, row), flush=True)
        if row.get("ratio", 0) < RATIO.get(size, 0):
            short.append(f"{name}: less than {RATIO[size]} times as fast as networkx")
        if row["seconds"] > SECONDS.get(size, np.inf):
            short.append(f"{name}: more than {SECONDS[size]:g} s")
    bars = {"ratio": RATIO, "seconds": SECONDS}
    about = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": 1,
        "bars": {
            k: {f"{n}x{depth}": bar for (n, depth), bar in row.items()} for k, row in bars.items()
        },
        "baseline": f"networkx {nx.__version__}, edmonds_karp, one target",
        "heads": HEADS,
        "spread": SPREAD,
        "results": results,
    }
    atomic_write(RESULT, json.dumps(about, indent=2) + "\n")
    print("; ".join(short) or "all bars are met")
    return bool(short)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        sys.exit(main())
