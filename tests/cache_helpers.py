"""What the tests of the cache share: caches with known contents, calls with a cache, and what "equal" means.

Two kinds of contents: `filled` and `tokens` are numbers for a cache alone, of the sizes below. A `Workload` is a sequence of
known attention, of which `split_at` puts the first part into a cache.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
from conftest import on_gpu

from flashcore_jax import KVCache, attention_with_kv_cache
from flashcore_jax.testing import UNIT_ROUNDOFF, Inputs, Oracle, Results, Workload, errors, inputs

# --- a cache alone

# 37 slots are no whole number of a kernel's tiles; 40 and 24 columns are held as 32 + 8 and 16 + 8, with padding behind.
B, S, K, H, Hv, L = 4, 37, 2, 40, 24, 3
LENGTHS = [[7, 0, S, 2], [0, 3, 20, 9], [30, 1, 0, 11]]
FLAGS = [[True, False, True, False], [False, True, True, False], [True, False, False, True]]


def tokens(T, dtype="float32", seed=1):
    """New keys and values for B rows."""
    rng = np.random.default_rng((seed, T))
    return tuple(jnp.asarray(rng.standard_normal((B, T, K, size), np.float32), dtype) for size in (H, Hv))


def filled(length, dtype="float32", overflowed=None, seed=0) -> KVCache:
    """A cache with numbers in the first `length` slots of each row, and NaN in those that are not in use."""
    length = np.asarray(length, np.int32)
    rng = np.random.default_rng(seed)

    def slots(size):
        used = np.arange(S) < length[..., None]
        return jnp.asarray(np.where(used[..., None, None], rng.standard_normal((*used.shape, K, size), np.float32), np.nan), dtype)

    flags = np.zeros(length.shape, bool) if overflowed is None else np.asarray(overflowed)
    return KVCache(slots(H), slots(Hv), jnp.asarray(length), jnp.asarray(flags))


def appended(cache, key, value, counts, layer=None) -> KVCache:
    """`append` by its words, in numpy: each row as a whole, or not at all."""
    keys, values, length, overflowed = (np.array(x) for x in jax.tree.leaves(cache))
    key, value = np.asarray(key), np.asarray(value)
    for b, count in enumerate(counts):
        row = (b,) if layer is None else (layer, b)
        overflowed[row] |= length[row] + count > S
        if not overflowed[row]:
            slots = slice(length[row], length[row] + count)
            keys[row][slots], values[row][slots] = key[b, :count], value[b, :count]
            length[row] += count
    return KVCache(keys, values, length, overflowed)


def bits(tree):
    """The arrays' bits, in copies: NaN is equal to itself, and 0 is not -0."""
    return jax.tree.map(lambda x: np.array(x).view(f"u{x.dtype.itemsize}"), tree)


