"""The Hopper kernels without a GPU: their own source, run by `hopper_simulator`, against float64."""

import dataclasses

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax import KVCache
from flashcore_jax.kernels.mosaic_gpu.schedule import schedule_of
from flashcore_jax.problem import problem_of
from flashcore_jax.rows import Rows, int32
from flashcore_jax.testing import Oracle, Results, Workload, assert_right, inputs, oracle
from flashcore_jax.tuning.gpus import gpu_of
from flashcore_jax.tuning.tiles import tiles_for

pytestmark = [pytest.mark.mosaic, pytest.mark.host]
GPU = dataclasses.replace(gpu_of("NVIDIA H200"), multiprocessors=2)  # so that a program has several tiles
ORDERS = ("fetching first", "fetching last", "at random")


def workload(T, S, N=2, K=1, H=64, dtype="bfloat16", B=1, Hv=None, **options) -> Workload:
    return Workload("simulated", B, T, S, N, K, H, Hv or H, dtype, **options)


_LENGTHS = {"B": 4, "query_seq_lengths": (200, 0, 77, 1), "key_value_seq_lengths": (264, 136, 65, 0)}
_SHORT = {"query_seq_lengths": (328, 200, 73), "key_value_seq_lengths": (30, 136, 64)}
_EVERYTHING = {"is_causal": True, "split_size": 128, "local_window_size": (100, 40), "logits_soft_cap": 5.0}
CALLS = {
    "causal": workload(264, 264, 4, 2, is_causal=True),
    "full, head dim 128": workload(200, 264, H=128),
    "a multiple of every tile": workload(384, 256, 1, 1),
    "136 queries, float16": workload(136, 128, H=128, dtype="float16", is_causal=True),
    "more queries than keys, causal": workload(328, 144, is_causal=True),
    "more keys than queries, causal, splits": workload(136, 456, 4, 1, is_causal=True, split_size=128),
    "splits, head dim 128": workload(200, 520, H=128, split_size=256),
    "window (50, 0)": workload(264, 264, is_causal=True, local_window_size=(50, 0)),
    "window (80, 20), splits": workload(264, 328, local_window_size=(80, 20), split_size=128),
    "window (0, 150), more queries than keys": workload(328, 200, local_window_size=(0, 150)),
    "scale below 0": workload(136, 136, scale=-0.2),
    "lengths": workload(200, 264, **_LENGTHS),
    "lengths, causal, splits, head dim 128": workload(200, 264, H=128, is_causal=True, split_size=128, **_LENGTHS),
    "everything": workload(200, 264, 4, 2, **_EVERYTHING, **_LENGTHS),
    "everything but lengths": workload(200, 264, 4, 2, **_EVERYTHING),
    "head dims 64 and 128, splits": workload(136, 264, H=64, Hv=128, is_causal=True, split_size=128),
    "head dims 128 and 64": workload(136, 264, H=128, Hv=64, is_causal=True),
    "head dim 256, splits": workload(136, 328, 4, 2, 256, is_causal=True, split_size=128),
    "head dim 256, everything": workload(200, 264, H=256, **_EVERYTHING, **_LENGTHS),
    "head dim 256, everything but lengths": workload(200, 264, H=256, **_EVERYTHING),
    "queries' lengths alone": workload(200, 136, B=3, query_seq_lengths=(200, 0, 129)),
    "keys' lengths alone, causal": workload(200, 264, B=3, is_causal=True, key_value_seq_lengths=(264, 137, 63)),
    "lengths 0 and 1": workload(136, 136, B=4, query_seq_lengths=(1, 0, 1, 64), key_value_seq_lengths=(1, 1, 0, 64)),
    "lengths, groups, more queries than keys, causal": workload(328, 136, 4, 2, B=3, is_causal=True, **_SHORT),
    "lengths, window (30, 20), head dim 128": workload(328, 136, H=128, B=3, local_window_size=(30, 20), **_SHORT),
    "lengths, head dim 256": workload(200, 264, 4, 2, 256, **_LENGTHS),
    "lengths, head dim 256, more queries than keys, causal, float16": workload(
        328, 136, H=256, dtype="float16", B=3, is_causal=True, **_SHORT
    ),
    "head dim 256, more queries than keys, causal": workload(272, 136, H=256, is_causal=True),
}


