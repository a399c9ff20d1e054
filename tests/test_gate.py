"""The gate that every other test leans on: what is right passes it, and what is a known fault does not."""

import jax.numpy as jnp
import numpy as np
import pytest

from flashcore_jax.testing import Inputs, Oracle, Results, Workload, errors, errors_of, inputs, oracle

UNITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-19}  # docs/numerics.md; not testing.py's own


def rounded(exact: Results, dtype) -> Results:
    return Results(*(x.astype(np.float32 if name == "lse" else jnp.dtype(dtype)) for name, x in exact._asdict().items()))


@pytest.mark.parametrize("dtype", UNITS)
def test_what_passes_and_what_does_not(dtype):
    w = Workload("gate", 1, 64, 80, 2, 1, 32, 32, dtype, is_causal=True)
    arrays, u = inputs(w), UNITS[dtype]
    exact = oracle(arrays, **w.options)
    right = rounded(exact.exact, dtype)
    assert max(errors(right, exact).values()) <= 1.0
    for name in Results._fields:
        with_nan = np.array(getattr(right, name))
        with_nan.flat[7] = np.nan
        assert errors(right._replace(**{name: with_nan}), exact)[name] == np.inf
        # 4 u of every number is more than roundings add up to; the lse of one TF32 product is off by 2^-11.
        x = getattr(exact.exact, name)
        wrong = rounded(exact.exact._replace(**{name: x + 2.0**-11 if name == "lse" else x * (1 + 4 * u)}), dtype)
        assert errors(wrong, exact)[name] > 1.0, name


def test_one_tf32_product_does_not_pass_for_float32():
    w = Workload("gate", 1, 64, 80, 2, 1, 32, 32, "float32", is_causal=True)
    arrays = inputs(w)
    tf32 = (((np.asarray(x).view(np.uint32) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32) for x in arrays[:3])
    coarse = oracle(Inputs(*tf32, *arrays[3:]), **w.options).exact
    assert min(errors(rounded(coarse, "float32"), oracle(arrays, **w.options)).values()) > 1.0


@pytest.mark.parametrize("dtype", UNITS)
def test_at_large_logits(dtype):
    """|logits| up to 500: what float32 logits of that size must lose passes, and what the inputs' dtype, or TF32, would lose does not."""
    w = Workload("gate", 1, 64, 80, 2, 1, 32, 32, dtype, is_causal=True)
    arrays = inputs(w)
    arrays = arrays._replace(query=arrays.query * 10, key=arrays.key * 10)
    exact = oracle(arrays, **w.options)
    assert max(errors(rounded(exact.exact, dtype), exact).values()) <= 1.0

    def with_logits_off_by(roundoff):
        # A scale that is off moves each logit by as much of itself, and lse with it.
        return rounded(oracle(arrays, is_causal=True, scale=w.H**-0.5 * (1 + roundoff)).exact, dtype)

    assert max(errors(with_logits_off_by(2.0**-23), exact).values()) <= 1.0
    found = errors(with_logits_off_by(max(2.0 * UNITS[dtype], 2.0**-11)), exact)
    assert all(found[name] > 1.0 for name in ("out", "lse", "dkey", "dvalue")), found


def test_the_last_rounding_may_be_that_of_the_next_binade():
    """Just below 0.5 bfloat16's numbers are half as far apart as above it. Found by chance: two keys, 0.49986 exactly, 0.50390625 computed."""
    x, bound = np.full((1, 1, 1, 1), 0.4998613), np.full((1, 1, 1, 1), 0.0024972)
    nothing = Results(*[np.zeros((1, 1, 1, 1))] * 5)
    exact = Oracle(nothing._replace(out=x), nothing._replace(out=bound), nothing)

    def error(out: float) -> float:
        return errors(rounded(nothing._replace(out=np.full_like(x, out)), "bfloat16"), exact)["out"]

    assert error(0.50390625) <= 1.0 < error(0.5078125)
    assert error(0.49609375) <= 1.0 < error(0.4921875)


def test_few_rows_that_see_something_have_no_mean():
    """Two of 130 queries: their rounding errors' root mean square is a sample, whatever padding stands beside them."""
    for seed in (6, 10):
        w = Workload(
            "few", 1, 130, 2, 4, 2, 16, 8, "bfloat16", True, logits_soft_cap=1.0, query_seq_lengths=(2,), key_value_seq_lengths=(2,)
        )
        assert max(errors_of(w, "xla", seed).values()) <= 1.0
