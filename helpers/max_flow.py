"""Exact maximum flow through layers of attention, with scipy alone: a process that computes it starts in a moment."""

from __future__ import annotations

import numpy as np
from joblib import Parallel, delayed
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

RESOLUTION = (
    2**30
)  # capacities are whole multiples of 1 / 2³⁰, since scipy's max-flow counts in int32
MANY = 8  # examples for which it pays to start processes, one a core


def flows(examples: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """`max_flow_to_inputs` of each example; of many in several processes, since scipy keeps Python's lock."""
    jobs = -1 if len(examples) >= MANY else 1
    return Parallel(n_jobs=jobs, max_nbytes=None)(
        delayed(max_flow_to_inputs)(*example) for example in examples
    )


def max_flow_to_inputs(matrices: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Max-flow from source [N] through matrices [L, N, N] to every input token: [N].

    Node 0 is the target, 1 + l·N + i is token i above layer l (l = 0 … L-1), and the last node is the source: scipy
    tries edges in order of their ends, so those that lead on come before those that lead back. All targets share the
    graph: only the capacities of the N edges into the target change, and they come first.
    """
    layers, n, _ = matrices.shape
    token = np.arange(n)
    ends = [
        np.zeros(n, int),
        *(np.tile(1 + k * n + token, n) for k in range(layers - 1)),
        1 + (layers - 1) * n + token,
    ]
    edges = np.repeat(
        [0, 1, n], [1, n, (layers - 1) * n + 1]
    )  # that leave the target, the first layer, the others
    capacities = np.concatenate([np.ones(n), matrices[1:].ravel(), source])
    arrays = capacities * RESOLUTION, np.concatenate(ends), np.concatenate([[0], edges.cumsum()])
    graph = csr_array(
        tuple(array.astype(np.int32) for array in arrays), shape=(len(edges), len(edges))
    )
    values = np.empty(n)
    for j in range(n):
        graph.data[:n] = (matrices[0, :, j] * RESOLUTION).astype(np.int32)
        values[j] = maximum_flow(graph, len(edges) - 1, 0).flow_value / RESOLUTION
    return values