DECODES = {
    "a row": workload(1, 1104, 8, 2, 128, is_causal=True),
    "members of four, float16": workload(1, 1024, 4, 1, 64, "float16"),
    "rows of other length": workload(1, 1304, 4, 2, 128, B=3, is_causal=True, query_seq_lengths=(1, 1, 0), key_value_seq_lengths=(1304, 77, 900)),
    "no keys": workload(1, 1032, 3, 1, 128, B=2, is_causal=True, query_seq_lengths=(1, 1), key_value_seq_lengths=(0, 1)),
    "splits": workload(2, 2504, 4, 1, 128, is_causal=True, split_size=1024),
    "splits, lengths, a window": workload(
        3, 2504, 2, 1, 128, B=2, split_size=1024, is_causal=True, local_window_size=(1100, 0), logits_soft_cap=5.0,
        query_seq_lengths=(3, 2), key_value_seq_lengths=(2504, 1200),
    ),
    "head dims 128 and 256, scale below 0": workload(1, 1104, 2, 1, 128, Hv=256, scale=-0.2),
}  # fmt: skip


_MANY = {"is_causal": True, "query_seq_lengths": (1,) * 3}
SPLITS = {
    "one split": workload(1, 1032, 4, 1, 128, B=2, is_causal=True),
    "splits": workload(1, 1400, 16, 2, 128, split_size=512),
    "rows of other length": workload(1, 1304, 8, 2, 128, B=3, split_size=512, key_value_seq_lengths=(500, 1304, 1025), **_MANY),
    "no keys, no query, one split": workload(
        1, 1024, 3, 1, 128, B=3, is_causal=True, query_seq_lengths=(1, 1, 0), key_value_seq_lengths=(0, 65, 1024)
    ),
    "no keys, no query": workload(
        1, 1024, 3, 1, 128, B=3, is_causal=True, split_size=256, query_seq_lengths=(1, 1, 0), key_value_seq_lengths=(0, 1, 1024)
    ),
    "every row of the tile is real": workload(1, 1032, 64, 1, 128, split_size=512, is_causal=True),
    "a window that ends within a split, soft cap": workload(
        1, 1304, 16, 1, 128, B=3, split_size=256, local_window_size=(400, 0), logits_soft_cap=5.0, key_value_seq_lengths=(300, 1304, 700), **_MANY
    ),
    "float16, scale below 0, splits of the call's own": workload(1, 1400, 2, 2, 128, "float16", split_size=None, scale=-0.2),
}  # fmt: skip


@pytest.fixture
def simulated(monkeypatch):
    """(forward, backward) of the kernels, by the order in which warpgroups run."""
    import hopper_simulator

    from flashcore_jax.kernels.mosaic_gpu import backward, forward

    def run(order: str):
        hopper_simulator.install(monkeypatch, hopper_simulator.ORDERS[order]())
        return forward.forward, backward.backward

    return run


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", CALLS)
def test_output_log_sum_exp_and_gradients(simulated, name, order):
    w = CALLS[name]
    arrays, problem = poisoned(w)
    forward, backward = simulated(order)
    rows = Rows(*map(int32, w.lengths.values()))
    out, lse = forward(*arrays[:3], rows, problem, GPU)
    exact = oracle(arrays, **w.options)
    # What a query that sees no key has there must not count either.
    empty, dout, dlse = np.isneginf(exact.exact.lse), arrays.out_cotangent, arrays.lse_cotangent
    residuals = (jnp.where(empty[..., None], jnp.nan, out), lse)
    cotangents = (jnp.where(empty[..., None], jnp.nan, dout), jnp.where(empty, jnp.nan, dlse).swapaxes(1, 2))
    gradients = backward(*arrays[:3], rows, *residuals, *cotangents, problem, GPU)
    assert_right(Results(out, lse.swapaxes(1, 2), *gradients), exact)
    unseen = (exact.exact.dvalue == 0).all(axis=-1)
    for gradient, nothing in zip(gradients, (empty, unseen, unseen), strict=True):
        np.testing.assert_array_equal(gradient[nothing], 0.0)


