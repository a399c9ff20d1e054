"""Any sequence of append, attend, truncate and reset leaves what a plain model of the cache, a list per row, says."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import attend, forward_errors, jitted_append
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flashcore_jax import CacheOverflowError, KVCache
from flashcore_jax.testing import Inputs, oracle

B, S, N, K, H, Hv = 3, 12, 2, 1, 8, 16
SIZES = (1, 5)  # tokens of a call: each compiles once

COUNTS = st.lists(st.integers(0, max(SIZES)), min_size=B, max_size=B)
OPERATIONS = st.one_of(
    st.tuples(st.sampled_from(["append", "attend", "attend"]), st.sampled_from(SIZES), COUNTS),
    st.tuples(st.just("truncate"), st.lists(st.integers(0, S + 1), min_size=B, max_size=B)),
    st.tuples(st.just("reset"), st.lists(st.booleans(), min_size=B, max_size=B)),
)


class Model:
    """Rows of (key, value) tokens, and which of them have overflowed."""

    def __init__(self):
        self.rows = [[] for _ in range(B)]
        self.overflowed = [False] * B

    def append(self, key, value, counts):
        for b, count in enumerate(counts):
            self.overflowed[b] |= len(self.rows[b]) + count > S
            if not self.overflowed[b]:
                self.rows[b] += [(key[b, t], value[b, t]) for t in range(count)]

    def would_overflow(self, counts):
        return [b for b in range(B) if self.overflowed[b] or len(self.rows[b]) + counts[b] > S]

    def truncate(self, lengths):
        for b, length in enumerate(lengths):
            self.overflowed[b] &= length > len(self.rows[b])
            del self.rows[b][length:]

    def reset(self, mask):
        for b in np.flatnonzero(mask):
            self.rows[b], self.overflowed[b] = [], False

    @property
    def lengths(self):
        return np.array([len(row) for row in self.rows], np.int32)

    def arrays(self):
        """The rows' keys and values, padded to the capacity: one shape for the reference."""
        key, value = np.zeros((B, S, K, H), np.float32), np.zeros((B, S, K, Hv), np.float32)
        for b, row in enumerate(self.rows):
            for t, token in enumerate(row):
                key[b, t], value[b, t] = token
        return key, value


def assert_is(cache: KVCache, model: Model):
    np.testing.assert_array_equal(cache.length, model.lengths)
    np.testing.assert_array_equal(cache.overflowed, model.overflowed)
    key, value = model.arrays()
    keys, values = np.asarray(cache.key), np.asarray(cache.value)
    for b, length in enumerate(model.lengths):
        chex.assert_trees_all_equal((keys[b, :length], values[b, :length]), (key[b, :length], value[b, :length]))
    if any(model.overflowed):
        with pytest.raises(CacheOverflowError):
            cache.check()
    else:
        cache.check()


# Derandomized, so a failure is the same for everybody. The fixture is a name that no example changes.
@settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=10))
@example(  # filled to the last slot, overflowed, sticky, whole again, and on
    operations=[
        ("attend", 5, [5, 3, 0]), ("attend", 5, [5, 5, 2]), ("append", 5, [2, 4, 0]), ("attend", 1, [1, 1, 1]), ("attend", 1, [0, 1, 1]),
        ("truncate", [12, 9, 1]), ("attend", 1, [0, 1, 1]), ("truncate", [11, 8, 12]), ("attend", 5, [1, 4, 5]),
    ]
)  # fmt: skip
@example(  # a slot that is given to another sequence
    operations=[
        ("attend", 5, [5, 5, 5]), ("append", 5, [5, 5, 5]), ("attend", 5, [5, 1, 2]), ("reset", [True, False, False]),
        ("attend", 5, [4, 1, 0]), ("reset", [False, False, True]), ("truncate", [2, 0, 3]), ("attend", 1, [1, 1, 1]),
    ]
)  # fmt: skip
def test_any_sequence_of_calls(implementation, operations):
    cache, model = KVCache.create(B, S, K, H, value_head_dim=Hv, dtype=jnp.float32), Model()
    cache = KVCache(cache.key + jnp.nan, cache.value + jnp.nan, cache.length, cache.overflowed)
    for step, (kind, *arguments) in enumerate(operations):
        if kind in ("append", "attend"):
            T, counts = arguments
            counts = np.minimum(counts, T).astype(np.int32)
            rng = np.random.default_rng(step)
            query, key, value = (rng.standard_normal((B, T, *shape), np.float32) for shape in ((N, H), (K, H), (K, Hv)))
            lost = model.would_overflow(counts)
            if lost:
                with pytest.raises(CacheOverflowError, match=rf"rows \[{', '.join(map(str, lost))}\]"):
                    cache.append(key, value, query_seq_lengths=counts, implementation=implementation)
            model.append(key, value, counts)
            if kind == "append":
                cache = jitted_append(cache, key, value, counts, implementation=implementation)
            else:
                got, cache = attend(query, key, value, cache, counts, options=(("implementation", implementation),))
                got = jax.device_get(got)
                unused = np.zeros((B, T, N, Hv)), np.zeros((B, T, N))  # cotangents
                sequence = Inputs(query, *model.arrays(), *unused)
                exact = oracle(sequence, is_causal=True, query_seq_lengths=counts, key_value_seq_lengths=model.lengths)
                whole = np.setdiff1d(range(B), lost)
                if whole.size:
                    assert forward_errors(*jax.tree.map(lambda x, whole=whole: x[whole], (got, exact))) <= 1.0
                for x in got:
                    assert np.all(np.isnan(x[np.array(lost, int)]))
        elif kind == "truncate":
            cache = cache.truncate(np.array(*arguments))
            model.truncate(*arguments)
        else:
            cache = cache.reset(np.array(*arguments))
            model.reset(*arguments)
        assert_is(cache, model)
