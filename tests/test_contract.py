"""The contract: output, log-sum-exp and every gradient, of every implementation on every workload, against float64."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import IMPLEMENTATIONS, on_gpu

import flashcore_jax
from flashcore_jax.kernels.triton.backward import backward
from flashcore_jax.kernels.triton.forward import forward
from flashcore_jax.problem import problem_of
from flashcore_jax.rows import Rows, int32
from flashcore_jax.testing import WORKLOADS, Results, assert_right, evaluate, inputs, oracle
from flashcore_jax.tuning.tiles import Tile, Tiles

HERE = [w for w in WORKLOADS if on_gpu() or not w.large]
# "mosaic_gpu" hands short calls to the Triton kernels, and declines what is not for its head dims; test_mosaic.py has more of its own.
TAKEN_BY_MOSAIC = [w for w in HERE if w.large and w.dtype != "float32" and {w.H, w.Hv} <= {64, 128, 256}]
CASES = [
    pytest.param(implementation, w, id=f"{implementation}-{w}", marks=[pytest.mark.hopper] * (implementation == "mosaic_gpu"))
    for implementation, workloads in (*((name, HERE) for name in IMPLEMENTATIONS), ("mosaic_gpu", TAKEN_BY_MOSAIC))
    for w in workloads
]


@pytest.mark.parametrize(("implementation", "workload"), CASES)
def test_forward_lse_and_gradients(implementation, workload):
    w = workload
    arrays = inputs(w)
    attention = functools.partial(flashcore_jax.attention, implementation=implementation, split_size=w.split_size)
    results = evaluate(attention, arrays, **w.options)
    chex.assert_shape(results.out, (w.B, w.T, w.N, w.Hv))
    chex.assert_shape(results.lse, (w.B, w.T, w.N))
    chex.assert_type([results.out, results.lse], [jnp.dtype(w.dtype), jnp.float32])
    chex.assert_trees_all_equal_shapes_and_dtypes(tuple(results[2:]), tuple(arrays[:3]))
    assert_right(results, oracle(arrays, **w.options))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_other_inputs(implementation, seed):
    workload = next(w for w in WORKLOADS if w.name == "everything")
    arrays = inputs(workload, seed)
    attention = functools.partial(flashcore_jax.attention, implementation=implementation, split_size=workload.split_size)
    assert_right(evaluate(attention, arrays, **workload.options), oracle(arrays, **workload.options))


@pytest.mark.parametrize("workload", [w for w in HERE if w.name in ("everything", "head dim 40, causal, float32")], ids=str)
@pytest.mark.parametrize(("block_q", "block_k", "heads_fastest"), [(16, 128, True), (128, 32, False), (64, 64, False)])
def test_any_tile(workload, block_q, block_k, heads_fastest):
    """The tile is no part of the meaning: every one is right."""
    w = workload
    arrays = inputs(w)
    tile = Tile(block_q, block_k, num_warps=4, num_stages=1, heads_fastest=heads_fastest)
    options = {name: option for name, option in w.options.items() if option is not None}
    problem = problem_of(*arrays[:3], split_size=w.split_size, **options)
    rows = Rows(*map(int32, w.lengths.values()))

    @jax.jit
    def run(query, key, value, out_cotangent, lse_cotangent):
        tiles = Tiles(tile, tile, tile, tile, tile)
        out, lse = forward(query, key, value, rows, problem, tiles)
        cotangents = out_cotangent, lse_cotangent.swapaxes(1, 2)
        gradients = backward(query, key, value, rows, out, lse, *cotangents, problem, tiles)
        return Results(out, lse.swapaxes(1, 2), *gradients)

    assert_right(run(*arrays), oracle(arrays, **w.options))


@pytest.mark.parametrize("backward", [False, True])
def test_memory_of_xla_is_linear_in_the_length(backward):
    """Eight times the length takes eight times the memory, and not 64 times; for kernels, test_gpu.py has this."""
    attention = functools.partial(flashcore_jax.attention, implementation="xla", is_causal=True)
    f = jax.grad(lambda *arrays: jnp.sum(attention(*arrays) ** 2), (0, 1, 2)) if backward else attention

    def temporary_bytes(T):
        arrays = [jax.ShapeDtypeStruct((1, T, heads, 64), jnp.float32) for heads in (2, 1, 1)]
        return jax.jit(f).lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) <= 8.5 * temporary_bytes(1024)
