"""One call over a cache that holds something: who sees whom, and how exactly, on inputs whose answer is known."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    assert_holds,
    attend,
    call_after,
    empty_cache,
    forward_errors,
    in_chunks,
    options_of,
    split_at,
    tail,
)

from flashcore_jax import attention
from flashcore_jax.testing import UNIT_ROUNDOFF, Inputs, Workload, inputs, oracle


@pytest.mark.parametrize("case", ["bfloat16, 4:2", "float16, 4:2, scale below 0", "float32, 3:3"])
@pytest.mark.parametrize("near", [0, -30])
def test_ones_stay_ones(implementation, near, case):
    """V = 1 gives 1, before, at and behind the ends of blocks and splits. With every score near -30, a slot that was never
    written, let in with score 0, would outweigh all others: the slots hold 0 here, as `create` leaves them."""
    T, lengths = 7, [16, 57, 121, 250]
    w, arrays = tail(case, T, lengths, [T] * 4)
    scale = w.scale or w.H**-0.5
    arrays = arrays._replace(
        query=arrays.query.at[..., 0].set(near), key=arrays.key.at[..., 0].set(1 / scale), value=jnp.ones_like(arrays.value)
    )
    (out, lse), cache = call_after(w, arrays, lengths, implementation, unused=0.0)
    np.testing.assert_array_equal(cache.length, np.add(lengths, T))
    exact = oracle(arrays, **w.options)
    assert forward_errors((out, lse), exact) <= 1.0
    assert np.all((exact.exact.lse < -15) if near else (exact.exact.lse > -5))  # the inputs are what they are meant to be
    if w.dtype == "float32":
        chex.assert_trees_all_close(out, jnp.ones_like(out), atol=UNIT_ROUNDOFF["float32"], rtol=0)  # the gate, where |v| = 1
    else:
        # Roundings of P have random signs. From 16 keys on their mean is below u / 8, and 1 - u / 2 still rounds to 1.
        np.testing.assert_array_equal(out, 1.0)


@pytest.mark.parametrize("case", ["bfloat16, 4:2", "float16, 4:2, scale below 0"])
def test_large_logits(implementation, case):
    """|logits| up to about 1000, both signs, over three splits: finite, and the gate as ever."""
    lengths = [283, 0, 100, 130]
    w, arrays = tail(case, 7, lengths, [7, 7, 1, 4])
    arrays = arrays._replace(query=arrays.query * 16, key=arrays.key * 16)
    got, _ = call_after(w, arrays, lengths, implementation)
    exact = oracle(arrays, **w.options)
    assert 500 < np.max(np.abs(exact.exact.lse[np.isfinite(exact.exact.lse)])) < 2000
    chex.assert_tree_all_finite((got[0], jnp.exp(-jnp.abs(got[1]))))
    assert forward_errors(got, exact) <= 1.0


@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 4), (8, 2), (8, 1), (32, 1), (7, 1), (28, 4)])
def test_every_query_head_reads_its_groups_key_value_head(implementation, N, K):
    """V = the number of the kv head, in the cache and in the new tokens, so the output is it."""
    w = Workload("heads", 2, 2, 19, N, K, 8, 8, "float32", is_causal=True, query_seq_lengths=(2, 2), key_value_seq_lengths=(19, 6))
    arrays = inputs(w)
    arrays = arrays._replace(value=jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[:, None], arrays.value.shape))
    (out, _), _ = call_after(w, arrays, [17, 4], implementation)

    def right(head_of):
        return np.allclose(out[..., 0], np.broadcast_to(head_of, (2, 2, N)), rtol=UNIT_ROUNDOFF["float32"], atol=0)  # the gate

    assert right(np.arange(N) // (N // K))
    if 1 < K < N:  # else the two are the same
        assert not right(np.arange(N) % K)


@pytest.mark.parametrize("window", [None, (3, 5)], ids=str)
def test_who_sees_whom_where_it_is_not_causal(implementation, window):
    """Equal scores and V = identity: each output row is 1 / count at the slots that it sees, new tokens behind it included."""
    T, S, lengths, counts = 9, 48, np.array([20, 0, 7, 30]), np.array([9, 4, 0, 9])
    zeros, identity = jnp.zeros((4, S, 1, 8)), jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (4, S, 1, S))
    w = Workload("sees", 4, T, S, 1, 1, 8, S, "float32", local_window_size=window, query_seq_lengths=tuple(counts))
    (out, _), _ = call_after(w, Inputs(zeros[:, :T], zeros, identity, None, None), lengths, implementation)
    left, right = window or (S, S)
    for b, i in np.ndindex(4, T):
        p = lengths[b] + i
        seen = np.array([i < counts[b] and j < lengths[b] + counts[b] and p - left <= j <= p + right for j in range(S)], float)
        # Weights of 1 have an exact sum: only 1 / count is rounded, on a GPU to 2 ulps, each of them 2^-23 at most.
        np.testing.assert_allclose(out[b, i, 0], seen / max(seen.sum(), 1), rtol=2**-22, atol=0)


# --- cache-precision.md: the items of its table that have a cache, fp16, largest difference from float64 rounded to fp16


# Each gate is one ulp of numbers up to a certain size: of N(0, 1) inputs these are some whose outputs are no larger.
SEED = 11


def difference_from_rounded(got, exact, gate) -> float:
    """The largest, as a fraction of the gate."""
    assert np.max(np.abs(exact.exact.out)) < gate * 2**11
    assert forward_errors(got, exact) <= 1.0
    rounded = exact.exact.out.astype(np.float16).astype(np.float64)
    return float(np.max(np.abs(np.asarray(got[0], np.float64) - rounded))) / gate


@pytest.mark.parametrize(
    ("N", "K", "is_causal", "steps", "gate", "decode_gate"),
    # The table's 0.00195 is 2^-9, 0.00098 is 2^-10, 0.00049 is 2^-11, 0.00024 is 2^-12.
    [(8, 8, True, 10, 2**-9, 2**-11), (32, 8, False, 5, 2**-10, 2**-10), (32, 8, True, 5, 2**-9, 2**-10)],
    ids=["prefill + decode", "GQA + cache", "causal + cache, GQA"],
)
def test_gates_of_prefill_and_decode(implementation, N, K, is_causal, steps, gate, decode_gate):
    """The matching reference of a call that is not causal is not causal itself, over the tokens that are there by then."""
    prompt, S = 64, 64 + steps
    w = Workload("prefill and decode", 2, S, S, N, K, 64, 64, "float16", is_causal=is_causal)
    arrays, options = inputs(w, SEED), options_of(w, implementation)
    cache = empty_cache(w)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, S))]:
        query, *cotangents = (a[:, start:stop] for a in (arrays.query, arrays.out_cotangent, arrays.lse_cotangent))
        exact = oracle(Inputs(query, arrays.key[:, :stop], arrays.value[:, :stop], *cotangents), is_causal=is_causal)
        got, cache = attend(*(a[:, start:stop] for a in arrays[:3]), cache, options=options)
        assert difference_from_rounded(got, exact, gate if start == 0 else decode_gate) <= 1.0
    assert_holds(cache, arrays, [S, S])


@pytest.mark.parametrize(
    ("B", "prompt", "T", "capacity", "gate"), [(4, 0, 128, 128, 2**-11), (2, 256, 1, 4096, 2**-12)], ids=["first call", "single decode"]
)
def test_gates_of_one_call(implementation, B, prompt, T, capacity, gate):
    """Not causal. The decode uses a part of the first of its splits, and reads nothing of the other slots."""
    S = prompt + T
    w = Workload("one call", B, T, S, 8, 8, 64, 64, "float16")
    arrays = inputs(w, SEED)
    cache, new = split_at(arrays, [prompt] * B, [T] * B, T, capacity)
    got, cache = attend(arrays.query, *new, cache, options=options_of(w, implementation))
    assert_holds(cache, arrays, [S] * B)
    assert difference_from_rounded(got, oracle(arrays, **w.options), gate) <= 1.0


@pytest.mark.parametrize("size", [1, 8])
def test_causal_means_of_a_ramp(implementation, size):
    """Q = K = 1 and V = 0..7 give out[i] = i / 2, to one ulp: one by one as all at once."""
    w = Workload("ramp", 1, 8, 8, 1, 1, 8, 8, "float16", is_causal=True)
    ones = jnp.ones((1, 8, 1, 8), jnp.float16)
    ramp = ones * jnp.arange(8, dtype=jnp.float16)[None, :, None, None]
    (out, _), _ = in_chunks(Inputs(ones, ones, ramp, None, None), empty_cache(w, 40), [0], [8], size, options_of(w, implementation))
    expected = np.broadcast_to(np.arange(8.0)[:, None] / 2, (8, 8))
    np.testing.assert_allclose(out[0, :, 0].astype(np.float64), expected, rtol=2**-10, atol=0)


@pytest.mark.parametrize("total", [64, 65, 129])
@pytest.mark.parametrize("T", [2, 16])
def test_few_queries_around_the_ends_of_blocks_and_splits(implementation, T, total):
    """Also where the last query alone opens a block, or a split."""
    w = Workload(
        "ends", 1, T, 200, 4, 2, 16, 16, "bfloat16", is_causal=True, split_size=128, query_seq_lengths=(T,), key_value_seq_lengths=(total,)
    )
    arrays = inputs(w)
    got, _ = call_after(w, arrays, [total - T], implementation)
    assert forward_errors(got, oracle(arrays, **w.options)) <= 1.0


def test_more_splits_than_are_merged_at_once(implementation):
    """35 of them, which are loaded in groups of 32."""
    lengths = 35 * 128 - 5, 33 * 128 + 1
    w = Workload("splits", 2, 2, lengths[0], 2, 1, 8, 8, "float32", is_causal=True, split_size=128, key_value_seq_lengths=lengths)
    arrays = inputs(w)
    call = functools.partial(attention, is_causal=True, return_lse=True, implementation=implementation, split_size=128)
    got = jax.jit(call)(*arrays[:3], key_value_seq_lengths=w.lengths["key_value_seq_lengths"])
    assert forward_errors(got, oracle(arrays, **w.options)) <= 1.0
