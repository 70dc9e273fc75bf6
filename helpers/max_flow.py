"""Exact maximum flow through layers of attention, with scipy alone: its processes start at once."""

import numpy as np
from joblib import Parallel, delayed
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

# Capacities are whole multiples of 1 / 2³⁰, since scipy's max-flow counts in int32.
RESOLUTION = 2**30
# So many examples are worth starting processes for, one a core: scipy holds Python's lock.
MANY = 8


def max_flow_to_inputs(matrices, source):
    """Max-flow from source [N] through matrices [L, N, N] to every input token: [N].

    Node 0 is the target, 1 + l·N + i is token i above layer l (l = 0 … L-1), and the last node is
    the source: scipy tries edges in order of their ends, so those that lead on come first.

    Taught in notebook 07, "3 · Flow: how much can get through?".
    """
    layers, n, _ = matrices.shape
    first, last, size = 1, 1 + (layers - 1) * n, 2 + layers * n
    # Rows of a CSR matrix: the target leads nowhere, each token of the first layer to the target,
    # each token of layer l to all of layer l - 1, the source to all of the last layer.
    ends = [np.zeros(n), *(np.tile(np.arange(k, k + n), n) for k in range(first, last, n))]
    ends = np.concatenate([*ends, np.arange(last, last + n)])
    edges = np.repeat([0, 1, n], [1, n, (layers - 1) * n + 1])  # that leave each node
    starts = np.concatenate([[0], edges.cumsum()])
    capacities = np.concatenate([np.ones(n), matrices[1:].ravel(), source]) * RESOLUTION
    rows = tuple(array.astype(np.int32) for array in (capacities, ends, starts))
    graph = csr_array(rows, shape=(size, size))
    flow = np.empty(n)
    for j in range(n):
        # Only the edges into the target change from token to token, and they stand first.
        graph.data[:n] = (matrices[0, :, j] * RESOLUTION).astype(np.int32)
        flow[j] = maximum_flow(graph, size - 1, 0).flow_value / RESOLUTION
    return flow


def flows(examples):
    """`max_flow_to_inputs` of each example (matrices, source); of many in several processes."""
    jobs = -1 if len(examples) >= MANY else 1
    calls = [delayed(max_flow_to_inputs)(*example) for example in examples]
    return Parallel(n_jobs=jobs, max_nbytes=None)(calls)
