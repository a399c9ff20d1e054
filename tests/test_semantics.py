"""What random data hides: phantom keys, poison, head mapping, empty rows, the mask's structure, padding, and large logits."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashcore_jax
from flashcore_jax.testing import (
    LSE_ROUNDOFF,
    UNIT_ROUNDOFF,
    WORKLOADS,
    Inputs,
    Workload,
    assert_right,
    errors,
    errors_of,
    evaluate,
    inputs,
    oracle,
)

DTYPES = ("bfloat16", "float16", "float32")
WORKLOAD = {w.name: w for w in WORKLOADS}


@functools.cache
def attention_by(implementation, split_size=2048):
    """One object per implementation, so that `evaluate` traces once per shape."""
    return functools.partial(flashcore_jax.attention, implementation=implementation, split_size=split_size)


def workload(T, S, N=2, K=1, H=64, dtype="bfloat16", B=1, name="semantics", **options) -> Workload:
    return Workload(name, B, T, S, N, K, H, H, dtype, **options)


def sees(i, j, query_length, key_length, is_causal=False, window=None) -> bool:
    """The definition (docs/semantics.md), one pair at a time."""
    p = key_length - query_length + i
    causal = not is_causal or j <= p
    windowed = window is None or p - window[0] <= j <= p + window[1]
    return i < query_length and j < key_length and causal and windowed


# --- phantom keys


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "S", "is_causal"), [(65, 65, True), (17, 100, False)])
@pytest.mark.parametrize("near", [0, -30])
def test_ones_stay_ones(implementation, near, T, S, is_causal, dtype):
    """V = 1 gives 1. With every score near -30, a masked key that is let in with score 0 would outweigh all others."""
    w = workload(T, S, dtype=dtype, is_causal=is_causal)
    arrays = inputs(w)
    arrays = arrays._replace(
        query=arrays.query.at[..., 0].set(near),
        key=arrays.key.at[..., 0].set(8.0),  # 1 / scale
        value=jnp.ones_like(arrays.value),
    )
    results, exact = evaluate(attention_by(implementation), arrays, **w.options), oracle(arrays, **w.options)
    assert_right(results, exact)
    assert np.all((exact.exact.lse < -15) if near else (exact.exact.lse > -5))  # the inputs are what they are meant to be
    if dtype == "float32":
        chex.assert_trees_all_close(results.out, jnp.ones_like(results.out), atol=UNIT_ROUNDOFF[dtype], rtol=0)
    else:
        # Roundings of P have random signs. From 16 keys on their mean is below u / 8, and 1 - u / 2 still rounds to 1.
        np.testing.assert_array_equal(results.out[:, 16:] if is_causal else results.out, 1.0)


# --- poison


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["lengths, causal", "lengths of 0, float32", "everything"])
def test_poison_beyond_the_lengths_changes_nothing(implementation, name, poison):
    """To the bit, in every output and gradient: also where cotangents of padded rows are poisoned."""
    w = WORKLOAD[name]
    clean = inputs(w)
    query_lengths, key_lengths = (np.asarray(x) for x in w.lengths.values())

    def poisoned(array, lengths):
        beyond = np.arange(array.shape[1]) >= lengths[:, None]
        return jnp.where(beyond.reshape(*beyond.shape, *[1] * (array.ndim - 2)), poison, array).astype(array.dtype)

    dirty = Inputs(*map(poisoned, clean, (query_lengths, key_lengths, key_lengths, query_lengths, query_lengths)))
    run = functools.partial(evaluate, attention_by(implementation, w.split_size), **w.options)
    results = run(dirty)
    chex.assert_tree_all_finite(results._replace(lse=jnp.exp(results.lse)))
    chex.assert_trees_all_equal(results, run(clean))
    for b, (q, k) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        for array in (results.out[b, q:], results.dquery[b, q:], results.dkey[b, k:], results.dvalue[b, k:]):
            np.testing.assert_array_equal(array, 0.0)
        np.testing.assert_array_equal(results.lse[b, q:], -np.inf)


# --- rows that see nothing


@pytest.mark.parametrize(
    ("w", "empty"),
    [
        (workload(65, 33, is_causal=True), range(32)),
        (workload(65, 33, dtype="float32", local_window_size=(40, 3)), range(32 - 3)),
        (workload(33, 65, B=2, key_value_seq_lengths=(0, 0)), range(33)),
        (workload(33, 65, B=2, is_causal=True, query_seq_lengths=(33, 33), key_value_seq_lengths=(20, 20)), range(13)),
    ],
    ids=["more queries than keys", "window", "no keys", "short rows"],
)
def test_a_row_that_sees_nothing(implementation, w, empty):
    """Output 0, lse -inf, gradients 0; whatever its cotangents hold."""
    empty = np.asarray(empty)
    arrays = inputs(w)
    poisoned = arrays._replace(
        out_cotangent=arrays.out_cotangent.at[:, empty].set(np.nan), lse_cotangent=arrays.lse_cotangent.at[:, empty].set(np.nan)
    )
    results = evaluate(attention_by(implementation), poisoned, **w.options)
    np.testing.assert_array_equal(results.out[:, empty], 0.0)
    np.testing.assert_array_equal(results.lse[:, empty], -np.inf)
    np.testing.assert_array_equal(results.dquery[:, empty], 0.0)
    rest = np.setdiff1d(np.arange(w.T), empty)
    assert np.all(np.isfinite(results.lse[:, rest]))
    chex.assert_tree_all_finite((results.dkey, results.dvalue))
    assert_right(results, oracle(arrays, **w.options))


# --- the structure of the mask


@pytest.mark.parametrize(
    ("is_causal", "window", "query_length", "key_length"),
    [
        (False, None, 40, 56),
        (True, None, 40, 56),
        (True, None, 40, 24),
        (True, None, 7, 50),
        (False, (3, 5), 40, 56),
        (False, (0, 0), 40, 40),
        (False, (20, 2), 33, 9),
        (True, (6, 6), 40, 56),
        (False, None, 0, 56),
        (True, None, 40, 0),
        (False, (64, 64), 21, 37),
    ],
    ids=str,
)
def test_who_sees_whom(implementation, is_causal, window, query_length, key_length):
    """Equal scores and V = identity: row i of the output is 1 / count at the keys that it sees, and 0 elsewhere."""
    T, S = 40, 56
    query, key = jnp.zeros((1, T, 1, 8), jnp.float32), jnp.zeros((1, S, 1, 8), jnp.float32)
    value = jnp.eye(S, dtype=jnp.float32)[None, :, None, :]
    attention = functools.partial(flashcore_jax.attention, is_causal=is_causal, local_window_size=window, implementation=implementation)
    lengths = {"query_seq_lengths": jnp.array([query_length]), "key_value_seq_lengths": jnp.array([key_length])}
    out, lse = jax.jit(functools.partial(attention, return_lse=True))(query, key, value, **lengths)
    expected = np.array([[sees(i, j, query_length, key_length, is_causal, window) for j in range(S)] for i in range(T)], float)
    count = expected.sum(axis=1, keepdims=True)
    # The gate, where logits are 0 and V is 0 or 1.
    np.testing.assert_allclose(out[0, :, 0], expected / np.maximum(count, 1), rtol=UNIT_ROUNDOFF["float32"], atol=0)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse[0, :, 0], np.log(count[:, 0]), rtol=LSE_ROUNDOFF, atol=LSE_ROUNDOFF)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_means_of_a_ramp(implementation, dtype):
    """Q = K = 1 and V = 0..7: out[i] = i / 2, to one ulp."""
    ones = jnp.ones((1, 8, 1, 8), dtype)
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None], ones.shape).astype(dtype)
    out = jax.jit(functools.partial(flashcore_jax.attention, is_causal=True, implementation=implementation))(ones, ones, ramp)
    expected = np.broadcast_to(np.arange(8.0)[:, None] / 2, (8, 8))
    np.testing.assert_allclose(np.asarray(out[0, :, 0], np.float64), expected, rtol=float(jnp.finfo(dtype).eps), atol=0)


# --- heads


@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 4), (8, 2), (8, 1), (32, 1), (7, 1), (28, 4)])
def test_every_query_head_reads_its_groups_key_value_head(implementation, N, K):
    """V = the number of the kv head, so the output is it; and what flows back into V comes from the group's heads only."""
    w = workload(2, 16, N, K, 8, "float32")
    arrays = inputs(w)
    value = jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[None, None, :, None], arrays.value.shape)
    back = jnp.broadcast_to(2.0 ** -jnp.arange(N, dtype=jnp.float32)[None, None, :, None], arrays.out_cotangent.shape)
    results = evaluate(attention_by(implementation), arrays._replace(value=value, out_cotangent=back), **w.options)
    # Each row's weights sum to 1, so that all of its cotangent arrives at its key/value head. Nothing has a sign that could cancel.
    arrived = np.asarray(results.dvalue, np.float64)[0, :, :, 0].sum(axis=0) / w.T
    gate = UNIT_ROUNDOFF["float32"] + 2**-24  # P's, and the last rounding

    def right(head_of):
        expected = np.zeros(K)
        np.add.at(expected, head_of, 2.0 ** -np.arange(N))
        return tuple(np.allclose(*pair, rtol=gate, atol=0) for pair in ((results.out[0, 0, :, 0], head_of), (arrived, expected)))

    grouped, interleaved = np.arange(N) // (N // K), np.arange(N) % K
    assert right(grouped) == (True, True)
    if 1 < K < N:  # else the two are the same
        assert right(interleaved) == (False, False)


