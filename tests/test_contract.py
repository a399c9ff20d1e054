"""The contract: output, log-sum-exp and every gradient, of every implementation on every workload, against float64."""

import functools

import chex
import jax.numpy as jnp
import pytest
from conftest import on_gpu

import flashcore_jax
from flashcore_jax.testing import WORKLOADS, assert_right, evaluate, inputs, oracle

HERE = [w for w in WORKLOADS if on_gpu() or not w.large]


@pytest.mark.parametrize("workload", HERE, ids=str)
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
