"""What a cell's answer is: float64 attention and its gradients for one key/value head of one batch row, on the device.

All queries of the heads that share the key/value head, in chunks of queries, so that no T×S array of the cell's full size
exists at any length. The arithmetic is written out (no autodiff, none of the package's code), so it shares no mistake.
A cell with a cache has few queries and no gradient: there numpy does, for several rows and heads.
"""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workloads import Cell
from flashcore_jax.testing import GRADIENT_GATE, UNIT_ROUNDOFF

WRONG = 4.0  # times the gate. Another rounding order costs less, one key too many costs more
_CHUNK = 512


def part(cell: Cell, query, key, value, d_out):
    """The last head of the last row: where a wrong offset or head mapping shows. Arrays [T, G, H], [S, H], [S, H], [T, G, H]."""
    G = cell.N // cell.K
    return query[-1, :, -G:], key[-1, :, -1], value[-1, :, -1], d_out[-1, :, -G:]


def attention(cell: Cell, query, key, value, d_out, lengths=None):
    """(out, sum_j p_j |v_j|, dq, dk, dv) in float64, of `part`: 0 beyond the row's length. Call and jit it under `jax.enable_x64(True)`."""
    q, k, v, do = (x.astype(jnp.float64) for x in part(cell, query, key, value, d_out))
    T, G, H = q.shape
    chunk = min(_CHUNK, T)
    assert T % chunk == 0, f"T = {T} is not a multiple of {chunk}"
    j = jnp.arange(T)
    length = T if lengths is None else lengths[-1]

    def visit(sums, rows):
        i, q, do = rows
        far = i[:, None] - j[None, :]  # how far key j lies before query i
        seen = (far >= 0) if cell.is_causal else jnp.ones_like(far, bool)
        if cell.window is not None:
            seen &= far <= cell.window
        seen &= j < length
        scores = jnp.where(seen[:, None, :], jnp.einsum("tgh,sh->tgs", q, k) * cell.scale, -jnp.inf)
        p = jnp.where((i < length)[:, None, None], jax.nn.softmax(scores, axis=-1), 0.0)
        dp = jnp.einsum("tgh,sh->tgs", do, v)
        ds = p * (dp - jnp.sum(p * dp, axis=-1, keepdims=True)) * cell.scale
        dk, dv = sums
        sums = dk + jnp.einsum("tgs,tgh->sh", ds, q), dv + jnp.einsum("tgs,tgh->sh", p, do)
        return sums, (jnp.einsum("tgs,sh->tgh", p, v), jnp.einsum("tgs,sh->tgh", p, jnp.abs(v)), jnp.einsum("tgs,sh->tgh", ds, k))

    rows = jax.tree.map(lambda x: x.reshape(T // chunk, chunk, *x.shape[1:]), (j, q, do))
    (dk, dv), by_query = jax.lax.scan(visit, (jnp.zeros_like(k), jnp.zeros_like(v)), rows)
    out, weight, dq = (x.reshape(T, G, H) for x in by_query)
    return out, weight, dq, dk, dv


def checked(cell: Cell) -> list[tuple[int, int]]:
    """Of a cell with a cache, the (row, key/value head)s that are checked: the first and the last head of the first, the last, the
    shortest and the longest row."""
    rows = {0, int(cell.lengths.argmin()), int(cell.lengths.argmax()), cell.B - 1}
    return [(row, head) for row in sorted(rows) for head in sorted({0, cell.K - 1})]


def cached(cell: Cell, query, key, value) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """{(row, head): (out, sum_j p_j |v_j|)}, both float64[T, G, H], of those that are `checked`."""
    G, found = cell.N // cell.K, {}
    for row, head in checked(cell):
        length = int(cell.lengths[row])
        q = np.asarray(query[row, :, head * G : (head + 1) * G], np.float64)
        k, v = (np.asarray(x[row, :length, head], np.float64) for x in (key, value))
        scores = (q.reshape(cell.T * G, cell.H) @ k.T).reshape(cell.T, G, length) * cell.scale
        position = length - cell.T + np.arange(cell.T)
        scores[np.broadcast_to((np.arange(length) > position[:, None])[:, None], scores.shape)] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p = (p / p.sum(axis=-1, keepdims=True)).reshape(cell.T * G, length)
        found[row, head] = tuple((p @ x).reshape(q.shape) for x in (v, np.abs(v)))
    return found


def errors(cell: Cell, results, exact) -> dict[str, float]:
    """Of one contender's full results: the largest error of the output and the root mean square error of each gradient, each as
    a fraction of its gate in `flashcore_jax.testing`. On the host: nothing to compile, and NaN compares false with any limit."""
    G = cell.N // cell.K
    if cell.cached:
        parts = ((results[0][row, :, head * G : (head + 1) * G], *truth) for (row, head), truth in exact.items())
        return {"out": float(np.max([_output_error(cell, *part) for part in parts]))}
    exact_out, weight, *_ = exact
    (got, exact_out), (_, weight) = _checked_part(cell, (results[0], results[0]), (exact_out, weight))
    gradients = {name: error / GRADIENT_GATE[cell.dtype] for name, error in relative(cell, results, exact).items() if name != "out"}
    return {"out": float(_output_error(cell, got, exact_out, weight))} | gradients


def relative(cell: Cell, results, exact) -> dict[str, float]:
    """Of a cell without a cache, each result's root mean square error as a fraction of the root mean square of what is exact."""
    exact_out, _, *exact_gradients = exact
    found = {}
    for name, (got, e) in zip(("out", "dq", "dk", "dv"), _checked_part(cell, results, (exact_out, *exact_gradients)), strict=False):
        found[name] = float(np.sqrt(np.mean(np.square(got - e)) / np.mean(np.square(e))))
    return found


def _checked_part(cell: Cell, results, truths):
    """(result, truth) of what is checked, in float64: of valid rows, for what stands beyond them the libraries promise different things."""
    G, length = cell.N // cell.K, cell.lengths[-1]
    for x, heads, e in zip(results, (G, G, 1, 1), truths, strict=False):
        yield np.asarray(x[-1, :, -heads:], np.float64).reshape(e.shape)[:length], e[:length]


def _output_error(cell: Cell, got, exact, weight):
    u = UNIT_ROUNDOFF[cell.dtype]
    half_ulp = u * np.exp2(np.floor(np.log2(np.maximum(np.abs(exact), np.finfo(np.float32).tiny))))
    return np.max(np.abs(np.asarray(got, np.float64) - exact) / (u * weight + half_ulp))
