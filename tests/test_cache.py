"""`KVCache` itself: what append, truncate and reset leave in it, and what overflows."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import FLAGS, LENGTHS, B, H, Hv, K, L, S, appended, assert_same_bits, bits, filled, jitted_append, tokens

from flashcore_jax import ArgumentError, CacheOverflowError, KVCache, attention_with_kv_cache

# --- what it is


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layers", [None, L])
def test_create(layers, dtype):
    cache = KVCache.create(B, S, K, H, value_head_dim=Hv, layers=layers, dtype=dtype)
    stack = () if layers is None else (L,)
    chex.assert_shape(jax.tree.leaves(cache), [(*stack, B, S, K, H), (*stack, B, S, K, Hv), (*stack, B), (*stack, B)])
    chex.assert_type(jax.tree.leaves(cache), [jnp.dtype(dtype), jnp.dtype(dtype), jnp.int32, jnp.bool_])
    assert (cache.capacity, cache.layers) == (S, layers)
    np.testing.assert_array_equal(cache.length, 0)
    assert not np.any(cache.overflowed)
    cache.check()


def test_create_defaults():
    cache = KVCache.create(batch=2, capacity=10, kv_heads=3, head_dim=16)
    assert cache.value.shape == cache.key.shape == (2, 10, 3, 16)
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16


def test_it_is_a_frozen_pytree_of_four_arrays():
    cache = filled([1, 2, 3, 4])
    leaves, structure = jax.tree.flatten_with_path(cache)
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [".key", ".value", ".length", ".overflowed"]
    again = jax.tree.unflatten(structure, [leaf for _, leaf in leaves])
    assert isinstance(again, KVCache)
    assert_same_bits(again, cache)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cache.length = jnp.zeros(B, jnp.int32)


@pytest.mark.parametrize(("N", "ratio"), [(32, 4), (28, 7)])
def test_grouped_heads_take_exactly_that_much_less_memory(N, ratio):
    """In the cache that is created, and in the one that a call gives back."""

    def bytes_of(kv_heads):
        cache = KVCache.create(batch=2, capacity=64, kv_heads=kv_heads, head_dim=64, dtype=jnp.float16)
        query, new = (jax.ShapeDtypeStruct((2, 5, heads, 64), jnp.float16) for heads in (N, kv_heads))
        _, after = jax.eval_shape(attention_with_kv_cache, query, new, new, cache)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, cache)
        return cache.key.nbytes + cache.value.nbytes

    assert bytes_of(N) == ratio * bytes_of(N // ratio)


# --- append


@pytest.mark.parametrize(("T", "dtype"), [(1, "bfloat16"), (5, "float16"), (16, "float32"), (17, "bfloat16"), (33, "float16")])
def test_append_writes_behind_each_row_and_nowhere_else(implementation, T, dtype):
    """To the bit, in all slots: rows that are empty, partly filled, full, and filled up to the last slot. Padding may be poison."""
    lengths, counts = [0, 3, S, S - T], [T, T // 2, 0, T]
    cache = filled(lengths, dtype)
    real = (np.arange(T) < np.array(counts)[:, None])[:, :, None, None]
    key, value = (jnp.where(real, x, np.inf).astype(dtype) for x in tokens(T, dtype))
    expected = appended(cache, key, value, counts)
    np.testing.assert_array_equal(expected.length, [T, 3 + T // 2, S, S])
    counts = jnp.array(counts)
    assert_same_bits(cache.append(key, value, query_seq_lengths=counts, implementation=implementation), expected)
    assert_same_bits(jitted_append(cache, key, value, counts, implementation=implementation), expected)


def test_append_without_lengths_takes_all_tokens(implementation):
    cache, (key, value) = filled([0, 3, 20, S - 5]), tokens(5)
    assert_same_bits(cache.append(key, value, implementation=implementation), appended(cache, key, value, [5] * B))


def test_append_clamps_lengths(implementation):
    """As in `attention`: to 0 .. T."""
    cache, (key, value) = filled([0, 3, 20, S - 5]), tokens(5)
    got = cache.append(key, value, query_seq_lengths=jnp.array([-3, 2, 9, 5]), implementation=implementation)
    assert_same_bits(got, appended(cache, key, value, [0, 2, 5, 5]))


@pytest.mark.parametrize("layer", [1, -1, "traced"])
def test_append_to_a_layer_leaves_the_others(implementation, layer):
    lengths = [[7, 0, S, 2], [0, 3, S - 5, 9], [30, 1, 0, 11]]
    cache, (key, value) = filled(lengths), tokens(5)
    at = {1: 1, -1: L - 1, "traced": 2}[layer]
    expected = appended(cache, key, value, [5, 1, 0, 4], at)
    counts = jnp.array([5, 1, 0, 4])
    if layer == "traced":
        got = jitted_append(cache, key, value, counts, jnp.int32(at), implementation=implementation)
    else:
        got = cache.append(key, value, query_seq_lengths=counts, layer=layer, implementation=implementation)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("layer", [None, 1])
def test_an_append_of_several_programs_a_row(implementation, layer):
    """8 x 256 columns are eight tokens of a program, so 17 are three programs': padding, no room, an exact fit, and a row that had
    overflowed before. What is no token is NaN."""
    T, lengths, counts = 17, [0, 3, S - 16, S - 17, 5], [17, 9, 17, 17, 4]
    rng = np.random.default_rng(0)
    stack, at = ((), ()) if layer is None else ((3,), (layer,))
    contents = (jnp.asarray(rng.standard_normal((*stack, 5, S, 8, 256)), jnp.float16) for _ in range(2))
    length, flags = np.full((*stack, 5), 2, np.int32), np.zeros((*stack, 5), bool)
    length[at], flags[at] = lengths, [False] * 4 + [True]
    cache = KVCache(*contents, jnp.asarray(length), jnp.asarray(flags))
    real = (np.arange(T) < np.array(counts)[:, None])[:, :, None, None]
    new = [jnp.where(real, rng.standard_normal((5, T, 8, 256)), np.nan).astype(jnp.float16) for _ in range(2)]
    traced = None if layer is None else jnp.int32(layer)
    got, expected = (
        jitted_append(cache, *new, jnp.array(counts), traced, implementation=implementation),
        appended(cache, *new, counts, layer),
    )
    np.testing.assert_array_equal(expected.overflowed[at], [False, False, True, False, True])
    assert_same_bits(got, expected)


def test_the_callers_arrays_are_untouched(implementation):
    """Every method returns a new cache, though a kernel writes in place."""
    cache, new = filled([0, 3, 20, S - 5], overflowed=[False, True, False, False]), tokens(5)
    before = bits((cache, new))
    jitted_append(cache, *new, implementation=implementation)
    cache.reset(1).append(*new, implementation=implementation)
    with pytest.raises(CacheOverflowError):
        cache.append(*new, implementation=implementation)
    cache.truncate(2)
    cache.reset()
    chex.assert_trees_all_equal(bits((cache, new)), before)


# --- overflow


def test_an_exact_fit_is_fine_and_one_more_is_not(implementation):
    cache, (key, value) = filled([S - 5, 0, 0, 0]), tokens(6)
    fits = cache.append(key, value, query_seq_lengths=jnp.array([5, 6, 0, 1]), implementation=implementation)
    assert_same_bits(fits, appended(cache, key, value, [5, 6, 0, 1]))
    np.testing.assert_array_equal(fits.length, [S, 6, 0, 1])
    fits.check()
    with pytest.raises(CacheOverflowError, match=rf"capacity {S}; rows \[0\]"):
        cache.append(key, value, query_seq_lengths=jnp.array([6, 6, 0, 1]), implementation=implementation)
    whole = KVCache.create(B, 6, K, H, value_head_dim=Hv, dtype=jnp.float32).append(key, value, implementation=implementation)
    assert_same_bits((whole.key, whole.value), (key, value))
    with pytest.raises(CacheOverflowError, match=r"rows \[0, 1, 2, 3\]"):
        whole.append(key[:, :1], value[:, :1], implementation=implementation)
    # A full row has room for no token at all.
    nothing = whole.append(key[:, :1], value[:, :1], query_seq_lengths=jnp.zeros(B, jnp.int32), implementation=implementation)
    assert_same_bits(nothing, whole)


@pytest.mark.parametrize("lengths", [[S - 4, 3, S, S - 3], [[0, 0, 0, 0], [S - 4, 3, S, S - 3], [S, S, S, S]]], ids=["plain", "stacked"])
def test_without_jit_an_overflow_raises_before_anything_is_written(implementation, lengths):
    cache, (key, value) = filled(lengths), tokens(5)
    layer = None if cache.layers is None else 1
    before = bits(cache)
    with pytest.raises(
        CacheOverflowError, match=rf"^expected room for up to 5 more tokens in every row of a cache of capacity {S}; rows \[0, 2, 3\]"
    ):
        cache.append(key, value, layer=layer, implementation=implementation)
    query = jnp.ones((B, 5, K, H), jnp.float32)
    with pytest.raises(CacheOverflowError, match=r"rows \[0, 2, 3\]"):
        attention_with_kv_cache(query, key, value, cache, layer=layer, implementation=implementation)
    chex.assert_trees_all_equal(bits(cache), before)


@pytest.mark.parametrize("T", [1, 5, S + 3])
def test_under_jit_a_row_without_room_is_flagged_and_keeps_what_it_has(implementation, T):
    """All or nothing, row by row: the others get their tokens as if nothing had happened."""
    lengths = [S - T + 1 if T < S else 0, 3, S, 0]
    counts = [T, min(T, 20), 1, 0]
    cache, (key, value) = filled(lengths), tokens(T)
    got = jitted_append(cache, key, value, jnp.array(counts), implementation=implementation)
    assert_same_bits(got, appended(cache, key, value, counts))
    np.testing.assert_array_equal(got.overflowed, [True, False, True, False])
    np.testing.assert_array_equal(got.length, [lengths[0], 3 + counts[1], S, 0])


@pytest.mark.parametrize("T", [1, 130])
@pytest.mark.parametrize(("layer", "meant"), [(-1, 2), (-3, 0), (3, 2), (-4, 0), (1000, 2), (-1000, 0)])
def test_a_traced_layer_counts_from_the_end_and_is_clamped(implementation, layer, meant, T):
    """One rule for keys, values, lengths and what is read, whoever computes it (130 tokens are more than one program's): a layer is
    never half of one and half of another."""
    empty = KVCache.create(2, 140, 2, 64, layers=3, dtype=jnp.float32)
    query, key, value = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, T, 2, 64), np.float32))

    @jax.jit
    def step(layer):
        return attention_with_kv_cache(query, key, value, empty, layer=layer, implementation=implementation, return_lse=True)

    got = step(jnp.int32(layer))
    chex.assert_trees_all_equal(got, step(jnp.int32(meant)))
    np.testing.assert_array_equal(got[2].length, np.where(np.arange(3)[:, None] == meant, T, 0).repeat(2, axis=1))
    np.testing.assert_array_equal(np.any(got[2].key != 0, axis=(1, 2, 3, 4)), np.arange(3) == meant)


def test_overflow_of_one_layer_is_of_that_layer(implementation):
    cache, (key, value) = filled([[S, 0, 0, 0], [S - 4, 3, S, 30], [0, S, S, S]]), tokens(5)
    got = jitted_append(cache, key, value, None, jnp.int32(1), implementation=implementation)
    assert_same_bits(got, appended(cache, key, value, [5] * B, 1))
    np.testing.assert_array_equal(got.overflowed, [[False] * B, [True, False, True, False], [False] * B])
    with pytest.raises(CacheOverflowError, match=r"rows \[0, 2\]"):
        got.check()


def test_overflow_is_sticky(implementation):
    """A row that has lost tokens takes no others, not even those that would fit; nor, without jit, none at all."""
    cache = filled([20, 20, 3, 0], overflowed=[True, False, False, False])
    key, value = tokens(1)
    for counts in ([1, 1, 1, 0], [0, 1, 0, 0]):
        got = jitted_append(cache, key, value, jnp.array(counts), implementation=implementation)
        assert_same_bits(got, appended(cache, key, value, counts))
        np.testing.assert_array_equal(got.overflowed, [True, False, False, False])
        with pytest.raises(CacheOverflowError, match=r"rows \[0\]"):
            cache.append(key, value, query_seq_lengths=jnp.array(counts), implementation=implementation)
    with pytest.raises(CacheOverflowError, match=rf"^expected every row within the capacity of {S}; rows \[0\]"):
        got.check()


def test_check_is_for_a_cache_that_is_there():
    cache = filled([1, 2, 3, S], overflowed=[False, False, False, True])
    filled([1, 2, 3, S]).check()
    with pytest.raises(CacheOverflowError, match=r"rows \[3\]"):
        cache.check()
    with pytest.raises(ArgumentError, match="outside jit"):
        jax.jit(KVCache.check)(cache)


# --- truncate and reset


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "to", [5, 0, -4, S + 9, np.array([3, 3, 25, 0]), np.array([-1, 99, S, 2]), np.array([[0, 1, 2, 3]] * 2 + [[31, 0, 0, 9]])], ids=str
)
def test_truncate_forgets_what_lies_behind(to, stacked, jitted):
    """Rows that are shorter stay; an overflowed row is whole again iff it holds all that is asked for; no slot is touched."""
    if np.ndim(to) == 2 and not stacked:
        to = to[0]
    cache = filled(LENGTHS if stacked else LENGTHS[0], overflowed=FLAGS if stacked else FLAGS[0])
    got = (jax.jit(KVCache.truncate) if jitted else KVCache.truncate)(cache, to)
    length, asked = np.array(cache.length), np.broadcast_to(np.maximum(to, 0), cache.length.shape)
    expected = KVCache(cache.key, cache.value, length.copy(), np.array(cache.overflowed))
    for row in np.ndindex(length.shape):
        expected.length[row] = min(length[row], asked[row])
        expected.overflowed[row] = cache.overflowed[row] and asked[row] > length[row]
    assert_same_bits(got, expected)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("rows", "emptied"),
    [
        (None, [0, 1, 2, 3]),
        (2, [2]),
        (-1, [3]),
        (slice(1, 3), [1, 2]),
        (np.array([0, 3]), [0, 3]),
        (np.array([True, False, False, True]), [0, 3]),
        (np.array([False] * B), []),
    ],
    ids=str,
)
def test_reset_empties_rows_in_all_layers(rows, emptied, stacked, jitted):
    """Also under jit with the rows traced, as a server that frees the batch's finished slots has them."""
    cache = filled(LENGTHS if stacked else LENGTHS[0], overflowed=FLAGS if stacked else FLAGS[0])
    arguments = () if rows is None else (rows,)
    if jitted and not isinstance(rows, slice):
        got = jax.jit(KVCache.reset)(cache, *arguments)
    elif jitted:
        got = jax.jit(lambda cache: cache.reset(rows))(cache)
    else:
        got = cache.reset(*arguments)
    length, overflowed = np.array(cache.length), np.array(cache.overflowed)
    for b in emptied:
        length[..., b], overflowed[..., b] = 0, False
    assert_same_bits(got, KVCache(cache.key, cache.value, length, overflowed))


def test_after_truncate_and_reset_tokens_are_written_over(implementation):
    """Roll back speculated tokens, give a slot to another sequence, and go on."""
    cache = filled([20, S, 3, S - 1], overflowed=[False, True, False, False])
    cache = cache.truncate(jnp.array([18, S, 9, 30])).reset(jnp.array([2]))
    np.testing.assert_array_equal(cache.length, [18, S, 0, 30])
    assert not np.any(cache.overflowed)
    key, value = tokens(5)
    counts = [5, 0, 4, 5]
    got = cache.append(key, value, query_seq_lengths=jnp.array(counts), implementation=implementation)
    assert_same_bits(got, appended(cache, key, value, counts))
    assert_same_bits(got.key[0, 18:23], key[0])
    assert_same_bits(got.key[2, :4], key[2, :4])


# --- numbers and arrays that are no jax.Array of int32


@pytest.mark.parametrize("most", [2**31 - 1, 2**31, 2**32 + 2, 2**63 - 1])
def test_lengths_that_do_not_fit_32_bits_are_clamped_and_not_wrapped(implementation, most):
    cache, new = filled([3, 3, 3, 3]), tokens(2)
    np.testing.assert_array_equal(cache.truncate(most).length, 3)
    np.testing.assert_array_equal(cache.truncate(-most).length, 0)
    np.testing.assert_array_equal(cache.truncate(np.array([1, most, -most, 2])).length, [1, 3, 0, 2])
    got = cache.append(*new, query_seq_lengths=np.array([1, most, -most, 2]), implementation=implementation)
    np.testing.assert_array_equal(got.length, [4, 5, 3, 5])


def test_a_cache_of_numpy_arrays(implementation):
    """A checkpoint that was read back, or what `jax.device_get` gives."""
    cache, new = filled([0, 3, 20, S - 5]), tokens(5)
    got = jax.device_get(cache).append(*new, implementation=implementation)
    assert_same_bits(got, cache.append(*new, implementation=implementation))
    chex.assert_trees_all_equal(jax.device_get(cache).truncate(2).reset(1).length, cache.truncate(2).reset(1).length)


@pytest.mark.parametrize("none", [[], (), np.array([], int), jnp.array([], jnp.int32)], ids=repr)
def test_reset_of_no_rows_changes_nothing(none):
    cache = filled([0, 3, 20, 7])
    assert_same_bits(cache.reset(none), cache)


def test_a_cache_is_itself():
    """Compared and hashed as an object: its arrays cannot be."""
    cache = filled([0, 3, 20, 7])
    assert cache == cache
    assert cache != filled([0, 3, 20, 7])
    assert len({cache, cache}) == 1
