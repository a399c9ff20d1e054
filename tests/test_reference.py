"""The two references agree with each other, with the oracle, and with jax.nn where the meanings coincide."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax import reference
from flashcore_jax.testing import WORKLOADS, Inputs, assert_right, evaluate, inputs, oracle

REFERENCES = {"full": reference.attention, "incremental": reference.incremental_attention}
WORKLOAD = {w.name: w for w in WORKLOADS}
CHOSEN = (
    "one query",
    "head dim 40",
    "head dim 112, more queries than keys, causal",
    "head dim 192/128, causal",
    "window (0, 16)",
    "window (7, 9), more queries than keys",
    "window 0",
    "soft cap 5, float32",
    "scale below 0",
    "lengths, causal",
    "lengths of 0, causal",
    "lengths of 0, float32",
    "lengths of queries",
)


@pytest.mark.parametrize("name", CHOSEN)
@pytest.mark.parametrize("which", REFERENCES)
def test_against_the_oracle_in_float64(which, name):
    """Two computations in float64, forward and all gradients: nothing but float64's own rounding, 2^-53 per step, is left."""
    arrays, options = inputs(WORKLOAD[name]), WORKLOAD[name].options
    with jax.enable_x64(True):
        results = evaluate(REFERENCES[which], Inputs(*(jnp.asarray(a, jnp.float64) for a in arrays)), **options)
        chex.assert_type(list(results), jnp.float64)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, results), oracle(arrays, **options).exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["head dim 40, causal, float32", "window (5, 3), float32", "lengths of 0, float32"])
@pytest.mark.parametrize("which", REFERENCES)
def test_against_the_oracle_in_float32(which, name):
    arrays, options = inputs(WORKLOAD[name]), WORKLOAD[name].options
    assert_right(evaluate(REFERENCES[which], arrays, **options), oracle(arrays, **options))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("which", REFERENCES)
def test_poison_beyond_the_lengths_is_harmless(which, poison):
    workload = WORKLOAD["lengths, causal"]
    clean = inputs(workload)
    query_lengths, key_lengths = (np.asarray(x) for x in workload.lengths.values())

    def poisoned(array, lengths):
        beyond = np.arange(array.shape[1]) >= lengths[:, None]
        return jnp.where(beyond.reshape(*beyond.shape, *[1] * (array.ndim - 2)), poison, array).astype(array.dtype)

    lengths = (query_lengths, key_lengths, key_lengths, query_lengths, query_lengths)
    dirty = Inputs(*map(poisoned, clean, lengths))
    chex.assert_trees_all_equal(*(evaluate(REFERENCES[which], arrays, **workload.options) for arrays in (dirty, clean)))


@pytest.mark.parametrize(
    ("T", "S", "options"),
    [
        (33, 65, {}),
        (65, 33, {"scale": 0.3}),
        (65, 65, {"local_window_size": (7, 3)}),
        (65, 65, {"local_window_size": 5, "is_causal": True}),
        (33, 65, {"key_value_seq_lengths": np.array([65, 1], np.int32)}),
    ],
    ids=str,
)
def test_against_jax_nn(T, S, options):
    """The meanings coincide where T = S or nothing depends on the alignment, every row sees a key, and nothing is NaN."""
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(k, shape) for k, shape in zip(keys, [(2, T, 4, 32), (2, S, 2, 32), (2, S, 2, 32)], strict=True))

    def with_gradients(attention, **more):
        def loss(*arrays):
            out, lse = attention(*arrays, **options, **more)
            return jnp.sum(jnp.sin(out)), (out, lse)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(query, key, value)

    with jax.default_matmul_precision("highest"):
        theirs = with_gradients(jax.nn.dot_product_attention, return_residual=True)
    # Either is float32-accurate, that is to 2^-19 of numbers of size 1 (testing.UNIT_ROUNDOFF).
    for attention in REFERENCES.values():
        ours = with_gradients(attention, return_lse=True)
        chex.assert_trees_all_close((ours[0][1], ours[1]), (theirs[0][1], theirs[1]), rtol=2**-18, atol=2**-18)


def test_where_jax_nn_differs():
    """At T = 1 our causal query is the last one and sees all keys; jax.nn's is the first one and sees key 0."""
    query, key = jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 4, 1, 8))
    value = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 1, 8))
    assert jax.nn.dot_product_attention(query, key, value, is_causal=True)[0, 0, 0, 0] == 0.0
    for attention in REFERENCES.values():
        np.testing.assert_allclose(attention(query, key, value, is_causal=True), 1.5, rtol=2**-22)


@pytest.mark.parametrize("which", [reference.attention, reference.incremental_attention], ids=lambda f: f.__name__)
def test_lengths_are_clamped_and_a_window_is_any_integer(which):
    """As `attention` does it."""
    arrays = [jax.random.normal(jax.random.key(i), (1, size, 1, 8)) for i, size in enumerate((4, 8, 8))]
    for name, high, full in (("query_seq_lengths", 6, 4), ("key_value_seq_lengths", 10, 8)):
        for length, same in ((high, full), (-3, 0)):
            got, expected = (which(*arrays, is_causal=True, **{name: jnp.array([n])}) for n in (length, same))
            chex.assert_trees_all_equal(got, expected)
    chex.assert_trees_all_equal(*(which(*arrays, local_window_size=window) for window in (np.int64(1), 1)))