def assert_same_bits(got, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    chex.assert_trees_all_equal(bits(got), bits(expected))


@functools.partial(jax.jit, static_argnames="implementation")
def jitted_append(cache, key, value, counts=None, layer=None, *, implementation):
    return cache.append(key, value, query_seq_lengths=counts, layer=layer, implementation=implementation)


# --- a sequence of known attention, whose first part a cache holds

TOTALS = (290, 0, 131, 77)  # three splits of 128; none; just over one; less than one
_all = dict(B=4, T=290, S=290, is_causal=True, query_seq_lengths=TOTALS, key_value_seq_lengths=TOTALS, split_size=128)
CASES = {
    "bfloat16, 4:2": Workload("cache", N=4, K=2, H=16, Hv=24, dtype="bfloat16", **_all),
    "float16, 4:1, window, soft cap": Workload(
        "cache", N=4, K=1, H=32, Hv=16, dtype="float16", local_window_size=(150, 0), logits_soft_cap=4.0, **_all
    ),
    "float32, 3:3": Workload("cache", N=3, K=3, H=40, Hv=40, dtype="float32", **_all),
    "float16, 4:2, scale below 0": Workload("cache", N=4, K=2, H=16, Hv=16, dtype="float16", scale=-0.25, **_all),
}


def options_of(w: Workload, implementation, **changed) -> tuple:
    """The options of a call, hashable: static arguments of the jitted functions below."""
    names = ("is_causal", "scale", "local_window_size", "logits_soft_cap", "split_size")
    return tuple(({name: getattr(w, name) for name in names} | {"implementation": implementation} | changed).items())


@functools.partial(jax.jit, static_argnames="options")
def attend(query, key, value, cache, lengths=None, layer=None, *, options):
    """One call: (out, lse), cache."""
    out, lse, cache = attention_with_kv_cache(
        query, key, value, cache, query_seq_lengths=lengths, layer=layer, return_lse=True, **dict(options)
    )
    return (out, lse), cache


@functools.partial(jax.jit, static_argnames=("options", "remat"))
def differentiate(query, new, cache, lengths, cotangents, layer=None, *, options, remat=False):
    """(out, lse), and the gradients of query, the new key and value, and the cache's key and value."""

    def call(query, new, key, value):
        state = dataclasses.replace(cache, key=key, value=value)
        return attend(query, *new, state, lengths, layer, options=options)[0]

    got, pull = jax.vjp(jax.checkpoint(call) if remat else call, query, new, cache.key, cache.value)
    return got, pull(cotangents)


def through_a_cache(query, key, value, *, query_seq_lengths=None, return_lse=False, implementation, **options):
    """Causal `attention`, by two calls: all but the last T keys and values are appended, then come those with their queries."""
    B, T, (S, K, H), Hv = *query.shape[:2], key.shape[1:], value.shape[-1]
    (old_key, key), (old_value, value) = (jnp.split(x, [S - T], axis=1) for x in (key, value))
    cache = KVCache.create(B, S, K, H, value_head_dim=Hv, dtype=key.dtype)
    cache = cache.append(old_key, old_value, implementation=implementation)
    options |= {"query_seq_lengths": query_seq_lengths, "return_lse": True, "implementation": implementation}
    out, lse, _ = attention_with_kv_cache(query, key, value, cache, **options)
    return (out, lse) if return_lse else out


def tokens_of(array, start, count, size, padding=jnp.nan):
    """[B, size, ...]: of each row the tokens from `start` on, `count` of them, then `padding`; behind the last slot, the last."""
    at = np.minimum(np.asarray(start)[:, None] + np.arange(size), array.shape[1] - 1)
    found = np.asarray(array)[np.arange(len(at))[:, None], at]
    found[np.arange(size) >= np.asarray(count)[:, None]] = padding
    return jnp.asarray(found)


def split_at(arrays: Inputs, lengths, counts, T, capacity=None, unused=jnp.nan):
    """The keys and values of whole rows as a cache with each row's first `lengths`, and the `counts` behind them as T new ones."""
    B, S = arrays.key.shape[:2]
    used = np.arange(S) < np.asarray(lengths)[:, None]

    def slots(x):
        held = np.full((B, capacity or S, *x.shape[2:]), unused, x.dtype)
        held[:, :S][used] = np.asarray(x)[used]
        return jnp.asarray(held)

    cache = KVCache(slots(arrays.key), slots(arrays.value), jnp.asarray(lengths, jnp.int32), jnp.asarray(np.zeros(B, bool)))
    return cache, [tokens_of(x, lengths, counts, T, unused) for x in arrays[1:3]]


def tail(case, T, lengths, counts) -> tuple[Workload, Inputs]:
    """Rows of which a cache holds the first `lengths` tokens, and `counts` of T new ones are real."""
    totals = tuple(int(n) for n in np.add(lengths, counts))
    counts = tuple(int(n) for n in counts)
    w = dataclasses.replace(CASES[case], T=T, B=len(counts), query_seq_lengths=counts, key_value_seq_lengths=totals)
    return w, inputs(w)


def call_after(w, arrays: Inputs, lengths, implementation, unused=jnp.nan, capacity=None):
    """What `attend` gives, in numpy: to look at it compiles nothing."""
    counts = w.query_seq_lengths
    cache, new = split_at(arrays, lengths, counts, w.T, capacity, unused)
    query = tokens_of(arrays.query, [0] * len(counts), counts, w.T, unused)
    return jax.device_get(attend(query, *new, cache, jnp.asarray(counts, jnp.int32), options=options_of(w, implementation)))


def empty_cache(w: Workload, capacity=None) -> KVCache:
    """Its slots hold NaN, so that whoever reads what was not written is found out."""
    cache = KVCache.create(w.B, capacity or w.S, w.K, w.H, value_head_dim=w.Hv, dtype=w.dtype)
    return dataclasses.replace(cache, key=jnp.full_like(cache.key, jnp.nan), value=jnp.full_like(cache.value, jnp.nan))


def in_chunks(arrays: Inputs, cache: KVCache, start, until, size, options):
    """Gives each row its own tokens, from `start`, which it has, up to `until`, at most `size` at a time; padding is NaN.

    Returns (out, lse), cache: the outputs where the tokens stand in the sequence, and 0 and -inf elsewhere.
    """
    start, until, calls = np.asarray(start), np.asarray(until), []
    query, key, value = (np.asarray(x) for x in arrays[:3])
    while np.any(start < until):
        count = np.minimum(until - start, size)
        new = (tokens_of(x, start, count, size) for x in (query, key, value))
        got, cache = attend(*new, cache, jnp.asarray(count, jnp.int32), options=options)
        calls.append((start, count, jax.device_get(got)))
        start = start + count
    out = np.zeros((*arrays.query.shape[:3], arrays.value.shape[-1]), arrays.query.dtype)
    lse = np.full(out.shape[:3], -np.inf, np.float32)
    for start, count, got in calls:
        for b, n in enumerate(count):
            out[b, start[b] : start[b] + n], lse[b, start[b] : start[b] + n] = (x[b, :n] for x in got)
    return (out, lse), cache


# --- what "equal" means


def forward_errors(got, exact: Oracle) -> float:
    """The larger of the errors of out and lse, as fractions of their gates."""
    out, lse = got
    gradients = (x.astype(out.dtype) for x in exact.exact[2:])  # not asked for: the exact ones
    found = errors(Results(out, lse, *gradients), exact)
    return max(found["out"], found["lse"])


def ulp_of(exact, dtype):
    return np.spacing(np.abs(exact).astype(dtype)).astype(np.float64)


def float32_part(dtype) -> float:
    """Of a gate, what is left of it in float32."""
    return UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF[str(dtype)]


def assert_within(got, expected, allowed):
    got, expected = (np.asarray(x).astype(np.float64) for x in (got, expected))
    with np.errstate(invalid="ignore"):  # -inf less -inf, where the two are equal
        difference = np.where(got == expected, 0.0, np.abs(got - expected))
    assert np.all(difference <= allowed), f"{np.nanmax(difference / np.maximum(allowed, 1e-30)):.3g} of what is allowed"


def assert_near(got, expected, exact: Oracle):
    """`got` obeys the gate, and `expected` is a reference, in float32: off by the gate at most, and float32's own."""
    dtype = got[0].dtype
    assert_within(got[0], expected[0], (1 + float32_part(dtype)) * exact.bound.out + ulp_of(exact.exact.out, dtype) / 2)
    assert_within(got[1], expected[1], 2 * exact.bound.lse)


def assert_same(got, expected, exact: Oracle, implementation):
    """Two ways to compute one thing: the same bits where they are promised, elsewhere what two right results may differ by.

    Both obey the gate, so they are two gates apart at most: two roundings of P, and an ulp of the output. That is a worst case,
    for each number. What differs is the order of float32 additions alone, so before anything is rounded to 16 bits the two are
    within two of float32's gates. Rounding, first of P, then of the output, takes two numbers to different sides of a border as
    often as their distance is a part of the ulp, and an ulp apart then: on average it leaves the distance as it is. So the part
    of the outputs that differ is two of float32's gates over the ulp, 2 to 10 in a hundred, and a wrong key changes nearly all.
    """
    got, expected = jax.device_get((got, expected))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    dtype = got[0].dtype
    is_16_bit = dtype != jnp.float32
    if on_gpu() and implementation == "triton" and is_16_bit:
        chex.assert_trees_all_equal(got, expected)
        return
    ulp = ulp_of(exact.exact.out, dtype)
    assert_within(got[0], expected[0], 2 * exact.bound.out + ulp)
    assert_within(got[1], expected[1], 2 * exact.bound.lse)
    if is_16_bit:
        sees = np.isfinite(exact.exact.lse)
        apart = 2 * float32_part(dtype) * exact.bound.out[sees]
        assert np.mean((got[0] != expected[0])[sees]) <= np.mean(np.minimum(apart / ulp[sees], 1.0))


def assert_holds(cache: KVCache, arrays: Inputs, length):
    """The cache has these lengths, and to the bit these tokens."""
    np.testing.assert_array_equal(cache.length, length)
    assert not np.any(cache.overflowed)
    got, expected = jax.device_get(((cache.key, cache.value), (arrays.key, arrays.value)))
    for b, count in enumerate(length):
        chex.assert_trees_all_equal(*([x[b, :count] for x in pair] for pair in (got, expected)))


# --- mistakes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def trace(call, arguments):
    """Traces `call(**arguments)`; those that have a shape are its arrays."""
    arrays = {name: a for name, a in arguments.items() if hasattr(a, "shape")}
    static = {name: a for name, a in arguments.items() if name not in arrays}
    return jax.eval_shape(lambda **arrays: call(**arrays, **static), **arrays)
