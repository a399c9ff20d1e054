"""What the package is tested with, for your own set-ups too: workloads, seeded inputs, an exact oracle, and the error gate.

    for workload in WORKLOADS:
        print(workload.name, errors_of(workload, implementation="xla"))   # every number <= 1 is right

The gate compares with float64 on the same rounded inputs, and in units of the error that the arithmetic must make, so that it
neither depends on the data's scale nor on the number of keys. With u the unit roundoff of the inputs' dtype,

    |out - exact|    <=  u * sum_j p_j |v_j|  +  ulp / 2        P is rounded before it meets V, and the output once more.

Correct kernels reach 0.2 to 0.85 of it; a single key too many scores 11. Large logits add their own float32 roundings to u.

Gradients have two gates. The first holds for each number, as the one above: dS and P are rounded before their products, delta comes
from the rounded output, and the result is rounded once. It is a worst case, therefore wide. The second holds for the root mean square
over the whole array, and is sharp.
"""

import dataclasses
import functools
import numbers
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Unit roundoff of the 16-bit dtypes. float32 is held to float32-level accuracy: its products are good to 2^-22 of |q_h k_h| (3xTF32; six
# products of bfloat16 parts leave out 2^-24 on average), and scale * sum_h |q_h k_h| <= 2^3 for N(0, 1) inputs up to head dim 128
# (0.64 * sqrt(H) on average), so the logits, and with them the relative errors of P, are good to 2^-19 = 1.9e-6. One TF32 product, at
# 2^-11, fails it a hundredfold.
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-19}
_PRODUCT_ROUNDOFF, _ORDINARY_LOGIT = 2.0**-22, 2.0**3
# Relative root mean square. Rounding alone gives 0.41 u per factor: three factors (dS or P, the output, delta), sqrt(3) * 0.41.
GRADIENT_GATE = {"float16": 3.5e-4, "bfloat16": 2.8e-3, "float32": 2.0**-19}
# The mean over fewer query rows than this is a sample of rounding errors rather than their size.
_ROWS_FOR_A_MEAN = 64
# lse is float32 whatever the inputs are. Four steps of 2^-22: split operands, accumulation, exp2, log2.
LSE_ROUNDOFF = 2.0**-20
# tanh in float32: four units, by the libraries' and the approximation's bounds. Its slope 1 - tanh^2 has twice that, absolute.
_TANH_ROUNDOFF = 2.0**-22


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of `attention`: shapes by axis letter, dtype, and the options that are not at their default."""

    name: str
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: str
    is_causal: bool = False
    scale: float | None = None
    query_seq_lengths: tuple[int, ...] | None = None
    key_value_seq_lengths: tuple[int, ...] | None = None
    local_window_size: int | tuple[int, int] | None = None
    logits_soft_cap: float | None = None
    split_size: int | None = 2048
    large: bool = False  # seconds on a GPU, minutes in an interpreter

    @property
    def options(self) -> dict:
        """The options that say what is computed; `split_size`, which says how, is not among them."""
        names = ("is_causal", "scale", "local_window_size", "logits_soft_cap")
        return {name: getattr(self, name) for name in names} | self.lengths

    @property
    def lengths(self) -> dict:
        given = {name: getattr(self, name) for name in ("query_seq_lengths", "key_value_seq_lengths")}
        return {name: None if lengths is None else np.asarray(lengths, np.int32) for name, lengths in given.items()}

    def __str__(self) -> str:
        return self.name


def _workload(name, T, S, heads=(2, 1), head_dim=64, dtype="bfloat16", B=1, **options) -> Workload:
    H, Hv = head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    return Workload(name, B, T, S, *heads, H, Hv, dtype, **options)


_BF16, _F16, _F32 = "bfloat16", "float16", "float32"

WORKLOADS = (
    # Ragged sizes, ratios of heads, head dims and dtypes.
    _workload("one query, one key", 1, 1, (1, 1), 8, B=2),
    _workload("one query", 1, 33, (4, 1), 64, B=2),
    _workload("one query, causal, three splits", 1, 257, (4, 2), 64, _F16, is_causal=True, split_size=128),
    _workload("head dim 8", 8, 8, (4, 4), 8, is_causal=True, B=2),
    _workload("head dim 40", 15, 17, (4, 2), 40, B=2),
    _workload("head dim 40, causal, float32", 100, 96, (4, 1), 40, _F32, is_causal=True),
    _workload("head dim 64, causal, 7:1", 127, 129, (7, 1), 64, is_causal=True),
    _workload("head dim 64, 3:3", 129, 127, (3, 3), 64, _F16),
    _workload("head dim 80, causal", 16, 16, (4, 2), 80, _F16, is_causal=True, B=2),
    _workload("head dim 96, causal", 17, 31, (4, 2), 96, is_causal=True, B=2),
    _workload("head dim 112, more queries than keys, causal", 31, 15, (4, 2), 112, is_causal=True, B=2),
    _workload("head dim 128, causal, float32", 33, 33, (2, 2), 128, _F32, is_causal=True),
    _workload("head dim 128, causal", 255, 200, (2, 1), 128, is_causal=True),
    _workload("head dim 160, causal", 63, 65, (2, 1), 160, _F16, is_causal=True),
    _workload("head dim 192/128, causal", 65, 63, (2, 1), (192, 128), is_causal=True),
    _workload("head dim 64/128", 33, 100, (2, 2), (64, 128), _F16),
    _workload("head dim 256, causal", 96, 100, (2, 1), 256, is_causal=True),
    _workload("three splits, causal", 257, 257, (2, 1), 64, _F16, is_causal=True, split_size=128),
    _workload("three splits, float32", 65, 300, (2, 1), 64, _F32, split_size=128),
    _workload("two splits, causal, more keys", 65, 255, (4, 2), 64, is_causal=True, split_size=128),
    _workload("schedule's own splits", 129, 200, (2, 1), 64, is_causal=True, split_size=None),
    # Windows, soft caps and scales.
    _workload("window (16, 0)", 129, 257, (2, 1), 64, local_window_size=(16, 0), split_size=128),
    _workload("window (0, 16)", 65, 100, (2, 1), 64, _F16, local_window_size=(0, 16)),
    _workload("window (7, 9), more queries than keys", 100, 70, (2, 1), 64, local_window_size=(7, 9)),
    _workload("window (30, 70), more queries than keys", 100, 33, (2, 1), 64, local_window_size=(30, 70)),
    _workload("window 0", 70, 70, (2, 1), 64, _F16, local_window_size=0),
    _workload("window 100, causal", 257, 257, (2, 1), 64, is_causal=True, local_window_size=100),
    _workload("window (5, 3), float32", 96, 96, (2, 1), 64, _F32, local_window_size=(5, 3)),
    _workload("soft cap 2, causal", 100, 127, (2, 1), 64, is_causal=True, logits_soft_cap=2.0),
    _workload("soft cap 5, float32", 33, 65, (2, 1), 64, _F32, logits_soft_cap=5.0),
    _workload("soft cap 20, window 40", 129, 129, (2, 1), 64, _F16, local_window_size=40, logits_soft_cap=20.0),
    _workload("scale 0.3, causal", 65, 65, (2, 1), 32, is_causal=True, scale=0.3),
    _workload("scale below 0", 33, 96, (2, 1), 64, _F16, scale=-0.1),
    _workload("scale below 0, soft cap 5", 33, 65, (2, 1), 64, _F16, scale=-0.2, logits_soft_cap=5.0),
    # Lengths per row.
    _workload("lengths", 65, 100, (2, 1), 64, B=4, query_seq_lengths=(65, 33, 1, 64), key_value_seq_lengths=(100, 64, 37, 1)),
    _workload(
        "lengths, causal", 65, 129, (4, 2), 64, _F16, B=4, is_causal=True,
        query_seq_lengths=(65, 20, 1, 50), key_value_seq_lengths=(129, 65, 128, 31),
    ),
    _workload(
        "lengths of 0, causal", 33, 65, (2, 1), 64, B=4, is_causal=True, query_seq_lengths=(0, 33, 0, 17), key_value_seq_lengths=(65, 0, 0, 40)
    ),
    _workload("lengths of 0, float32", 17, 33, (2, 1), 64, _F32, B=3, query_seq_lengths=(17, 5, 0), key_value_seq_lengths=(0, 16, 33)),
    _workload("lengths of queries", 65, 65, (2, 1), 64, B=3, is_causal=True, query_seq_lengths=(65, 64, 2)),
    _workload("lengths of keys, head dim 80", 17, 200, (4, 2), 80, B=3, key_value_seq_lengths=(200, 128, 7)),
    _workload(
        "everything", 129, 257, (4, 2), (96, 64), _F16, B=2, is_causal=True, scale=0.2, local_window_size=(70, 9), logits_soft_cap=8.0,
        query_seq_lengths=(129, 77), key_value_seq_lengths=(257, 130), split_size=128,
    ),
    # For a GPU: sizes of use.
    *(
        _workload(f"{T} x {S}, head dim {head_dim}, {dtype}", T, S, heads, head_dim, dtype, B=2, is_causal=is_causal, split_size=512, large=True)
        for T, S, heads, head_dim, dtype, is_causal in (
            (500, 513, (8, 2), 8, _BF16, True),
            (513, 500, (8, 8), 40, _F16, True),
            (1000, 1000, (8, 2), 64, _F16, True),
            (1000, 1000, (14, 2), 64, _BF16, True),
            (1000, 513, (8, 1), 80, _BF16, False),
            (513, 1000, (8, 4), 96, _BF16, True),
            (1000, 1000, (8, 8), 112, _F16, True),
            (1000, 1000, (16, 4), 128, _BF16, True),
            (1000, 1000, (16, 1), 128, _F16, False),
            (500, 1000, (4, 2), 160, _BF16, True),
            (1000, 1000, (4, 2), 192, _BF16, True),
            (1000, 1000, (4, 2), (192, 128), _BF16, True),
            (1000, 1000, (4, 2), 256, _F16, True),
            (1000, 1000, (4, 2), 64, _F32, True),
            (513, 1000, (4, 2), 128, _F32, False),
            (257, 513, (2, 1), 256, _F32, True),
        )
    ),
    _workload("2048 x 2048, default splits", 2048, 2048, (4, 2), 128, is_causal=True, large=True),
    _workload("1000 x 5000, default splits", 1000, 5000, (4, 2), 128, is_causal=True, large=True),
    _workload("2000 x 5000, window 700, soft cap", 2000, 5000, (4, 2), 128, local_window_size=700, logits_soft_cap=10.0, large=True),
    _workload(
        "lengths up to 3000, causal", 2000, 3000, (4, 2), 128, B=4, is_causal=True, large=True,
        query_seq_lengths=(2000, 0, 1234, 1), key_value_seq_lengths=(3000, 777, 1234, 2999),
    ),
)  # fmt: skip


class Inputs(NamedTuple):
    """The arrays of one differentiated call. `out_cotangent` [B, T, N, Hv] has the query's dtype, `lse_cotangent` is float32[B, T, N]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    out_cotangent: jax.Array
    lse_cotangent: jax.Array