def poisoned(w: Workload):
    """A call's arrays, with NaN beyond all lengths, and its problem."""
    arrays = beyond_the_lengths(inputs(w), w, np.nan)
    return arrays, problem_of(*arrays[:3], split_size=w.split_size, **{name: x for name, x in w.options.items() if x is not None})


def without_gradients(exact: Oracle):
    """What stands for them where they are not asked for."""
    return [jnp.asarray(x, jnp.bfloat16) for x in exact.exact[2:]]


def beyond_the_lengths(arrays, w: Workload, fill):
    """The arrays with `fill` where no valid query or key is."""

    def filled(x, lengths):
        if lengths is None:
            return x
        return jnp.where((jnp.arange(x.shape[1]) < lengths[:, None]).reshape(*x.shape[:2], *[1] * (x.ndim - 2)), x, fill)

    of_queries, of_keys = w.lengths.values()
    return type(arrays)(*map(filled, arrays, (of_queries, of_keys, of_keys, of_queries, of_queries)))


def test_rows_of_two_tiles_have_the_same_bits(simulated):
    """The last 128 of 328 queries, alone: other tiles, other warpgroups, the same keys in the same blocks and splits."""
    w = workload(328, 328, is_causal=True, split_size=128, local_window_size=(200, 0))
    query, key, value = inputs(w)[:3]
    forward, _ = simulated("fetching first")

    def last(T: int):
        x = query[:, -T:]
        problem = problem_of(x, key, value, is_causal=True, split_size=128, local_window_size=(200, 0))
        out, lse = forward(x, key, value, Rows(), problem, GPU)
        return out[:, -128:], lse[:, :, -128:]

    chex.assert_trees_all_equal(last(128), last(328))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", DECODES)
def test_decode(simulated, name, order):
    from flashcore_jax.kernels.mosaic_gpu.clusters import decode, plan_for

    w = DECODES[name]
    arrays, problem = poisoned(w)
    plan = plan_for(problem, gpu_of("NVIDIA H200"))
    assert plan, "the call must be for this kernel"
    if order != "fetching first":
        plan = dataclasses.replace(plan, stages=2)  # as few as there may be: each is used again and again
    simulated(order)
    out, lse = decode(*arrays[:3], Rows(*map(int32, w.lengths.values())), problem, plan)
    exact = oracle(arrays, **w.options)
    assert_right(Results(out, lse.swapaxes(1, 2), *without_gradients(exact)), exact)


@pytest.mark.parametrize("name", SPLITS)
def test_decode_by_splits(simulated, name):
    """On a GPU of one multiprocessor, on which few rows are many."""
    from flashcore_jax.kernels.mosaic_gpu import splits

    w = SPLITS[name]
    arrays, problem = poisoned(w)
    gpu = dataclasses.replace(GPU, multiprocessors=1)
    cut = splits.plan_for(problem, tiles_for(gpu, problem).decode, gpu)
    assert cut, "the call must be for this kernel"
    assert cut.short_last == (w.key_value_seq_lengths is not None and cut.splits * w.B * w.K > splits.AT_ONCE)
    simulated("fetching first")
    out, lse = splits.decode(*arrays[:3], Rows(*map(int32, w.lengths.values())), problem, cut)
    exact = oracle(arrays, **w.options)
    assert_right(Results(out, lse.swapaxes(1, 2), *without_gradients(exact)), exact)


