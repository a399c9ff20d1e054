"""Derivatives of `attention_with_kv_cache`, and what never gets into them: poison, padding, and rows without room."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import differentiate, options_of, split_at, through_a_cache, tokens_of
from derivatives import BEYOND, assert_close, loss_of

from flashcore_jax import Unsupported, reference
from flashcore_jax.testing import Results, Workload, assert_right, inputs, oracle

_some = dict(B=4, S=200, N=4, K=2, H=16, Hv=24, is_causal=True, split_size=128)
BEFORE = np.array([150, 0, 60, 5])
COUNT = {17: np.array([17, 17, 0, 16]), 3: np.array([3, 3, 0, 2])}
DIFFERENTIATED = [
    Workload("a chunk, float16", T=17, dtype="float16", **_some),
    Workload("few tokens of a layer, float32", T=3, dtype="float32", local_window_size=(90, 0), **_some),
]
DIFFERENTIATED = [
    dataclasses.replace(w, query_seq_lengths=tuple(COUNT[w.T]), key_value_seq_lengths=tuple(BEFORE + COUNT[w.T])) for w in DIFFERENTIATED
]


@pytest.mark.parametrize("w", DIFFERENTIATED, ids=str)
def test_gradients_are_those_of_the_sequence(implementation, w):
    """Of query, the appended tokens and the cache's contents, to the gate against float64; and near jax.grad of the reference."""
    arrays, counts = inputs(w), COUNT[w.T]
    cache, new = split_at(arrays, BEFORE, counts, w.T)
    layered = {}
    if "layer" in w.name:
        cache, layered = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x]), cache), {"layer": jnp.int32(1)}
    cotangents = arrays.out_cotangent, arrays.lse_cotangent
    options = options_of(w, implementation)
    results = differentiate(arrays.query, new, cache, jnp.asarray(counts), cotangents, **layered, options=options)
    got, (dquery, dnew, *dcache) = jax.device_get(results)
    if layered:
        for x in dcache:
            np.testing.assert_array_equal(x[::2], 0.0)
        dcache = [x[1] for x in dcache]
    # The gradients of the cache's contents and of the new tokens, put where the tokens stand in the sequence. The rest is 0.
    whole = [np.zeros_like(x) for x in jax.device_get(arrays[1:3])]
    for b, (before, count) in enumerate(zip(BEFORE, counts, strict=True)):
        for full, cached, added in zip(whole, dcache, dnew, strict=True):
            full[b, :before], full[b, before : before + count] = cached[b, :before], added[b, :count]
            np.testing.assert_array_equal(cached[b, before:], 0.0)
            np.testing.assert_array_equal(added[b, count:], 0.0)
    results = Results(*got, dquery, *whole)
    assert_right(results, oracle(arrays, **w.options))
    assert_close(results[2:], reference_gradients(w))


def reference_gradients(w):
    query, key, value, *cotangents = (a.astype(jnp.float32) for a in inputs(w))
    options = {name: option for name, option in w.options.items() if name not in w.lengths}
    call = functools.partial(reference.attention, return_lse=True, **options, **w.lengths)
    return jax.jit(lambda arrays, cotangents: jax.vjp(call, *arrays)[1](cotangents))((query, key, value), tuple(cotangents))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_in_unused_slots_and_padding_changes_nothing(implementation, poison):
    """To the bit, in the output and in every gradient; also where the cotangents of padding are poisoned."""
    w = DIFFERENTIATED[0]
    arrays, counts = inputs(w), COUNT[w.T]

    def run(fill):
        cache, new = split_at(arrays, BEFORE, counts, w.T, unused=fill)
        query, *cotangents = (tokens_of(x, [0] * 4, counts, w.T, fill) for x in (arrays.query, *arrays[3:]))
        return differentiate(query, new, cache, jnp.asarray(counts), tuple(cotangents), options=options_of(w, implementation))

    (out, lse), gradients = dirty = run(poison)
    chex.assert_tree_all_finite((out, jnp.exp(lse), gradients))
    chex.assert_trees_all_equal(dirty, run(0.0))
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(out[b, count:], 0.0)
        np.testing.assert_array_equal(lse[b, count:], -np.inf)
        np.testing.assert_array_equal(gradients[0][b, count:], 0.0)


def test_overflow_sends_no_gradient_and_spoils_none(implementation):
    """The rows that are right have the gradients that they have beside a row with room, to the bit; the other has none at all."""
    w = DIFFERENTIATED[0]
    arrays, counts, before = inputs(w), jnp.full(4, w.T, jnp.int32), np.array([183, 184, 0, 7])
    others = np.array([0, 2, 3])
    cache, new = split_at(arrays, before, counts, w.T)
    run = functools.partial(differentiate, options=options_of(w, implementation))
    cotangents = arrays.out_cotangent, arrays.lse_cotangent
    (_, lse), gradients = run(arrays.query, new, cache, counts, cotangents)
    assert np.all(np.isnan(lse[1]))
    chex.assert_tree_all_finite(gradients)
    for x in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(x[1], 0.0)
    _, expected = run(arrays.query, new, cache.truncate(np.array([200, 5, 200, 200])), counts, cotangents)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[others], x) for x in (gradients, expected)))


def test_xla_has_forward_mode_in_every_argument():
    """README: "xla" has every order and mode."""
    w = Workload("forward mode", 1, 2, 9, 2, 1, 8, 8, "float32", is_causal=True)
    arrays = inputs(w)[:3]
    tangents = tuple(jnp.cos(a) for a in arrays)
    calls = functools.partial(through_a_cache, implementation="xla"), functools.partial(reference.attention, is_causal=True)
    assert_close(*(jax.jit(functools.partial(jax.jvp, call))(arrays, tangents)[1] for call in calls))


# --- derivatives beyond the first reverse one


def scalar(attention, x):
    """Of queries, keys and values that all depend on x [B, S, K, H]: two new tokens, behind cached ones."""
    return loss_of(attention)(jnp.concatenate([x, jnp.cos(x)], axis=2)[:, -2:], 0.5 * x, jnp.sin(x))


def sequence():
    return inputs(Workload("beyond", 1, 2, 9, 2, 1, 8, 8, "float32"))[1]


@pytest.mark.parametrize("derivative", ["reverse of reverse", "forward of reverse"])
def test_xla_has_second_derivatives(derivative):
    calls = functools.partial(through_a_cache, implementation="xla"), functools.partial(reference.attention, is_causal=True)
    got, expected = (jax.jit(functools.partial(BEYOND[derivative], functools.partial(scalar, call)))(sequence()) for call in calls)
    assert_close(got, expected, calls=4)  # it adds the products of two first derivatives: four times their error


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("derivative", BEYOND)
def test_kernels_have_the_first_reverse_derivative_only(derivative, jitted):
    run = functools.partial(BEYOND[derivative], functools.partial(scalar, functools.partial(through_a_cache, implementation="triton")))
    if jitted and derivative == "jvp":
        # JAX itself finds this one, when the program that holds it is lowered: the call has returned by then.
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jit(run)(sequence())
    else:
        with pytest.raises(Unsupported, match='implementation="xla"'):
            (jax.jit(run) if jitted else run)(sequence())