# --- padding


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_changes_nothing(implementation, is_causal):
    """A row of 37 queries and 70 keys alone, and padded to 65 and 129 beside a longer row: twice float32's gate at most."""
    padded = workload(65, 129, dtype="float32", B=2, is_causal=is_causal, query_seq_lengths=(37, 65), key_value_seq_lengths=(70, 129))
    alone = workload(37, 70, dtype="float32", is_causal=is_causal)
    arrays = inputs(padded)
    own = Inputs(*(a[:1, :length] for a, length in zip(arrays, (37, 70, 70, 37, 37), strict=True)))
    run = functools.partial(evaluate, attention_by(implementation))
    of_padded, of_alone = run(arrays, **padded.options), run(own, **alone.options)
    for a, b in zip(of_alone, of_padded, strict=True):
        difference, size = (jnp.sqrt(jnp.mean(jnp.square(x))) for x in (a - b[:1, : a.shape[1]], a))
        assert difference <= 2 * UNIT_ROUNDOFF["float32"] * size


# --- large logits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("factor", "size"), [(16, 1e3), (512, 1e6)])
def test_large_logits(implementation, factor, size, dtype):
    """|logits| up to about that size, both signs: all finite, and the gates as ever, gradients included."""
    w = workload(33, 100, dtype=dtype, is_causal=True)
    arrays = inputs(w)
    arrays = arrays._replace(query=arrays.query * factor, key=arrays.key * factor)
    results, exact = evaluate(attention_by(implementation), arrays, **w.options), oracle(arrays, **w.options)
    assert 0.5 * size < np.max(np.abs(exact.exact.lse)) < 2 * size
    chex.assert_tree_all_finite(results)
    assert_right(results, exact)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_rows_of_one_sign(implementation, sign, dtype):
    """Scores all near +900 or all near -900: the largest one decides, and not its distance from 0."""
    w = workload(17, 40, dtype=dtype)
    arrays = inputs(w)
    arrays = arrays._replace(query=arrays.query.at[..., 0].set(90.0 * sign), key=arrays.key.at[..., 0].set(80.0))
    results, exact = evaluate(attention_by(implementation), arrays, **w.options), oracle(arrays, **w.options)
    chex.assert_tree_all_finite(results)
    assert_right(results, exact)