@pytest.mark.parametrize("layers", [3, 70])
def test_decode_by_splits_of_a_stacked_cache(simulated, layers):
    """A layer among others that are poisoned, rows of other fill, one that has overflowed."""
    from flashcore_jax.kernels.mosaic_gpu import splits

    w = workload(1, 1024, 4, 1, 128, B=3, is_causal=True, split_size=256, key_value_seq_lengths=(264, 1000, 140))
    arrays = beyond_the_lengths(inputs(w), w, np.nan)
    layer, gpu = layers - 2, dataclasses.replace(GPU, multiprocessors=1)
    keys, values = (jnp.full((layers, *x.shape), jnp.nan, x.dtype).at[layer].set(x) for x in arrays[1:3])
    rows = Rows(
        key_length=jnp.zeros((layers, w.B), jnp.int32).at[layer].set(jnp.array(w.key_value_seq_lengths)),
        overflowed=jnp.ones((layers, w.B), bool).at[layer, :2].set(False),
        layer=jnp.array([layer]),
    )
    problem = problem_of(arrays.query, keys, values, is_causal=True, split_size=w.split_size, cached=True)
    cut = splits.plan_for(problem, tiles_for(gpu, problem).decode, gpu)
    assert cut.short_last
    simulated("fetching first")
    out, lse = splits.decode(arrays.query, keys, values, rows, problem, cut)
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()
    exact = oracle(arrays, **w.options)
    exact = Oracle(*(Results(*(x[:2] for x in part)) for part in exact))
    assert_right(Results(out[:2], lse[:2].swapaxes(1, 2), *without_gradients(exact)), exact)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": (100, 30)}], ids=str)
def test_pieces_of_tiles_have_the_same_bits(simulated, options):
    """With many multiprocessors tiles break into pieces, whose warpgroups stand anywhere, and some of them idle; with one they do not."""
    w = workload(456, 456, 2, 1, split_size=256, **options)
    arrays = inputs(w)
    problem = problem_of(*arrays[:3], split_size=w.split_size, **options)
    forward, backward = simulated("at random")

    def run(multiprocessors: int):
        gpu = dataclasses.replace(GPU, multiprocessors=multiprocessors)
        out, lse = forward(*arrays[:3], Rows(), problem, gpu)
        return out, lse, *backward(*arrays[:3], Rows(), out, lse, arrays.out_cotangent, arrays.lse_cotangent.swapaxes(1, 2), problem, gpu)

    whole = run(1)
    for multiprocessors in (7, 16):
        chex.assert_trees_all_equal(run(multiprocessors), whole)
    for warpgroups in (2, 3):
        table = schedule_of(problem, warpgroups, 16).table
        found = [(number // w.N // warpgroups, number // w.N % warpgroups + 1) for row in table for number in row[1 : 1 + row[0]]]
        assert any(0 < start and start + used < 8 and used < warpgroups for start, used in found), "no piece from within a head"


def test_a_chunk_on_a_stacked_cache(simulated):
    """A layer among others that are poisoned, rows of other fill, one that has overflowed."""
    w = workload(136, 264, B=3, is_causal=True, key_value_seq_lengths=(264, 200, 140))
    arrays = beyond_the_lengths(inputs(w), w, np.nan)
    layer, empty = 1, KVCache.create(w.B, w.S, w.K, w.H, layers=3)
    keys, values = (jnp.full_like(x, jnp.nan).at[layer].set(new) for x, new in zip((empty.key, empty.value), arrays[1:3], strict=True))
    rows = Rows(
        key_length=jnp.zeros_like(empty.length).at[layer].set(jnp.array(w.key_value_seq_lengths)),
        overflowed=~empty.overflowed.at[layer, :2].set(True),
        layer=jnp.array([layer]),
    )
    forward, _ = simulated("at random")
    out, lse = forward(arrays.query, keys, values, rows, problem_of(arrays.query, keys, values, is_causal=True, cached=True), GPU)
    assert np.isnan(out[2]).all()
    assert np.isnan(lse[2]).all()
    exact = oracle(arrays, **w.options)
    exact = Oracle(*(Results(*(x[:2] for x in part)) for part in exact))
    assert_right(Results(out[:2], lse[:2].swapaxes(1, 2), *without_gradients(exact)), exact)
