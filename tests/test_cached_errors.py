"""What `attention_with_kv_cache` does with rows that have no room, and what it says to wrong arguments."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import array, assert_holds, attend, forward_errors, options_of, split_at, tail, trace
from derivatives import assert_close

from flashcore_jax import ArgumentError, CacheOverflowError, DtypeError, KVCache, OptionError, ShapeError, attention_with_kv_cache
from flashcore_jax.testing import oracle

# --- overflow

OTHERS = np.array([0, 2, 3])


@pytest.mark.parametrize("T", [1, 7])
def test_overflow_under_jit_is_nan_for_that_row_and_only_it(implementation, T):
    """The others have the bits that they have beside a row with room; and the row is NaN until it is whole again."""
    lengths = np.array([290 - T, 291 - T, 0, 128])
    w, arrays = tail("bfloat16, 4:2", T, lengths, [T] * 4)
    (cache, new), options = split_at(arrays, lengths, [T] * 4, T), options_of(w, implementation)
    counts = jnp.full(4, T, jnp.int32)
    got, after = attend(arrays.query, *new, cache, counts, options=options)
    np.testing.assert_array_equal(after.overflowed, [False, True, False, False])
    np.testing.assert_array_equal(after.length, [290, lengths[1], T, 128 + T])
    chex.assert_trees_all_equal((after.key[1], after.value[1]), (cache.key[1], cache.value[1]))
    with pytest.raises(CacheOverflowError, match=r"rows \[1\]"):
        after.check()
    pick = functools.partial(jax.tree.map, lambda x: x[OTHERS])
    beside = attend(arrays.query, *new, cache.truncate(np.array([290, 5, 290, 290])), counts, options=options)
    chex.assert_trees_all_equal(pick((got, after)), pick(beside))
    chex.assert_tree_all_finite(pick(got))
    assert all(np.all(np.isnan(x[1])) for x in got)
    # It stays NaN in a call that asks for nothing.
    got, still = attend(arrays.query, *new, after, jnp.zeros(4, jnp.int32), options=options)
    assert all(np.all(np.isnan(x[1])) for x in got)
    np.testing.assert_array_equal(got[0][OTHERS], 0.0)
    chex.assert_trees_all_equal(still, after)
    # Rolled back to where there is room, it has the bits of a row that never overflowed.
    back = np.array([0, 290 - T, 0, 0])
    healed = attend(arrays.query, *new, still.truncate(back), counts, options=options)
    clean = attend(arrays.query, *new, cache.truncate(back), counts, options=options)
    chex.assert_trees_all_equal(healed[0], clean[0])
    chex.assert_tree_all_finite(healed[0])
    healed[1].check()


def test_a_cache_that_is_a_constant_of_the_program(implementation):
    """A prefix that `jit`, `checkpoint` or a loop closes over: nothing is looked at there, and nothing raises, full rows included."""
    B, S, K, H = 4, 12, 2, 8
    key, value = (jnp.asarray(np.random.default_rng(i).standard_normal((B, 4, K, H)), jnp.float32) for i in (1, 2))
    query, counts = jnp.concatenate([value, key], axis=2), jnp.array([4, 2, 0, 3])
    cache = KVCache.create(B, S, K, H, dtype=jnp.float32).append(key, value)

    def call(query, cache=cache, layer=None):
        return attention_with_kv_cache(query, key, value, cache, query_seq_lengths=counts, layer=layer, implementation=implementation)

    expected, after = call(query)
    got, same = jax.jit(call)(query)
    assert_close(got, expected)
    np.testing.assert_array_equal(same.length, after.length)
    jax.grad(jax.checkpoint(lambda query: call(query)[0].sum()))(query)
    assert_close(jax.lax.map(lambda query: call(query)[0], query[None])[0], expected)
    np.testing.assert_array_equal(jax.jit(lambda key: cache.append(key, value, query_seq_lengths=counts))(key).length, after.length)

    full = dataclasses.replace(cache, length=jnp.array([12, 0, 0, 0]))
    with pytest.raises(CacheOverflowError):
        call(query, full)
    out, over = jax.jit(lambda query: call(query, full))(query)
    np.testing.assert_array_equal(over.overflowed, [True, False, False, False])
    assert np.all(np.isnan(out[0]))
    assert np.all(np.isfinite(out[1:]))

    stack, one = jax.tree.map(lambda x: jnp.stack([x, x]), cache), jnp.int32(1)
    out, _ = jax.jit(lambda query: call(query, stack, one))(query)
    assert_close(out, expected)


@pytest.mark.parametrize("layers", [None, 2])
def test_nan_of_an_overflowed_row_goes_nowhere(implementation, layers):
    """As where it comes from a layer before: no gradient of the query, the tokens or the cache has it."""
    B, S, K, H = 2, 4, 1, 8
    key, value, query = (
        jnp.asarray(np.random.default_rng(i).standard_normal((B, 2, K, H)), jnp.float32).at[0].set(jnp.nan) for i in range(3)
    )
    cache = KVCache.create(B, S, K, H, layers=layers, dtype=jnp.float32)
    cache = dataclasses.replace(cache, length=cache.length + jnp.array([4, 2]))

    @jax.jit
    def gradients(*arrays):
        def loss(query, key, value, *contents):
            state = dataclasses.replace(cache, key=contents[0], value=contents[1], length=arrays[-1])
            out, _ = attention_with_kv_cache(query, key, value, state, layer=layers and 1, implementation=implementation)
            return jnp.sum(jnp.where(jnp.arange(B)[:, None, None, None] == 1, out, 0.0))

        return jax.grad(loss, (0, 1, 2, 3, 4))(*arrays[:-1])

    found = gradients(query, key, value, cache.key, cache.value, cache.length)
    chex.assert_tree_all_finite(found)
    for x in found[:3]:
        np.testing.assert_array_equal(x[0], 0.0)


def test_an_exact_fit_to_the_last_slot(implementation):
    """Without jit: the call that fills a row is right, and the next raises before it writes."""
    lengths, T = [283, 0, 283, 50], 7
    w, arrays = tail("bfloat16, 4:2", T, lengths, [T] * 4)
    cache, new = split_at(arrays, lengths, [T] * 4, T)
    options = dict(options_of(w, implementation))
    out, lse, full = attention_with_kv_cache(arrays.query, *new, cache, return_lse=True, **options)
    assert forward_errors((out, lse), oracle(arrays, **w.options)) <= 1.0
    assert_holds(full, arrays, w.key_value_seq_lengths)
    before = jax.tree.map(np.array, full)
    with pytest.raises(CacheOverflowError, match=r"rows \[0, 2\]"):
        attention_with_kv_cache(arrays.query, *new, full, **options)
    chex.assert_trees_all_equal(full, before)


# --- mistakes

RIGHT = {"query": array(2, 5, 4, 16), "key": array(2, 5, 2, 16), "value": array(2, 5, 2, 8)}
WRONG = [
    ("more queries than new keys", {"query": array(2, 6, 4, 16)}, ShapeError, "query's T = 6"),
    ("fewer queries than new keys", {"query": array(2, 1, 4, 16)}, ShapeError, "query's T = 1"),
    ("heads that no group divides", {"query": array(2, 5, 7, 16)}, ShapeError, "a multiple of key/value heads"),
    ("query's head dim", {"query": array(2, 5, 4, 24)}, ShapeError, "the cache's batch and head dim"),
    ("another batch", {"query": array(3, 5, 4, 16)}, ShapeError, "the cache's batch and head dim"),
    ("query's dtype", {"query": array(2, 5, 4, 16, dtype=jnp.bfloat16)}, DtypeError, "the cache's dtype float32; got bfloat16"),
    ("no cache", {"cache": None}, ArgumentError, "cache to be a KVCache; got NoneType"),
    ("a tuple for the cache", {"cache": (1, 2)}, ArgumentError, "cache to be a KVCache; got tuple"),
    ("the new tokens' dtype", {"key": array(2, 5, 2, 16, dtype=jnp.bfloat16)}, DtypeError, "key of the cache's dtype"),
    ("the new tokens' heads", {"key": array(2, 5, 4, 16), "value": array(2, 5, 4, 8)}, ShapeError, "as the cache"),
    ("lengths as floats", {"query_seq_lengths": array(2)}, DtypeError, "int32"),
    ("lengths of another batch", {"query_seq_lengths": array(3, dtype=jnp.int32)}, ShapeError, "(2,)"),
    ("a layer of none", {"layer": 0}, OptionError, "layers="),
    ("a window of -1", {"local_window_size": -1}, OptionError, "local_window_size"),
    ("a split of 100", {"split_size": 100}, OptionError, "split_size"),
]


@pytest.mark.parametrize(("changed", "error", "words"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_arguments(changed, error, words):
    cache = KVCache.create(2, 20, 2, 16, value_head_dim=8, dtype=jnp.float32)
    arguments = RIGHT | {"cache": cache} | changed
    with pytest.raises(error, match=r"^expected .*; got .*; ") as raised:
        trace(functools.partial(attention_with_kv_cache, cache=arguments.pop("cache")), arguments)
    assert words in str(raised.value)


def test_a_row_that_overflowed_before_is_not_said_to_be_full():
    cache = dataclasses.replace(KVCache.create(2, 20, 2, 16, dtype=jnp.float32), overflowed=jnp.array([True, False]))
    tokens = jnp.ones((2, 1, 2, 16))
    with pytest.raises(CacheOverflowError, match=r"rows \[0\] have none, or have overflowed before; .*truncate\(\) or reset\(\)"):
        attention_with_kv_cache(tokens, tokens, tokens, cache)


def test_32_query_heads_on_7_raise_and_on_8_do_not():
    """cache-precision.md."""
    for K, right in ((7, False), (8, True)):
        cache = KVCache.create(2, 20, K, 16, dtype=jnp.float32)
        arrays = array(2, 5, 32, 16), array(2, 5, K, 16), array(2, 5, K, 16)
        if right:
            assert jax.eval_shape(attention_with_kv_cache, *arrays, cache)[0].shape == (2, 5, 32, 16)
        else:
            with pytest.raises(ShapeError, match="multiple of key/value heads"):
                jax.eval_shape(attention_with_kv_cache, *arrays, cache)