def test_scale_of_zero_is_the_mean(implementation):
    w = workload(17, 33, dtype="float32", scale=0.0)
    arrays = inputs(w)
    results = evaluate(attention_by(implementation), arrays, **w.options)
    assert_right(results, oracle(arrays, **w.options))
    np.testing.assert_array_equal(results.dquery, 0.0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_window_wider_than_the_call_is_no_window(implementation, is_causal):
    """Even one that no 32-bit integer holds."""
    arrays = inputs(workload(17, 33, H=16))[:3]
    run = jax.jit(functools.partial(attention_by(implementation), is_causal=is_causal), static_argnames="local_window_size")
    for window in (2**40, (50, 2**40), (2**63, 49 if not is_causal else 0)):
        expected = run(*arrays, local_window_size=(50, 50))  # T + S
        chex.assert_trees_all_equal(run(*arrays, local_window_size=window), expected)
    chex.assert_trees_all_equal(expected, run(*arrays))


def test_options_default_to_none(implementation):
    """Full lengths and a window over everything mean the same as none; the scale's default is 1 / sqrt(H)."""
    w = workload(33, 65, B=2, dtype="float32")
    arrays = inputs(w)
    full = {"query_seq_lengths": np.full(2, 33, np.int32), "key_value_seq_lengths": np.full(2, 65, np.int32)}
    for options in ({}, full | {"local_window_size": 200, "scale": 0.125}):
        assert_right(evaluate(attention_by(implementation), arrays, **options), oracle(arrays))


def test_out_alone_is_the_same(implementation):
    w = WORKLOAD["lengths, causal"]
    arrays = inputs(w)
    attention = functools.partial(attention_by(implementation), **w.options)
    out = jax.jit(attention)(*arrays[:3])
    chex.assert_trees_all_equal(out, evaluate(attention_by(implementation), arrays, **w.options).out)


def test_the_default_runs_here():
    w = WORKLOAD["everything"]
    arrays = inputs(w)
    assert_right(evaluate(flashcore_jax.attention, arrays, **w.options), oracle(arrays, **w.options))
    explanation = flashcore_jax.explain(*arrays[:3], is_causal=True)
    assert explanation.reasons[explanation.implementation] is None
    assert set(explanation.reasons) >= {"triton", "xla"}


def test_a_split_size_beyond_all_keys(implementation):
    """Of any size: one split of all keys, also where its end would not fit 32 bits."""
    w = Workload("splits", 1, 1, 64, 1, 1, 64, 64, "float32")
    arrays = inputs(w)
    got, expected = (evaluate(attention_by(implementation, size), arrays) for size in (2**40, 128))
    chex.assert_trees_all_equal(got, expected)


@pytest.mark.parametrize("T", [1, 33])
def test_every_split_size_has_its_own_bits(implementation, T):
    """By decode and by the forward: sums are closed where it says, or it would promise nothing."""
    w = Workload("splits", 1, T, 600, 2, 1, 64, 64, "float32")
    arrays = inputs(w)
    exact = oracle(arrays)
    results = [evaluate(attention_by(implementation, size), arrays) for size in (128, 256, 640)]
    for got in results:
        assert_right(got, exact)
    assert len({np.asarray(got.out).tobytes() for got in results}) == 3


def test_a_saturated_soft_cap(implementation):
    """Every logit is near the cap, whose slope is what 1 - tanh^2 leaves of its rounding."""
    w = Workload("cap", 1, 70, 70, 1, 1, 64, 64, "float32", is_causal=True, logits_soft_cap=0.2)
    found = errors_of(w, implementation)
    assert max(found.values()) <= 1, found
    wrong = evaluate(attention_by(implementation), inputs(w), is_causal=True, logits_soft_cap=0.21)
    assert errors(wrong, oracle(inputs(w), **w.options))["dkey"] > 1


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("cap", [50.0, 1000.0, 1e5])
def test_the_error_of_a_large_soft_cap(implementation, cap, dtype):
    """tanh's error is multiplied by the cap: logits of the cap's own size. (On a CPU it is another tanh than a GPU's.)"""
    w = Workload("large cap", 1, 40, 40, 1, 1, 16, 16, dtype, logits_soft_cap=cap)
    arrays = inputs(w)
    arrays = arrays._replace(query=arrays.query * min(cap, 1000.0), key=arrays.key * max(1.0, cap / 1000.0))
    assert_right(evaluate(attention_by(implementation), arrays, logits_soft_cap=cap), oracle(arrays, logits_soft_cap=cap))


@pytest.mark.parametrize("beyond", [(99, 7), (-3, -9)], ids=["above", "below"])
def test_lengths_out_of_range_are_clamped(implementation, beyond):
    """To the bit, gradients included; what lies there is foreign memory."""
    w = Workload("clamped", 2, 17, 33, 2, 1, 16, 16, "float32", is_causal=True)
    arrays, names = inputs(w), ("query_seq_lengths", "key_value_seq_lengths")
    ends = (17, 33) if beyond[0] > 0 else (0, 0)
    inside = {name: np.array([some, end], np.int32) for name, some, end in zip(names, (17, 20), ends, strict=True)}
    outside = {name: inside[name] + np.array([0, more], np.int32) for name, more in zip(names, beyond, strict=True)}
    got, expected = (evaluate(attention_by(implementation), arrays, is_causal=True, **lengths) for lengths in (outside, inside))
    chex.assert_trees_all_equal(got, expected)
    assert_right(got, oracle(arrays, is_causal=True, **inside))
