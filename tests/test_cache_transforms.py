"""JAX's transformations around `KVCache.append`: loops, vmap, gradients, donation, 64-bit mode."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import LENGTHS, B, L, S, appended, assert_same_bits, bits, filled, jitted_append, tokens

from flashcore_jax import KVCache


def test_scan_and_while_loop(implementation):
    """One token at a time, a row pausing now and then, until the first is full: what the model in numpy holds at that step."""
    steps = 9
    cache = filled([0, 3, S - steps, 17])
    key, value = tokens(steps)
    counts = np.random.default_rng(2).integers(0, 2, (steps, B))
    counts[:, 2] = 1

    def append(cache, step):
        at = jax.lax.dynamic_slice_in_dim(key, step, 1, 1), jax.lax.dynamic_slice_in_dim(value, step, 1, 1)
        return cache.append(*at, query_seq_lengths=jnp.asarray(counts)[step], implementation=implementation)

    @jax.jit
    def scan(cache):
        return jax.lax.scan(lambda cache, step: (append(cache, step), cache.length), cache, jnp.arange(steps))

    @jax.jit
    def loop(cache):
        def has_room(state):
            return jnp.all(state[0].length < S) & (state[1] < 2 * steps)

        return jax.lax.while_loop(has_room, lambda state: (append(*state), state[1] + 1), (cache, 0))

    expected, lengths = cache, []
    for step in range(steps):
        lengths.append(np.array(expected.length))
        expected = appended(expected, key[:, step : step + 1], value[:, step : step + 1], counts[step])
    scanned, seen = scan(cache)
    assert_same_bits(scanned, expected)
    np.testing.assert_array_equal(seen, lengths)
    looped, taken = loop(cache)
    assert_same_bits(looped, expected)
    assert taken == steps


def test_vmap(implementation):
    """Over a second batch axis, of which one cache overflows in one row."""
    caches = [filled([0, 3, 20, S - 5]), filled([S - 4, 0, 11, 30], seed=3)]
    news = [tokens(5), tokens(5, seed=4)]
    counts = np.array([[5, 2, 0, 5], [5, 5, 5, 5]])
    stack = functools.partial(jax.tree.map, lambda *x: jnp.stack(x))

    def append(cache, new, counts):
        return cache.append(*new, query_seq_lengths=counts, implementation=implementation)

    got = jax.jit(jax.vmap(append))(stack(*caches), stack(*news), jnp.asarray(counts))
    assert np.array(got.overflowed).tolist() == [[False] * B, [True, False, False, False]]
    for i in range(2):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), appended(caches[i], *news[i], counts[i]))


def test_vmap_over_continuations_of_one_prefix(implementation):
    """The cache is shared, the tokens are not: each continuation gets a copy, and the prefix stays."""
    cache, news = filled([0, 3, 20, S - 5]), [tokens(5), tokens(5, seed=4)]
    before = bits(cache)
    keys, values = (jnp.stack(x) for x in zip(*news, strict=True))
    append = functools.partial(jitted_append, implementation=implementation)
    got = jax.jit(jax.vmap(append, (None, 0, 0)))(cache, keys, values)
    for i in range(2):
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), appended(cache, *news[i], [5] * B))
    chex.assert_trees_all_equal(bits(cache), before)


def test_a_scan_over_layers_fills_a_stack_like_separate_caches(implementation):
    lengths = [[7, 0, S, 2], [0, 3, S - 5, 9], [30, 1, 0, 11]]
    cache = filled(lengths)
    new = [tokens(5, seed=seed) for seed in range(L)]
    keys, values = (jnp.stack(x) for x in zip(*new, strict=True))
    counts = jnp.array([5, 1, 0, 4])

    @jax.jit
    def scan(cache):
        def append(cache, layer_and_new):
            layer, key, value = layer_and_new
            return cache.append(key, value, query_seq_lengths=counts, layer=layer, implementation=implementation), None

        return jax.lax.scan(append, cache, (jnp.arange(L), keys, values))[0]

    got = scan(cache)
    for i in range(L):
        alone = jax.tree.map(lambda x, i=i: x[i], cache).append(*new[i], query_seq_lengths=counts, implementation=implementation)
        assert_same_bits(jax.tree.map(lambda x, i=i: x[i], got), alone)
        assert_same_bits(alone, appended(jax.tree.map(lambda x, i=i: x[i], cache), *new[i], np.array(counts)))


@pytest.mark.parametrize("stacked", [False, True])
def test_gradient_of_append(implementation, stacked):
    """Each slot's cotangent goes to whoever wrote it: a new token, or the cache before. Padding and what overflows get none."""
    lengths, counts = [0, 3, 20, S - 4], np.array([5, 2, 0, 5])
    cache, new = filled([LENGTHS[0], lengths, LENGTHS[2]] if stacked else lengths), tokens(5)
    layer = jnp.int32(1) if stacked else None

    def write(key, value, *contents):
        state = KVCache(*contents, cache.length, cache.overflowed)
        after = jitted_append(state, key, value, jnp.asarray(counts), layer, implementation=implementation)
        return after.key, after.value

    contents = tuple(jnp.nan_to_num(x) for x in (cache.key, cache.value))
    arriving = tuple(jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in contents)
    *of_new, of_key, of_value = jax.vjp(write, *new, *contents)[1](arriving)
    for got_new, got_kept, full in zip(of_new, (of_key, of_value), map(np.array, arriving), strict=True):
        mine = full[1] if stacked else full
        expected = np.zeros(got_new.shape, np.float32)
        for b, count in enumerate(counts[:3]):  # the last row overflows
            slots = slice(lengths[b], lengths[b] + count)
            expected[b, :count] = mine[b, slots]
            mine[b, slots] = 0
        chex.assert_trees_all_equal(got_new, expected)
        chex.assert_trees_all_equal(got_kept, full)


