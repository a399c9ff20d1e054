"""JAX's transformations around `attention_with_kv_cache`: vmap, checkpoint, shard_map, and loops with a donated cache."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    assert_holds,
    assert_same,
    assert_same_bits,
    attend,
    differentiate,
    forward_errors,
    options_of,
    split_at,
    tail,
)
from derivatives import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from flashcore_jax import CacheOverflowError, KVCache, attention_with_kv_cache
from flashcore_jax.testing import Workload, inputs, oracle


def test_vmap(implementation):
    """Over a second batch axis: two caches, and each call's own lengths. One row overflows in one of them."""
    case, T = "bfloat16, 4:2", 7
    lengths, counts = ([0, 283, 20, 5], [284, 1, 130, 11]), np.array([[7, 7, 1, 0], [7, 2, 7, 1]])
    calls, exact = [], []
    for seed in range(2):
        fits = np.where(np.add(lengths[seed], counts[seed]) <= 290, counts[seed], 0)
        w, _ = tail(case, T, lengths[seed], fits)
        arrays = inputs(w, seed)
        exact.append(oracle(arrays, **w.options))
        calls.append((arrays.query, *split_at(arrays, lengths[seed], counts[seed], T), jnp.asarray(counts[seed], jnp.int32)))
    options = options_of(w, implementation)

    def call(query, cache, new, counts):
        return attend(query, *new, cache, counts, options=options)

    got = jax.jit(jax.vmap(call))(*jax.tree.map(lambda *x: jnp.stack(x), *calls))
    np.testing.assert_array_equal(got[1].overflowed, [[False] * 4, [True, False, False, False]])
    for i, rows in enumerate((slice(0, 4), slice(1, 4))):
        mapped, (alone, cache) = jax.tree.map(lambda x, i=i: x[i], got), call(*calls[i])
        chex.assert_trees_all_equal(mapped[1], cache)
        pick = functools.partial(jax.tree.map, lambda x, rows=rows: x[rows])
        assert_same(pick(mapped[0]), pick(alone), pick(exact[i]), implementation)
        assert forward_errors(pick(mapped[0]), pick(exact[i])) <= 1.0
    assert np.all(np.isnan(got[0][0][1, 0]))


def test_donation_in_a_loop(implementation):
    """A donated stack of caches, carried through a while_loop: what the loop leaves is right, and lies where the cache lay."""
    lengths, T = np.array([18, 3]), 6
    w = Workload("loop", 2, T, 24, 2, 1, 16, 16, "float32", is_causal=True, query_seq_lengths=(6, 6), key_value_seq_lengths=(24, 9))
    arrays, options = inputs(w), options_of(w, implementation)
    cache, new = split_at(arrays, lengths, [T, T], T)
    stack = jax.tree.map(lambda x: jnp.stack([x[::-1], x]), cache)
    first_layer = jax.tree.map(np.array, cache)

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(stack):
        def step(state):
            t, stack, outs, lses = state
            one = (jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in (arrays.query, *new))
            (out, lse), stack = attend(*one, stack, layer=jnp.int32(1), options=options)
            return t + 1, stack, *(jax.lax.dynamic_update_slice_in_dim(a, b, t, 1) for a, b in ((outs, out), (lses, lse)))

        nothing = jnp.zeros((2, T, 2, 16)), jnp.zeros((2, T, 2))
        return jax.lax.while_loop(lambda state: state[0] < T, step, (0, stack, *nothing))

    addresses = [x.unsafe_buffer_pointer() for x in (stack.key, stack.value)]
    _, after, *got = loop(stack)
    assert stack.key.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in (after.key, after.value)] == addresses
    assert forward_errors(got, oracle(arrays, **w.options)) <= 1.0
    assert_holds(jax.tree.map(lambda x: x[1], after), arrays, [24, 9])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0, ::-1], after), first_layer)


# --- where a gradient is taken

SMALL = Workload(
    "small", 4, 3, 24, 2, 1, 16, 16, "float32", is_causal=True,
    query_seq_lengths=(3, 3, 0, 2), key_value_seq_lengths=(24, 3, 9, 7),
)  # fmt: skip


def arguments_of(w: Workload):
    """For `differentiate`."""
    arrays, counts = inputs(w), np.array(w.query_seq_lengths)
    cache, new = split_at(arrays, w.key_value_seq_lengths - counts, counts, w.T)
    return arrays.query, new, cache, jnp.asarray(counts, jnp.int32), (arrays.out_cotangent, arrays.lse_cotangent)


