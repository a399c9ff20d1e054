"""What means something on a GPU only about the cache: decode has prefill's bits however the tokens are cut, and nothing moves."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import forward_errors

import flashcore_jax
from flashcore_jax import KVCache
from flashcore_jax.testing import Inputs, Workload, inputs, oracle

pytestmark = pytest.mark.gpu
# Prefill and decode have the same bits in 16 bits, and on Hopper in float32.
DTYPES = ["bfloat16", "float16"]
IN_FLOAT32 = functools.partial(pytest.param, "float32", marks=pytest.mark.hopper)

# By the implementations that are chosen by default: on Hopper a prefill is another one's than a decode step.
attention = functools.partial(flashcore_jax.attention, is_causal=True, return_lse=True)
with_cache = functools.partial(flashcore_jax.attention_with_kv_cache, return_lse=True)


def arrays_of(n, N=8, K=2, H=128, dtype="bfloat16", B=2):
    return inputs(Workload("gpu cache", B, n, n, N, K, H, H, dtype))[:3]


@functools.partial(jax.jit, static_argnames="options")
def whole(query, key, value, lengths, options=()):
    return attention(query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths, **dict(options))


@functools.partial(jax.jit, static_argnames=("T", "options"))
def last_tokens(query, key, value, length, T, options=()):
    """Out and lse of the last T tokens of each row, appended to a cache that holds those before them; poison is behind."""
    S = key.shape[1]
    start = length - T
    new = tuple(jax.vmap(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, T))(x, start) for x in (query, key, value))
    held = (jnp.arange(S) < start[:, None])[:, :, None, None]
    cache = KVCache(*(jnp.where(held, x, jnp.nan) for x in (key, value)), start, jnp.zeros(start.shape, bool))
    return with_cache(*new, cache, **dict(options))[:2]


@functools.partial(jax.jit, static_argnames=("size", "options"))
def chunked(query, key, value, size, options=()):
    """The whole sequence through the cache, `size` tokens at a time."""
    B, n, K, H = key.shape
    cache = KVCache.create(B, n, K, H, dtype=key.dtype)

    def step(cache, chunk):
        out, lse, cache = with_cache(*chunk, cache, **dict(options))
        return cache, (out, lse)

    many = n // size
    chunks = tuple(x[:, : many * size].reshape(B, many, size, *x.shape[2:]).swapaxes(0, 1) for x in (query, key, value))
    cache, results = jax.lax.scan(step, cache, chunks)
    results = tuple(x.swapaxes(0, 1).reshape(B, many * size, *x.shape[3:]) for x in results)
    if many * size < n:
        cache, rest = step(cache, tuple(x[:, many * size :] for x in (query, key, value)))
        results = tuple(jnp.concatenate(pair, axis=1) for pair in zip(results, rest, strict=True))
    return *results, cache


def rows_at(results, length, T):
    """The last T tokens of each row of (out, lse)."""
    return jax.tree.map(lambda x: jnp.stack([x[b, n - T : n] for b, n in enumerate(length)]), results)


@pytest.mark.parametrize(("dtype", "heads"), [*itertools.product(DTYPES, [(4, 4), (8, 2), (8, 1)]), IN_FLOAT32((8, 2))])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_equals_prefill(head_dim, dtype, heads):
    """Around every boundary of block, split and capacity, up to 16k: one token, and a few."""
    n = 16384
    arrays = arrays_of(n, *heads, head_dim, dtype)
    full = whole(*arrays, jnp.array([n, n]))
    for length in (
        (1, 2),
        (64, 63),
        (65, 128),
        (129, 500),
        (2047, 2048),
        (2049, 4095),
        (4096, 4097),
        (6144, 8191),
        (8193, 16383),
        (16384, 16321),
    ):
        for T in (1, 5):
            if min(length) >= T:
                got = last_tokens(*arrays, jnp.array(length), T)
                chex.assert_trees_all_equal(got, rows_at(full, length, T), custom_message=f"lengths {length}, {T} tokens")


@pytest.mark.parametrize(
    ("dtype", "head_dim", "heads"),
    [
        *((dtype, *case) for dtype in DTYPES for case in ((64, (8, 8)), (128, (8, 2)), (256, (8, 1)), (96, (6, 2)))),
        IN_FLOAT32(96, (6, 2)),
    ],
)
def test_every_chunking_equals_the_whole(dtype, head_dim, heads):
    n = 2500
    arrays = arrays_of(n, *heads, head_dim, dtype)
    full = whole(*arrays, jnp.array([n, n]))
    for size in (1, 7, 16, 64, 100, 1000):
        *got, cache = chunked(*arrays, size)
        chex.assert_trees_all_equal(tuple(got), full, custom_message=f"{size} tokens at a time")
        chex.assert_trees_all_equal((cache.key, cache.value), arrays[1:])


@pytest.mark.parametrize("options", [(("local_window_size", (700, 0)),), (("logits_soft_cap", 5.0),), (("split_size", 128),)], ids=str)
def test_chunkings_with_options(options):
    n = 2500
    arrays = arrays_of(n)
    full = whole(*arrays, jnp.array([n, n]), options=options)
    for size in (1, 13, 300):
        *got, _ = chunked(*arrays, size, options=options)
        chex.assert_trees_all_equal(tuple(got), full)


def test_the_equality_can_fail():
    """Another order of additions is as right, and has other bits: what the tests above compare is not trivially equal."""
    n = 8000
    query, key, value = arrays_of(n)
    full = rows_at(whole(query, key, value, jnp.array([n, n])), (n, n), 5)
    last = query[:, -5:]
    exact = oracle(Inputs(last, key, value, jnp.zeros_like(last), jnp.zeros(last.shape[:3])), is_causal=True)
    for split_size in (1024, None):
        got = last_tokens(query, key, value, jnp.array([n, n]), 5, options=(("split_size", split_size),))
        assert forward_errors(got, exact) <= 1
        assert not all(jnp.array_equal(a, b) for a, b in zip(got, full, strict=True))


@pytest.mark.parametrize("T", [1, 16, 100])
def test_a_row_alone_equals_the_row_in_a_batch(T):
    B, S = 64, 4096
    query, key, value = arrays_of(S, K=4, B=B)  # so many programs that rows are taken by their lengths
    length = np.random.default_rng(0).integers(T, S, B)
    together = last_tokens(query, key, value, jnp.asarray(length, jnp.int32), T)
    for b in (0, 17, 63):
        alone = last_tokens(*(x[b : b + 1] for x in (query, key, value)), jnp.asarray(length[b : b + 1], jnp.int32), T)
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda x, b=b: x[b : b + 1], together))


@pytest.mark.parametrize("T", [1, 100])
def test_the_capacity_changes_nothing(T):
    small = arrays_of(4096, B=1)
    large = tuple(jnp.pad(x, ((0, 0), (0, 61440), (0, 0), (0, 0)), constant_values=np.nan) for x in small)
    for length in (T, 3000, 4096):
        chex.assert_trees_all_equal(*(last_tokens(*arrays, jnp.array([length]), T) for arrays in (small, large)))


def test_a_thousand_repeats_of_a_step():
    arrays = arrays_of(8192)
    run = functools.partial(last_tokens, *arrays, jnp.array([8192, 5000]), 1)
    first = run()
    same = jax.jit(lambda a, b: jnp.stack([jnp.all(x == y) for x, y in zip(a, b, strict=True)]))
    assert np.all(np.stack([same(first, run()) for _ in range(1000)]))


def test_a_layer_of_a_stack_equals_a_cache_of_its_own():
    B, S, K, H, layers = 2, 3000, 2, 128, 3
    arrays = [arrays_of(S, K=K, H=H, B=B)] + [tuple(x[:, ::-1] for x in arrays_of(S, K=K, H=H, B=B)) for _ in range(layers - 1)]
    step = jax.jit(with_cache)
    own = [KVCache.create(B, S, K, H) for _ in range(layers)]
    stack = KVCache.create(B, S, K, H, layers=layers)
    for start, stop in ((0, 2900), (2900, 2901), (2901, 2910)):
        for layer in range(layers):
            chunk = tuple(x[:, start:stop] for x in arrays[layer])
            *expected, own[layer] = step(*chunk, own[layer])
            *got, stack = step(*chunk, stack, layer=jnp.int32(layer))
            chex.assert_trees_all_equal(got, expected)
    chex.assert_trees_all_equal(stack, jax.tree.map(lambda *x: jnp.stack(x), *own))


def test_a_donated_cache_stays_where_it_is():
    step = jax.jit(with_cache, donate_argnames="cache")
    for layers, layer in ((None, None), (4, jnp.int32(2))):
        cache = KVCache.create(2, 1000, 2, 128, layers=layers)
        query, key, value = arrays_of(1)
        before = [x.unsafe_buffer_pointer() for x in (cache.key, cache.value)]
        for _ in range(3):
            *_, cache = step(query, key, value, cache=cache, layer=layer)
        assert [x.unsafe_buffer_pointer() for x in (cache.key, cache.value)] == before
        assert cache.length.max() == 3


@pytest.mark.parametrize("layers", [None, 2])
def test_a_cache_of_more_than_2_to_the_31_elements(layers):
    """The last row of the last layer, as if it stood alone, to the bit. Keys repeat after 4099, a prime: an address that wraps
    around meets other numbers."""
    if jax.devices()[0].memory_stats()["bytes_limit"] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    B, S, K, H = 4 if layers else 8, 65600, 32, 128
    assert (layers or 1) * B * S * K * H > 2**31
    query, key, value = arrays_of(4099, N=32, K=K, H=H, B=1)
    token = tuple(jnp.flip(x[:, :3], axis=-1) for x in (query, key, value))

    @functools.partial(jax.jit, static_argnames=("rows", "layers"))
    def run(rows, layers, length):
        stack = () if layers is None else (layers,)
        content = (jnp.broadcast_to(x[0, jnp.arange(S) % 4099], (*stack, rows, S, K, H)) for x in (key, value))
        cache = KVCache(*content, jnp.full((*stack, rows), length, jnp.int32), jnp.zeros((*stack, rows), bool))
        layer = None if layers is None else jnp.int32(layers - 1)
        out, lse, cache = with_cache(*(jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in token), cache, layer=layer)
        keys = cache.key if layers is None else cache.key[-1]
        return out[-1], lse[-1], jax.lax.dynamic_slice_in_dim(keys[-1], length, 3)

    for length in (3000, S - 3):
        got, expected = run(B, layers, length), run(1, None, length)
        chex.assert_trees_all_equal(got, expected)
        chex.assert_trees_all_equal(got[2], token[1][0])