class Results(NamedTuple):
    """What one differentiated call gives: the outputs, and the gradients of query, key and value."""

    out: jax.Array
    lse: jax.Array
    dquery: jax.Array
    dkey: jax.Array
    dvalue: jax.Array


class Oracle(NamedTuple):
    """Exact results in float64, and for each, elementwise, what their error may be.

    `bound` holds all but the last rounding; `noise` is the part of a gradient's expected error that does not shrink with the
    gradient itself: delta inherits the rounding of the output, also where its terms cancel.
    """

    exact: Results
    bound: Results
    noise: Results


def inputs(workload: Workload, seed: int = 0) -> Inputs:
    """N(0, 1) arrays rounded to the workload's dtype; the same for the same name and seed on every machine."""
    w = workload
    rng = np.random.default_rng((zlib.crc32(w.name.encode()), seed))
    shapes = (w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv), (w.B, w.T, w.N, w.Hv), (w.B, w.T, w.N)
    dtypes = (w.dtype,) * 4 + ("float32",)
    arrays = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return Inputs(*(jnp.asarray(array, dtype) for array, dtype in zip(arrays, dtypes, strict=True)))


def evaluate(attention, inputs: Inputs, **options) -> Results:
    """Runs `attention(query, key, value, return_lse=True, **options)` and its vjp in one jit, with the lengths traced."""
    arrays = {name: option for name, option in options.items() if name.endswith("_seq_lengths") and option is not None}
    static = {name: option for name, option in options.items() if name not in arrays}
    return _evaluate(attention, tuple(static.items()), inputs, arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluate(attention, static, inputs: Inputs, lengths) -> Results:
    call = functools.partial(attention, return_lse=True, **dict(static), **lengths)
    (out, lse), vjp = jax.vjp(call, inputs.query, inputs.key, inputs.value)
    return Results(out, lse, *vjp((inputs.out_cotangent.astype(out.dtype), inputs.lse_cotangent.astype(lse.dtype))))


def oracle(
    inputs: Inputs,
    *,
    is_causal=False,
    scale=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
) -> Oracle:
    """The definition in numpy float64, forward and backward, on the inputs as rounded. It reads nothing beyond the lengths."""
    query, key, value, out_cotangent, lse_cotangent = (np.asarray(a) for a in inputs)
    B, T, N, H = query.shape
    S, K, Hv = key.shape[1], key.shape[2], value.shape[3]
    group = N // K
    roundoff = _Roundoff(query.dtype)
    scale = 1.0 / np.sqrt(H) if scale is None else scale
    window = (local_window_size,) * 2 if local_window_size is None or isinstance(local_window_size, numbers.Integral) else local_window_size
    query_lengths = np.full(B, T) if query_seq_lengths is None else np.asarray(query_seq_lengths)
    key_lengths = np.full(B, S) if key_value_seq_lengths is None else np.asarray(key_value_seq_lengths)

    exact, bound, noise = (Results(*map(np.zeros, ((B, T, N, Hv), (B, T, N), (B, T, N, H), (B, S, K, H), (B, S, K, Hv)))) for _ in range(3))
    exact.lse[:] = -np.inf

    for b, n in np.ndindex(B, N):
        t, s, head = query_lengths[b], key_lengths[b], n // group
        seen = _seen(t, s, is_causal, *window)
        rows = np.flatnonzero(seen.any(axis=1))
        if rows.size == 0:
            continue
        seen, at = seen[rows], (b, rows, n)
        q, d_out, d_lse = (a[at].astype(np.float64) for a in (query, out_cotangent, lse_cotangent))
        k, v = (a[b, :s, head].astype(np.float64) for a in (key, value))

        logits, slope = scale * (q @ k.T), 1.0
        if logits_soft_cap is not None:
            logits = logits_soft_cap * np.tanh(logits / logits_soft_cap)
            slope = 1.0 - (logits / logits_soft_cap) ** 2
        logits[~seen] = -np.inf
        highest = logits.max(axis=1)
        lse = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
        p = np.exp(logits - lse[:, None])
        out = p @ v
        delta = (d_out * out).sum(axis=1)
        dlogits = p * (d_out @ v.T - delta[:, None] + d_lse[:, None])
        ds = dlogits * slope
        exact.out[at], exact.lse[at], exact.dquery[at] = out, lse, scale * (ds @ k)
        exact.dkey[b, :s, head] += scale * (ds.T @ q)
        exact.dvalue[b, :s, head] += p.T @ d_out

        sizes = np.where(seen, abs(scale) * (np.abs(q) @ np.abs(k).T), 0.0)
        unit = roundoff.unit + _moved_by_large_logits(p, slope * sizes, np.where(seen, logits, 0.0), lse, logits_soft_cap)
        bound.out[at] = (unit * p) @ np.abs(v)
        bound.lse[at] = LSE_ROUNDOFF * (sizes.max(axis=1) + np.abs(lse) + 1.0)
        delta_error = (np.abs(d_out) * (roundoff.of(out) + bound.out[at])).sum(axis=1, keepdims=True)
        ds_error = roundoff.of(ds, unit) * seen + np.abs(p * slope) * delta_error
        if logits_soft_cap is not None:  # however little the slope leaves
            ds_error += 2.0 * _TANH_ROUNDOFF * np.abs(dlogits)
        bound.dquery[at] = abs(scale) * (ds_error @ np.abs(k))
        bound.dkey[b, :s, head] += abs(scale) * (ds_error.T @ np.abs(q))
        bound.dvalue[b, :s, head] += (roundoff.of(p, unit) * seen).T @ np.abs(d_out)

        # Rounding errors of the terms of delta have random signs: their sum grows as the root of the sum of squares.
        delta_noise = np.sqrt(((d_out * out) ** 2).sum(axis=1))
        noise.dquery[at] = (scale * delta_noise[:, None] * ((p * slope) @ k)) ** 2
        noise.dkey[b, :s, head] += (scale * (p * slope * delta_noise[:, None]).T) ** 2 @ q**2
        # And so have those of large logits.
        beyond = unit / roundoff.unit - 1.0
        noise.dquery[at] += (scale * ds * beyond) ** 2 @ k**2
        noise.dkey[b, :s, head] += ((scale * ds * beyond) ** 2).T @ q**2
        noise.dvalue[b, :s, head] += ((p * beyond) ** 2).T @ d_out**2
    return Oracle(exact, bound, Results(*map(np.sqrt, noise)))


def _moved_by_large_logits(p, sizes, logits, lse, logits_soft_cap):
    """Relative errors of P by those of its float32 logits, where these are beyond what the units of roundoff are made for.

    A logit has those of its products, of tanh, and two roundings in units of log2, as lse has. Through the sum of exponentials
    each query has the average of its logits' errors, too.
    """

    def beyond(x):
        return np.maximum(np.abs(x) - _ORDINARY_LOGIT, 0.0)

    of_tanh = 0.0 if logits_soft_cap is None else _TANH_ROUNDOFF
    moved = _PRODUCT_ROUNDOFF * beyond(sizes) + (of_tanh + 2.0**-23) * beyond(logits) + 2.0**-23 * beyond(lse)[:, None]
    return moved + (p * moved).sum(axis=1, keepdims=True)


def errors(results: Results, oracle: Oracle) -> dict[str, float]:
    """Each result's largest error as a fraction of its gate: right where <= 1, infinite where NaN or where an exact -inf is missed."""
    found = {}
    for name, got, exact, bound, noise in zip(Results._fields, results, *oracle, strict=True):
        roundoff = _Roundoff(got.dtype)
        got = np.asarray(got).astype(np.float64)
        error = np.where(got == exact, 0.0, np.abs(got - np.where(np.isfinite(exact), exact, np.nan)))
        # The last rounding is of what the others have moved, perhaps beyond a power of two, where numbers are twice as far apart.
        allowed = bound if name == "lse" else bound + roundoff.last(np.abs(exact) + bound)
        found[name] = _largest(error, allowed)
        if name.startswith("d") and np.isfinite(oracle.exact.lse).sum() >= _ROWS_FOR_A_MEAN:
            size = np.sqrt(np.mean(exact**2) + np.mean(noise**2))
            found[name] = max(found[name], _largest(np.sqrt(np.mean(error**2)), GRADIENT_GATE[roundoff.name] * size))
    return found


def errors_of(workload: Workload, implementation: str | None = None, seed: int = 0) -> dict[str, float]:
    """`errors` of `flashcore_jax.attention` on one workload: {"out", "lse", "dquery", "dkey", "dvalue"} -> fraction of the gate."""
    from flashcore_jax.attention import attention

    arrays = inputs(workload, seed)
    call = functools.partial(attention, implementation=implementation, split_size=workload.split_size)
    return errors(evaluate(call, arrays, **workload.options), oracle(arrays, **workload.options))


def assert_right(results: Results, oracle: Oracle) -> None:
    """Raises AssertionError where a result is outside its gate, and names all of them."""
    found = errors(results, oracle)
    assert max(found.values()) <= 1.0, "errors as fractions of their gates: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items())


def _seen(query_length, key_length, is_causal, left, right):
    """bool[query_length, key_length]: the drawing in `masks`, by its words."""
    beyond = np.arange(key_length) - (key_length - query_length + np.arange(query_length))[:, None]  # j - p
    seen = np.ones((query_length, key_length), bool)
    if is_causal:
        seen &= beyond <= 0
    if right is not None:
        seen &= beyond <= right
    if left is not None:
        seen &= beyond >= -left
    return seen


class _Roundoff:
    """The rounding of float64 numbers to a dtype."""

    def __init__(self, dtype):
        info = jnp.finfo(dtype)
        self.name = str(info.dtype)
        self.unit = UNIT_ROUNDOFF[self.name]
        self.digits = info.nmant
        self.lowest_exponent = info.minexp
        # GPUs' exp2 gives 0 where float32 has subnormal numbers; float16's are float32's normal ones.
        self.smallest = max(float(info.smallest_subnormal) / 2, float(jnp.finfo(jnp.float32).tiny))

    def of(self, x, unit=None):
        """The largest error of rounding x for a product: relative, down to the smallest numbers."""
        return np.maximum((self.unit if unit is None else unit) * np.abs(x), self.smallest)

    def last(self, x):
        """Half an ulp of x."""
        exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))[1] - 1
        return 0.5 * np.exp2(np.maximum(exponent, self.lowest_exponent) - self.digits)


def _largest(error, allowed) -> float:
    fraction = np.divide(error, allowed, out=np.where(error == 0, 0.0, np.inf), where=(allowed > 0) & (error > 0))
    return float(np.max(np.where(np.isnan(error), np.inf, fraction)))