def test_checkpoint(implementation):
    """The append and the attention run again in the backward pass: the same gradients."""
    run = functools.partial(differentiate, *arguments_of(SMALL), options=options_of(SMALL, implementation))
    (_, gradients), (_, expected) = run(remat=True), run()
    assert_close(gradients, expected)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("layers", [None, 3])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=lambda axis_type: axis_type.name)
def test_a_mesh(mesh_of, implementation, axis_type, layers, jitted):
    """Rows and heads shared out: the results and the cache to the bit, laid out as they were."""
    mesh = mesh_of(axis_type)
    B, S, K, H = 4, 20, 2, 16
    rng = np.random.default_rng(0)
    query, *new = (jnp.asarray(rng.standard_normal((B, 5, heads, H), np.float32)) for heads in (2 * K, K, K))
    cache = KVCache.create(B, S, K, H, layers=layers, dtype=jnp.float32)
    stack = () if layers is None else (None,)

    def step(query, key, value, cache):
        return attention_with_kv_cache(
            query, key, value, cache, layer=None if layers is None else jnp.int32(1), query_seq_lengths=jnp.array([5, 3, 0, 1]),
            implementation=implementation, return_lse=True,
        )  # fmt: skip

    tokens, slots, rows = (NamedSharding(mesh, P(*spec)) for spec in (("x", None, "y"), (*stack, "x", None, "y"), (*stack, "x")))
    sharded = jax.device_put(cache, KVCache(slots, slots, rows, rows))
    got = (jax.jit(step) if jitted else step)(*jax.device_put((query, *new), tokens), sharded)
    assert_same_bits(got, step(query, *new, cache))
    for x, sharding in zip(jax.tree.leaves((got[0], got[2])), (tokens, slots, slots, rows, rows), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    if axis_type == AxisType.Explicit:
        assert jax.typeof(got[0]).sharding.spec == P("x", None, "y", None)
    full = got[2].append(*(x[:, :1] for x in new), layer=None if layers is None else 1, implementation=implementation)
    assert int(full.length.max()) == 6
    with pytest.raises(CacheOverflowError, match=r"rows \[0\]"):  # known without a jit here too
        full.append(
            *(jnp.concatenate([x] * 4, axis=1)[:, :16] for x in new), layer=None if layers is None else 1, implementation=implementation
        )


@pytest.mark.parametrize("layout", [(), ("x",), (None, "x"), (None, None, "x")], ids=str)
def test_a_caches_layout_is_kept_in_a_loop(mesh_of, implementation, layout):
    """As a carry must: tokens that are laid out otherwise, over rows and heads, come to it."""
    mesh = mesh_of(AxisType.Explicit)
    B, S, K, H = 2, 8, 2, 16
    query, key, value = (jnp.asarray(np.random.default_rng(0).standard_normal((B, 1, heads, H), np.float32)) for heads in (2 * K, K, K))

    @jax.jit
    def decode(cache, query, key, value):
        def step(cache, _):
            out, cache = attention_with_kv_cache(query, key, value, cache, implementation=implementation)
            return cache, out

        return jax.lax.scan(step, cache, None, length=3)

    with jax.set_mesh(mesh):
        cache = KVCache.create(B, S, K, H, dtype=jnp.float32)
        expected = decode(cache, query, key, value)
        if layout:
            slots = NamedSharding(mesh, P(*layout))
            rows = NamedSharding(mesh, P(*layout[:1]))
            cache = jax.device_put(cache, KVCache(slots, slots, rows, rows))
        for spec in (P("x"), P(None, None, "x")):
            over = NamedSharding(mesh, spec)
            after, out = decode(cache, *jax.device_put((query, key, value), over))
            assert_close(out, expected[1])
            np.testing.assert_array_equal(after.key, expected[0].key)


def test_shard_map_over_the_batch(implementation):
    """Two devices, each with its rows of the cache: the outputs, the gradients and the cache of the whole."""
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    # The interpreter's loops mix varying and unvarying values, which shard_map's check refuses; compiled kernels pass it.
    check = not (implementation == "triton" and jax.default_backend() == "cpu")
    arguments, options = arguments_of(SMALL), options_of(SMALL, implementation)

    def run(query, new, cache, counts, cotangents):
        after = attend(query, *new, cache, counts, options=options)[1]
        return *differentiate(query, new, cache, counts, cotangents, options=options), after

    sharded = jax.device_put(arguments, NamedSharding(mesh, P("x")))
    shard = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=check))
    (got, gradients, after), (whole, *expected) = shard(*sharded), run(*arguments)
    assert_same(got, whole, oracle(inputs(SMALL), **SMALL.options), implementation)
    assert_close(gradients, expected[0])
    assert_same_bits(after, expected[1])
