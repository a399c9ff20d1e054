"""What the equality of prefill and decode rests on, one step at a time: the bits of `online_softmax`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax import online_softmax
from flashcore_jax.online_softmax import close, finish, highest_of, merge, nothing, start, update

ROWS, KEYS, COLUMNS = 5, 64, 16
LOG2_SCALE = 0.37


def block(seed, size=3.0):
    """Scores [ROWS, KEYS] and the product of their weights with values."""
    rng = np.random.default_rng(seed)
    value = jnp.asarray(rng.standard_normal((KEYS, COLUMNS)), jnp.float32)
    return jnp.asarray(size * rng.standard_normal((ROWS, KEYS)), jnp.float32), lambda p: (jnp.matmul(p, value, precision="highest"),)


def sum_of(*blocks):
    total = start((ROWS,), (COLUMNS,))
    for scores, weigh in blocks:
        total = update(total, scores, LOG2_SCALE, weigh)
    return close(total)


@pytest.mark.parametrize("size", [1e-3, 3.0, 1e4])
def test_the_maximum_is_an_integer_and_above_every_score(size):
    """So each rescaling factor is a power of two, and no weight is above 1."""
    scores, _ = block(0, size)
    highest = highest_of(scores, LOG2_SCALE)
    np.testing.assert_array_equal(highest, np.round(highest))
    above = np.asarray(highest, np.float64) - np.max(np.asarray(scores, np.float64) * LOG2_SCALE, axis=1)
    assert np.all((above >= -(2.0**-24) * size) & (above < 1.0))


def exact_exp2(scores, log2_scale, shift):
    """A GPU's is exact at integers, and XLA's for CPUs is not."""
    return jnp.asarray(np.exp2(np.asarray(scores, np.float64) * log2_scale - np.asarray(shift, np.float64)), jnp.float32)


def test_rescaling_changes_no_bit_but_the_exponent():
    """A far larger maximum, in a block whose weighted values are 0: what was there before is a power of two times what it was."""
    before = sum_of(block(1))
    far = jnp.full((ROWS, KEYS), -jnp.inf).at[:, 0].set(40 / LOG2_SCALE)
    opened = start((ROWS,), (COLUMNS,))._replace(acc=before.acc, running_max=before.running_max)
    after = update(opened, far, LOG2_SCALE, lambda p: (0.0,), exact_exp2)
    factor = 2.0 ** (np.asarray(before.running_max, np.float64) - np.asarray(after.running_max, np.float64))
    assert np.all(factor < 2.0**-30)
    np.testing.assert_array_equal(np.asarray(after.acc[0], np.float64), np.asarray(before.acc[0], np.float64) * factor[:, None])


def test_a_block_that_is_masked_changes_no_bit():
    """At the start, between others and at the end; and so does a sum of no keys."""
    a, b = block(1), block(2)
    hidden = jnp.full((ROWS, KEYS), -jnp.inf), b[1]
    expected = sum_of(a, b)
    for blocks in [(hidden, a, b), (a, hidden, b), (a, b, hidden)]:
        chex.assert_trees_all_equal(sum_of(*blocks), expected)
    empty = nothing((ROWS,), (COLUMNS,))
    chex.assert_trees_all_equal(merge(expected, empty), expected)
    chex.assert_trees_all_equal(merge(empty, expected), expected)


def test_no_key_is_output_0_and_lse_minus_infinity():
    for partial in (nothing((ROWS,), (COLUMNS,)), sum_of(), sum_of((jnp.full((ROWS, KEYS), -jnp.inf), block(1)[1]))):
        (out,), lse = finish(partial)
        np.testing.assert_array_equal(out, 0.0)
        np.testing.assert_array_equal(lse, -np.inf)


def test_row_sums_do_not_depend_on_which_thread_holds_which_key():
    """The tree adds pairs, and a + b is b + a: exchanging any pair's halves changes no bit, exchanging across pairs does."""
    p = jnp.exp2(block(3)[0])
    four = online_softmax._four_sums(p)
    assert four.shape == (ROWS, 2, 2)
    neighbours = p.reshape(ROWS, KEYS // 2, 2)[..., ::-1].reshape(ROWS, KEYS)
    halves = jnp.concatenate([p[:, KEYS // 2 :], p[:, : KEYS // 2]], axis=1)
    for other in (neighbours, halves):
        chex.assert_trees_all_equal(online_softmax._four_sums(other), four)
    assert np.any(online_softmax._four_sums(jnp.roll(p, 8, axis=1)[:, jax.random.permutation(jax.random.key(0), KEYS)]) != four)
