"""How much faster than networkx is our exact attention flow? `python -m benchmarks.attention_flow`

The baseline is what the paper's code does (github.com/samiraabnar/attention_flow): a DiGraph made from one adjacency
matrix over all layers, and `nx.maximum_flow_value(G, u, v, flow_func=nx.algorithms.flow.edmonds_karp)` for each input
token v. Against it stands `helpers.attention.attention_flow`, for all input tokens. Same random attention, same source (the first
token), one core. Every measurement is a process of its own: peak memory is above what it held after a small warm-up.
networkx is timed on a few targets, its graph ready made, and given up after LIMIT seconds; ours builds its own.
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
    (145, 6): 1,  # tiny-vit
    (197, 3): 1,
    (197, 6): 0,
    (197, 12): 1,  # ViT-B/16
}
HEADS, SPREAD = (
    4,
    2.0,
)  # of the logits, whose standard deviation in tiny-vit is 1.1 to 2.0, by layer
LIMIT = 600  # seconds for networkx at one size
RATIO, SECONDS = (
    {(50, 6): 100},
    {(145, 6): 1.0, (197, 12): 10.0},
)  # a target's time and all targets' time: the bars


def random_attention(tokens: int, layers: int) -> torch.Tensor:
    """The softmax of normal logits, [L, 1, H, N, N], float64."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(layers, 1, HEADS, tokens, tokens, generator=generator, dtype=torch.float64)
    return (SPREAD * logits).softmax(dim=-1)


def targets(tokens: int, count: int) -> list[int]:
    return np.linspace(0, tokens - 1, count + 2).astype(int)[1:-1].tolist()


def ours(attentions: torch.Tensor, count: int, again: int = 3) -> dict:
    """Median seconds of the flow to all input tokens."""
    source = one_token(0, 1, attentions.shape[-1])
    seconds = []
    for _ in range(again):
        start = time.perf_counter()
        values = attention_flow(attentions, source)[0]
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": float(np.median(seconds)),
        "values": values[targets(len(values), count)].tolist(),
    }


def networkx(attentions: torch.Tensor, count: int) -> dict:
    """Median seconds of the flow to one input token, in the paper's graph: node l·N + i is token i above layer l."""
    matrices = fuse_heads(attentions)[:, 0].numpy()  # [L, N, N]
    layers, n, _ = matrices.shape
    adjacency = np.zeros(((layers + 1) * n, (layers + 1) * n))
    for k, matrix in enumerate(matrices):
        adjacency[(k + 1) * n : (k + 2) * n, k * n : (k + 1) * n] = matrix
    graph = nx.from_numpy_array(adjacency, create_using=nx.DiGraph, edge_attr="capacity")
    seconds, values = [], []
    for v in targets(n, count):
        start = time.perf_counter()
        values.append(
            nx.maximum_flow_value(graph, layers * n, v, flow_func=nx.algorithms.flow.edmonds_karp)
        )
        seconds.append(time.perf_counter() - start)
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
    found = WAYS[way](attentions, count)
    return {**found, "peak_bytes": memory("VmHWM") - before}


def in_a_process(way: str, tokens: int, layers: int, count: int) -> dict | None:
    """`measure` in a fresh process; None where it takes longer than LIMIT."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.attention_flow",
        way,
        str(tokens),
        str(layers),
        str(count),
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout)


def compare(tokens: int, layers: int, count: int) -> dict:
    """One size: seconds of all targets and of one, peak bytes, and how many times as long networkx takes for one."""
    found = in_a_process("ours", tokens, layers, count)
    row = {
        "seconds": found["seconds"],
        "seconds_a_target": found["seconds"] / tokens,
        "peak_bytes": found["peak_bytes"],
    }
    if not count:
        return row
    if (other := in_a_process("networkx", tokens, layers, count)) is None:
        return {**row, "networkx": None}
    edges = layers * tokens**2  # each may lose less than one unit to rounding
    apart = np.subtract(other["values"], found["values"])
    if apart.min() < -1e-9 or apart.max() > edges / RESOLUTION:
        raise AssertionError(
            f"{tokens} tokens, {layers} layers: {found['values']} here, {other['values']} in networkx"
        )
    other = {key: other[key] for key in ("seconds_a_target", "peak_bytes")} | {"targets": count}
    return {**row, "networkx": other, "ratio": other["seconds_a_target"] / row["seconds_a_target"]}


def line(tokens: int, layers: int, row: dict) -> str:
    told = f"{tokens:6}{layers:7}{row['seconds']:9.3f} s{1e3 * row['seconds_a_target']:8.2f} ms"
    told += f"{row['peak_bytes'] / 2**20:6.0f} MB"
    if "networkx" not in row:
        return told
    if (other := row["networkx"]) is None:
        return f"{told}   not within {LIMIT} s"
    return f"{told}{other['seconds_a_target']:10.2f} s{other['peak_bytes'] / 2**20:6.0f} MB{row['ratio']:10,.0f}"


def main() -> int:
    began, results, short = time.perf_counter(), {}, []
    print(
        f"{'tokens':>6}{'layers':>7}{'ours: all, one, peak':>31}{'networkx: one, peak':>21}{'ratio':>10}"
    )
    for (tokens, layers), count in SIZES.items():
        row = results[f"{tokens}x{layers}"] = compare(tokens, layers, count)
        print(line(tokens, layers, row), flush=True)
        if (tokens, layers) in RATIO and row.get("ratio", 0) < RATIO[tokens, layers]:
            short.append(
                f"{tokens} x {layers}: less than {RATIO[tokens, layers]} times as fast as networkx"
            )
        if (tokens, layers) in SECONDS and row["seconds"] > SECONDS[tokens, layers]:
            short.append(f"{tokens} x {layers}: more than {SECONDS[tokens, layers]:g} s")
    bars = {"ratio": {f"{n}x{k}": bar for (n, k), bar in RATIO.items()}}
    bars |= {"seconds": {f"{n}x{k}": bar for (n, k), bar in SECONDS.items()}}
    about = {
        "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
        "threads": 1,
        "bars": bars,
    }
    about |= {
        "baseline": f"networkx {nx.__version__}, edmonds_karp, one target",
        "heads": HEADS,
        "spread": SPREAD,
    }
    atomic_write(RESULT, json.dumps({**about, "results": results}, indent=2) + "\n")
    print("; ".join(short) or "all bars are met")
    return bool(short)


if __name__ == "__main__":
    if len(sys.argv) == 5:
        print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        sys.exit(main())
