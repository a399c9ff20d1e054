"""`KVCache` itself: what append, truncate and reset leave in it, what overflows, and JAX's transformations around them."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax import ArgumentError, CacheOverflowError, DtypeError, KVCache, OptionError, ShapeError, attention_with_kv_cache

# 37 slots are no whole number of a kernel's tiles; 40 and 24 columns are held as 32 + 8 and 16 + 8, with padding behind.
B, S, K, H, Hv, L = 4, 37, 2, 40, 24, 3


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
    with pytest.raises(CacheOverflowError, match=rf"^expected room for 5 more tokens in a cache of capacity {S}; rows \[0, 2, 3\]"):
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

LENGTHS = [[7, 0, S, 2], [0, 3, 20, 9], [30, 1, 0, 11]]
FLAGS = [[True, False, True, False], [False, True, True, False], [True, False, False, True]]


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


@pytest.mark.parametrize(
    "length", [np.array([1, 2]), np.zeros((2, B), np.int32), np.zeros((L, 1, B), np.int32)], ids=lambda x: str(x.shape)
)
def test_truncate_refuses_lengths_of_another_shape(length):
    """They would give a cache whose lengths are not its rows'."""
    with pytest.raises(ArgumentError):
        filled(LENGTHS[0]).truncate(length)


@pytest.mark.parametrize("shape", [(B - 1,), (B, 1), (1, B)], ids=str)
def test_reset_refuses_masks_of_another_shape(shape):
    with pytest.raises(ArgumentError):
        filled(LENGTHS[0]).reset(np.ones(shape, bool))


# --- JAX's transformations


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


# --- mistakes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


RIGHT = {"key": array(B, 5, K, H), "value": array(B, 5, K, Hv)}
WRONG = [
    ("key without batch", {"key": array(5, K, H)}, ShapeError, "[B, T, K, H]"),
    ("another batch", {"key": array(B + 1, 5, K, H)}, ShapeError, str(B + 1)),
    ("more heads", {"value": array(B, 5, 2 * K, Hv)}, ShapeError, "[B, T, K, Hv]"),
    ("key's head dim for value", {"value": array(B, 5, K, H)}, ShapeError, "[B, T, K, Hv]"),
    ("another dtype of key", {"key": array(B, 5, K, H, dtype=jnp.bfloat16)}, DtypeError, "bfloat16"),
    ("another dtype of value", {"value": array(B, 5, K, Hv, dtype=jnp.float16)}, DtypeError, "float16"),
    ("fewer values than keys", {"value": array(B, 4, K, Hv)}, ShapeError, "(5, 4)"),
    ("no tokens", {"key": array(B, 0, K, H), "value": array(B, 0, K, Hv)}, ShapeError, "T >= 1"),
    ("a list", {"key": [[1.0]]}, ShapeError, "[B, T, K, H]"),
    ("lengths of another batch", {"query_seq_lengths": array(B - 1, dtype=jnp.int32)}, ShapeError, f"({B - 1},)"),
    ("one length", {"query_seq_lengths": array(dtype=jnp.int32)}, ShapeError, "int32[B]"),
    ("lengths as floats", {"query_seq_lengths": array(B)}, DtypeError, "float32"),
    ("a layer of none", {"layer": 0}, OptionError, "layers="),
    ("an unknown implementation", {"implementation": "cuda"}, OptionError, "'cuda'"),
]
STACKED = [
    ("no layer", {}, OptionError, "layer="),
    ("a layer too high", {"layer": L}, OptionError, str(L)),
    ("a layer too low", {"layer": -L - 1}, OptionError, str(-L - 1)),
    ("layer 1.0", {"layer": 1.0}, OptionError, "1.0"),
    ("layer True", {"layer": True}, OptionError, "True"),
    ("two layers", {"layer": array(2, dtype=jnp.int32)}, OptionError, "scalar"),
    ("a layer as a float array", {"layer": array()}, OptionError, "scalar"),
]


@pytest.mark.parametrize(
    ("layers", "changed", "error", "words"), [(None, *row[1:]) for row in WRONG] + [(L, *row[1:]) for row in STACKED],
    ids=[row[0] for row in WRONG + STACKED],
)  # fmt: skip
def test_wrong_arguments_of_append(layers, changed, error, words):
    cache = KVCache.create(B, S, K, H, value_head_dim=Hv, layers=layers, dtype=jnp.float32)
    arguments = RIGHT | changed
    arrays = {name: a for name, a in arguments.items() if hasattr(a, "shape")}
    static = {name: a for name, a in arguments.items() if name not in arrays}
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda **arrays: cache.append(**arrays, **static), **arrays)
    message = str(raised.value)
    assert words in message
    assert message.startswith("expected ")
    assert message.count("; got ") == 1


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"batch": 0}, OptionError),
        ({"capacity": 0}, OptionError),
        ({"capacity": 10.0}, OptionError),
        ({"kv_heads": 0}, OptionError),
        ({"layers": 0}, OptionError),
        ({"head_dim": 12}, ShapeError),
        ({"head_dim": 264}, ShapeError),
        ({"value_head_dim": 0}, ShapeError),
        ({"dtype": jnp.int8}, DtypeError),
    ],
    ids=str,
)
def test_wrong_arguments_of_create(changed, error):
    with pytest.raises(error, match=r"^expected .*; got .*; ") as raised:
        KVCache.create(**{"batch": 2, "capacity": 10, "kv_heads": 2, "head_dim": 16} | changed)
    assert isinstance(raised.value, ArgumentError)
