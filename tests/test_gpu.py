"""What means something on a GPU only: bits, memory, addresses beyond 32 bits, and the float32 precisions of tensor cores."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flashcore_jax
from flashcore_jax.kernels.triton.decode import decode
from flashcore_jax.kernels.triton.forward import forward
from flashcore_jax.problem import problem_of
from flashcore_jax.rows import Rows
from flashcore_jax.testing import UNIT_ROUNDOFF, Inputs, Workload, assert_right, errors, evaluate, inputs, oracle
from flashcore_jax.tuning.tiles import Tile, Tiles

pytestmark = pytest.mark.gpu

IMPLEMENTATION = "triton"
attention = functools.partial(flashcore_jax.attention, implementation=IMPLEMENTATION)


def workload(T, S, N=8, K=2, H=64, dtype="bfloat16", B=2, name="gpu", **options) -> Workload:
    return Workload(name, B, T, S, N, K, H, H, dtype, **options)


# --- sizes

LENGTHS = (1, 8, 15, 16, 17, 31, 33, 63, 65, 96, 100, 127, 129, 200, 255, 257, 500, 513, 1000)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(T, LENGTHS[j % 19]) for i, T in enumerate(LENGTHS) for j in (7 * i + 3, 5 * i + 11)])
def test_ragged_lengths(T, S, is_causal):
    w = workload(T, S, 4, 2, dtype="float16", is_causal=is_causal, split_size=256)
    arrays = inputs(w)
    results = evaluate(functools.partial(attention, split_size=w.split_size), arrays, **w.options)
    assert_right(results, oracle(arrays, **w.options))


@pytest.mark.parametrize("side", ["keys", "queries"])
def test_offsets_beyond_32_bits(side):
    """The last rows of an array of more than 2^31 elements: as if they stood alone, to the bit.

    The rows repeat after 4099, a prime: an address that wraps around meets other numbers.
    """
    if jax.devices()[0].memory_stats()["bytes_limit"] < 40e9:
        pytest.skip("needs 40 GB of GPU memory")
    length, tail, heads, size = 2**18 + 4096, 4096, 64, 128
    assert length * heads * size > 2**31
    at = jax.random.split(jax.random.key(0), 3)
    repeat = jax.jit(lambda base: base[:, jnp.arange(length) % 4099])
    long = [repeat(jax.random.normal(key, (1, 4099, heads, size), jnp.bfloat16)) for key in at[:2]]
    short = [jax.random.normal(key, (1, 128, heads, size), jnp.bfloat16) for key in at[1:]]

    if side == "keys":  # 128 queries at the end, and a window that does not reach before the tail
        query, (key, value), options = short[0], long, {"local_window_size": (1000, 0)}
        alone = (query, key[:, -tail:], value[:, -tail:])
    else:
        query, (key, value), options = long[0], short, {}
        del long[1]
        alone = (query[:, -tail:], key, value)

    @jax.jit
    def run(query, key, value):
        out, pull = jax.vjp(functools.partial(attention, **options), query, key, value)
        dquery, dkey, dvalue = pull(jnp.ones_like(out))
        ends = (out[:, -tail:], dquery[:, -tail:])
        return ends if side == "queries" else (*ends, dkey[:, -tail:], dvalue[:, -tail:])

    results = run(query, key, value)
    assert float(jnp.max(jnp.abs(results[0]))) > 0
    chex.assert_trees_all_equal(results, run(*alone))


# --- bits


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_thousand_repeats(dtype):
    w = workload(777, 1000, dtype=dtype, is_causal=True, query_seq_lengths=(777, 500), key_value_seq_lengths=(1000, 600))
    arrays = inputs(w)
    run = functools.partial(evaluate, attention, arrays, **w.options)
    first = run()
    same = jax.jit(lambda a, b: jnp.stack([jnp.all(x == y) for x, y in zip(a, b, strict=True)]))
    assert np.all(np.stack([same(first, run()) for _ in range(1000)]))
    changed = first._replace(dvalue=first.dvalue.at[0, 0, 0, 0].add(1.0))
    assert not np.all(same(first, changed))


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": (300, 20)}], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_row_does_not_depend_on_the_batch_around_it(head_dim, options):
    """To the bit, forward and backward."""
    lengths = {"query_seq_lengths": (1, 700, 333, 700, 64), "key_value_seq_lengths": (2500, 1, 1999, 2500, 64)}
    w = workload(700, 2500, H=head_dim, B=5, dtype="float16", **lengths)
    arrays = inputs(w)
    run = functools.partial(evaluate, functools.partial(attention, split_size=512, **options))
    together = run(arrays, **w.lengths)
    for b in (2, 3):
        alone = run(Inputs(*(a[b : b + 1] for a in arrays)), **{name: x[b : b + 1] for name, x in w.lengths.items()})
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda x, b=b: x[b : b + 1], together))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_row_does_not_depend_on_padding(head_dim, is_causal):
    """The forward bits of a row alone, and padded to other sizes: the tiles may differ, the order of additions may not."""
    w = workload(333, 1999, H=head_dim, B=1, is_causal=is_causal)
    arrays = inputs(w)[:3]
    run = jax.jit(functools.partial(attention, is_causal=is_causal, split_size=512, return_lse=True))
    out, lse = run(*arrays)
    for T, S in ((333, 2048), (700, 1999), (1024, 5000)):
        more = ((0, size - a.shape[1]) for a, size in zip(arrays, (T, S, S), strict=True))
        padded = (jnp.pad(a, ((0, 0), m, (0, 0), (0, 0)), constant_values=np.nan) for a, m in zip(arrays, more, strict=True))
        got = run(*padded, query_seq_lengths=jnp.array([333]), key_value_seq_lengths=jnp.array([1999]))
        chex.assert_trees_all_equal((out, lse), jax.tree.map(lambda x: x[:, :333], got))


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_query_does_not_depend_on_the_queries_beside_it(is_causal):
    """The last 1, 16 and 100 queries alone, on the same keys, have the bits that they have among all 700."""
    arrays = inputs(workload(700, 2500, H=128, is_causal=is_causal))[:3]
    run = jax.jit(functools.partial(attention, is_causal=is_causal, split_size=512, return_lse=True))
    everyone = run(*arrays)
    for count in (1, 16, 100):
        alone = run(arrays[0][:, -count:], *arrays[1:])
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda x, count=count: x[:, -count:], everyone))


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [("bfloat16", 64), ("float16", 128), ("bfloat16", 96), ("float16", 256), pytest.param("float32", 96, marks=pytest.mark.hopper)],
)
def test_the_tile_changes_no_bit(dtype, head_dim):
    """Neither the rows of a tile, nor how its warps share them, nor whether a program has all of a row's keys: the additions are
    those of the key grid (`block_k`) and of the splits. Tensor cores of both generations among them."""
    arrays = inputs(workload(16, 1500, H=head_dim, dtype=dtype, is_causal=True))[:3]
    problem = problem_of(*arrays, is_causal=True, split_size=512)

    @functools.partial(jax.jit, static_argnames=("run", "tile"))
    def results(query, key, value, run, tile):
        options = (132,) if run is decode else ()
        return run(query, key, value, Rows(), problem, Tiles(tile, tile, tile, tile, tile), *options)

    tiles = [(64, 64, 4, 2), (128, 64, 8, 1), (16, 64, 1, 1), (16, 64, 4, 2), (32, 64, 2, 1), (32, 64, 4, 1), (64, 64, 8, 1)]
    if dtype == "float32":  # each compiles for 4 s; one warp's spills so much that the memory set aside does not fit beside other workers'
        tiles = [(64, 64, 4, 2), (128, 64, 8, 1), (16, 64, 4, 2)]
    first = results(*arrays, forward, Tile(*tiles[0]))
    for run in (forward, decode):
        for tile in tiles:
            chex.assert_trees_all_equal(results(*arrays, run, Tile(*tile)), first, custom_message=f"{run.__name__} {tile}")


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_query_within_the_first_split_has_the_bits_of_a_call_that_closes_nothing(head_dim):
    """The two have tiles of their own."""
    arrays = inputs(workload(1500, 1500, H=head_dim, dtype="float16", is_causal=True))[:3]
    run = jax.jit(functools.partial(attention, is_causal=True, split_size=512, return_lse=True))
    longer, shorter = run(*arrays), run(*(a[:, :512] for a in arrays))
    chex.assert_trees_all_equal(shorter, jax.tree.map(lambda x: x[:, :512], longer))


# --- cache-precision.md: the full-sequence items of its table, fp16, largest difference from float64 rounded to fp16


@pytest.mark.parametrize(
    ("B", "T", "N", "K", "is_causal", "gate"),
    [
        (2, 64, 8, 8, True, 0.00195),
        (4, 128, 8, 8, False, 0.00049),
        (1, 32, 8, 8, False, 0.00098),
        (8, 256, 16, 16, False, 0.00049),
        (2, 64, 32, 32, False, 0.00098),
        (2, 64, 32, 16, False, 0.00098),
        (2, 64, 32, 8, False, 0.00098),
        (2, 64, 32, 4, False, 0.00098),
        (2, 64, 32, 1, False, 0.00098),
        (2, 64, 28, 4, False, 0.00098),
        (2, 128, 32, 8, True, 0.00195),
    ],
)
def test_cache_precision_gates(B, T, N, K, is_causal, gate):
    w = workload(T, T, N, K, B=B, dtype="float16", is_causal=is_causal)
    arrays = inputs(w)
    results, exact = evaluate(attention, arrays, **w.options), oracle(arrays, **w.options)
    assert_right(results, exact)
    rounded = exact.exact.out.astype(np.float16).astype(np.float64)
    # The table's gates are powers of two, written with five digits.
    assert np.max(np.abs(np.asarray(results.out, np.float64) - rounded)) <= gate * 1.005


def test_grouped_heads_equal_repeated_heads():
    w = workload(128, 128, 32, 8, dtype="float16")
    query, key, value = inputs(w)[:3]
    grouped = jax.jit(attention)(query, key, value)
    chex.assert_trees_all_equal(grouped, jax.jit(attention)(query, jnp.repeat(key, 4, axis=2), jnp.repeat(value, 4, axis=2)))


# --- memory


def temporary_bytes(f, T, options):
    arrays = [jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16) for heads in (8, 2, 2)]
    return jax.jit(functools.partial(f, **options)).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": 100}, {"logits_soft_cap": 5.0}], ids=str)
def test_memory_is_linear_in_the_length(options):
    """Forward: no copy of anything. Forward and backward: a few arrays like out in float32, from 1k to 64k."""

    def gradients(*arrays, **options):
        return jax.grad(lambda *arrays: jnp.sum(attention(*arrays, **options).astype(jnp.float32) ** 2), (0, 1, 2))(*arrays)

    for T in (1024, 8192, 65536):
        out_bytes = T * 8 * 128 * 2
        assert temporary_bytes(attention, T, options) <= out_bytes / 4  # less than a copy of key; lse is T * 8 * 4
        assert temporary_bytes(gradients, T, options) <= 6 * out_bytes  # out and its cotangent, some of it in float32


# --- float32 by its precision


def test_precisions_of_float32():
    """None and "highest" are float32-accurate; "default" is one TF32 product: coarser, and better than bfloat16."""
    w = workload(257, 257, H=64, dtype="float32", is_causal=True)
    arrays = inputs(w)
    exact = oracle(arrays, **w.options)
    for precision in (None, "high", "highest"):
        assert_right(evaluate(functools.partial(attention, precision=precision), arrays, **w.options), exact)
    out = errors(evaluate(functools.partial(attention, precision="default"), arrays, **w.options), exact)["out"]
    assert 1.0 < out < UNIT_ROUNDOFF["bfloat16"] / UNIT_ROUNDOFF["float32"]


def test_default_matmul_precision_does_not_leak_in():
    """JAX's global setting is for JAX's own products."""
    w = workload(129, 129, dtype="float32")
    arrays = inputs(w)
    plain = evaluate(attention, arrays)
    for precision in ("bfloat16", "highest"):
        with jax.default_matmul_precision(precision):
            chex.assert_trees_all_equal(plain, evaluate(functools.partial(attention), arrays))