def test_a_row_that_overflowed_before_takes_no_gradient(implementation):
    """Nothing is written there any more, though there is room for it: slots keep their cotangents, and new tokens get none."""
    cache, new = filled([0, 3, 20, 7], overflowed=[False, True, False, False]), tokens(5)

    def write(key, value, *contents):
        after = jitted_append(KVCache(*contents, cache.length, cache.overflowed), key, value, implementation=implementation)
        return after.key, after.value

    contents = tuple(jnp.nan_to_num(x) for x in (cache.key, cache.value))
    arriving = tuple(jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in contents)
    *of_new, of_key, of_value = jax.vjp(write, *new, *contents)[1](arriving)
    for got_new, got_kept, full in zip(of_new, (of_key, of_value), arriving, strict=True):
        np.testing.assert_array_equal(got_new[1], 0.0)
        assert np.all(np.any(np.asarray(got_new[jnp.array([0, 2, 3])]) != 0, axis=(1, 2, 3)))
        chex.assert_trees_all_equal(got_kept[1], full[1])


@pytest.mark.parametrize("stacked", [False, True])
def test_a_donated_cache_is_updated_where_it_lies(implementation, stacked):
    cache = filled(LENGTHS if stacked else LENGTHS[1])
    key, value = tokens(5)
    layer, counts = (jnp.int32(1) if stacked else None), [5, 1, 5, 0]
    expected = appended(cache, key, value, counts, 1 if stacked else None)
    append = jax.jit(functools.partial(KVCache.append, implementation=implementation), donate_argnums=0)
    mine = jax.tree.map(jnp.copy, cache)
    addresses = [x.unsafe_buffer_pointer() for x in (mine.key, mine.value)]
    got = append(mine, key, value, layer=layer, query_seq_lengths=jnp.array(counts))
    assert mine.key.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in (got.key, got.value)] == addresses
    assert_same_bits(got, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_under_x64(implementation, stacked):
    """Python's integers are 64 bits wide then, and int64 lengths are the default: the cache keeps its dtypes and its meaning."""
    cache = filled(LENGTHS if stacked else LENGTHS[1])
    key, value = tokens(5)
    layer, counts = (1 if stacked else None), [5, 1, 5, 0]
    expected = appended(cache, key, value, counts, layer)
    with jax.enable_x64(True):
        got = jitted_append(cache, key, value, jnp.array(counts), layer and jnp.asarray(layer), implementation=implementation)
        cut = got.truncate(4).reset(0)
    assert_same_bits(got, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(cut, cache)
