"""`attention_with_kv_cache` is causal attention over the whole sequence, however its tokens are cut into calls, and nothing else.

Neither is a row's result touched by its batch, by the capacity, or by other layers.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_helpers import (
    CASES,
    TOTALS,
    assert_holds,
    assert_near,
    assert_same,
    assert_within,
    attend,
    call_after,
    empty_cache,
    float32_part,
    forward_errors,
    in_chunks,
    options_of,
    split_at,
    tail,
    tokens_of,
)
from jax.experimental import pallas as pl

import flashcore_jax
from flashcore_jax import reference
from flashcore_jax.kernels.triton import decode as decode_kernel
from flashcore_jax.kernels.triton.launch import launch
from flashcore_jax.problem import DEFAULT_SPLIT_SIZE, problem_of
from flashcore_jax.rows import Rows, int32
from flashcore_jax.testing import Workload, inputs, oracle
from flashcore_jax.tuning.gpus import target_gpu
from flashcore_jax.tuning.tiles import Tile, tiles_for

# --- full == prefill + decode == every chunking

SIZES = {"bfloat16, 4:2": (1, 7, 16, 64, 100), "float16, 4:1, window, soft cap": (1, 64), "float32, 3:3": (1, 7)}


@functools.cache
def exact_whole(case):
    w = CASES[case]
    return inputs(w), oracle(inputs(w), **w.options)


@functools.cache
def references(case):
    """(out, lse) of the whole sequence at once, and token by token over a growing cache: each in plain jax.numpy."""
    w, (arrays, _) = CASES[case], exact_whole(case)
    options = {name: option for name, option in w.options.items() if name not in w.lengths}
    both = reference.attention, reference.incremental_attention
    return [jax.jit(functools.partial(attention, return_lse=True, **options))(*arrays[:3], **w.lengths) for attention in both]


@functools.cache
def whole_sequence(implementation, case, shorter=0, **changed):
    """(out, lse) of one call of `attention`."""
    w = CASES[case]
    call = attention_of(options_of(w, implementation, **changed))
    keys = np.maximum(w.lengths["key_value_seq_lengths"] - shorter, 0)
    return call(*exact_whole(case)[0][:3], query_seq_lengths=w.lengths["query_seq_lengths"], key_value_seq_lengths=keys)


@functools.cache
def attention_of(options):
    return jax.jit(functools.partial(flashcore_jax.attention, return_lse=True, **dict(options)))


@pytest.mark.parametrize("case", SIZES)
def test_both_references_are_exact(case):
    """In float32, where the chunks are compared with them in their own dtype."""
    w, (_, exact) = CASES[case], exact_whole(case)
    for out, lse in references(case):
        assert_within(out, exact.exact.out, float32_part(w.dtype) * exact.bound.out)
        assert_within(lse, exact.exact.lse, exact.bound.lse)


@pytest.mark.parametrize(("case", "size"), [(case, size) for case, sizes in SIZES.items() for size in sizes])
def test_every_chunking_is_the_whole(implementation, case, size):
    """Also where rows end at different calls, and one never begins."""
    w, (arrays, exact) = CASES[case], exact_whole(case)
    got, cache = in_chunks(arrays, empty_cache(w), [0] * 4, TOTALS, size, options_of(w, implementation))
    assert_holds(cache, arrays, TOTALS)
    assert forward_errors(got, exact) <= 1.0
    for expected in references(case):
        assert_near(got, expected, exact)
    assert_same(got, whole_sequence(implementation, case), exact, implementation)


@pytest.mark.parametrize("case", SIZES)
def test_the_comparison_notices_one_key(implementation, case):
    """With one key less it is not the same, and not near the references: on a CPU too, where bits are not compared."""
    got, exact = whole_sequence(implementation, case, shorter=1), exact_whole(case)[1]
    got = jax.tree.map(np.asarray, got)
    with pytest.raises(AssertionError):
        assert_same(got, jax.tree.map(np.asarray, whole_sequence(implementation, case)), exact, implementation)
    for expected in references(case):
        with pytest.raises(AssertionError):
            assert_near(got, expected, exact)


def test_prefill_and_decode_is_the_whole(implementation):
    """Prompts of different lengths, padded, in one call; then token by token, one row from its first; then a roll-back."""
    case = "bfloat16, 4:2"
    w, (arrays, exact) = CASES[case], exact_whole(case)
    options = options_of(w, implementation)
    prompts = np.array([100, 0, 0, 33])
    first, cache = in_chunks(arrays, empty_cache(w), [0] * 4, prompts, 100, options)
    assert_holds(cache, arrays, prompts)
    rest, cache = in_chunks(arrays, cache, prompts, TOTALS, 1, options)
    at = np.arange(w.S)
    is_prompt = at < prompts[:, None]
    got = tuple(np.where(is_prompt.reshape(*is_prompt.shape, *[1] * (x.ndim - 2)), x, y) for x, y in zip(first, rest, strict=True))
    assert forward_errors(got, exact) <= 1.0
    assert_same(got, whole_sequence(implementation, case), exact, implementation)
    # Speculated tokens that are rejected change nothing of what follows.
    back = np.array([120, 0, 128, 40])
    wrong = arrays._replace(key=arrays.key[:, ::-1], value=-arrays.value)
    _, cache = in_chunks(wrong, cache.truncate(back), back, np.minimum(back + 16, TOTALS), 16, options)
    assert np.any(np.asarray(cache.value[0, 120]) != np.asarray(arrays.value[0, 120]))
    again, cache = in_chunks(arrays, cache.truncate(back), back, TOTALS, 1, options)
    assert_holds(cache, arrays, TOTALS)
    redone = (at >= back[:, None]) & (at < np.array(TOTALS)[:, None])
    chex.assert_trees_all_equal([x[redone] for x in again], [x[redone] for x in rest])


@pytest.mark.gpu
@pytest.mark.parametrize(("split_size", "of_the_whole"), [(256, 128), (None, DEFAULT_SPLIT_SIZE), (None, None)])
def test_another_split_size_has_other_bits(split_size, of_the_whole):
    """Equally right, and seen by the comparison of bits: it is not one that cannot fail. (With None few rows get splits of 128 keys.)"""
    case = "bfloat16, 4:2"
    w, (arrays, exact) = CASES[case], exact_whole(case)
    got, _ = in_chunks(arrays, empty_cache(w), [0] * 4, TOTALS, 1, options_of(w, "triton", split_size=split_size))
    assert forward_errors(got, exact) <= 1.0
    with pytest.raises(AssertionError):
        assert_same(got, whole_sequence("triton", case, split_size=of_the_whole), exact, "triton")


# --- a row is itself

ROWS = [130, 0, 37, 226]
COUNTS = {1: [1, 1, 0, 1], 64: [64, 9, 0, 33]}


@functools.cache
def rows_together(implementation, T):
    w, arrays = tail("bfloat16, 4:2", T, ROWS, COUNTS[T])
    got, _ = call_after(w, arrays, ROWS, implementation)
    exact = oracle(arrays, **w.options)
    assert forward_errors(got, exact) <= 1.0
    return w, arrays, got, exact


@pytest.mark.parametrize(("T", "rows", "capacity"), [(1, "alone", 290), (1, "together", 2900), (64, "alone", 2900)])
def test_a_row_depends_on_neither_batch_nor_capacity(implementation, T, rows, capacity):
    """A row alone, and in a batch with others of other lengths; in 290 slots, and in 2900."""
    w, arrays, together, exact = rows_together(implementation, T)
    for at in [slice(0, 1), slice(3, 4)] if rows == "alone" else [slice(0, 4)]:
        pick = functools.partial(jax.tree.map, lambda x, at=at: x[at])
        this = dataclasses.replace(w, query_seq_lengths=w.query_seq_lengths[at], key_value_seq_lengths=w.key_value_seq_lengths[at])
        got, cache = call_after(this, pick(arrays), ROWS[at], implementation, capacity=capacity)
        assert cache.capacity == capacity
        assert_same(got, pick(together), pick(exact), implementation)


@pytest.mark.parametrize("T", [1, 64])
def test_a_scan_over_layers_is_separate_caches(implementation, T):
    """A stack of caches with the layer traced in a scan: the middle one is ours, the others hold other tokens, and other lengths."""
    w, arrays, expected, exact = rows_together(implementation, T)
    counts = jnp.asarray(COUNTS[T], jnp.int32)
    cache, new = split_at(arrays, ROWS, counts, T)
    others = jax.tree.map(lambda x: x[::-1], cache)
    stack = jax.tree.map(lambda *x: jnp.stack(x), others, cache, others)
    each = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x[::-1]]), (arrays.query, *new, counts))
    options = options_of(w, implementation)

    @jax.jit
    def scan(stack, each):
        def layer(stack, layer_and_new):
            index, (*new, counts) = layer_and_new
            got, stack = attend(*new, stack, counts, index, options=options)
            return stack, got

        return jax.lax.scan(layer, stack, (jnp.arange(3), each))

    stack, got = scan(stack, each)
    separate = cache.append(*new, query_seq_lengths=counts, implementation="xla")
    for layer, order in enumerate((slice(None, None, -1), slice(None), slice(None, None, -1))):
        of_layer, own = jax.tree.map(lambda x, layer=layer, order=order: x[layer][order], (got, stack))
        assert_same(of_layer, expected, exact, implementation)
        np.testing.assert_array_equal(own.length, separate.length)
        for b, total in enumerate(separate.length):
            chex.assert_trees_all_equal(own.key[b, :total], separate.key[b, :total])
            chex.assert_trees_all_equal(own.value[b, :total], separate.value[b, :total])


# --- how many programs share the work

_LENGTHS = {"query_seq_lengths": (3, 2), "key_value_seq_lengths": (290, 65)}
FEW = {
    "one query, three splits": Workload("few", 2, 1, 300, 4, 2, 64, 64, "bfloat16", is_causal=True, split_size=128),
    "one split": Workload("few", 1, 1, 200, 2, 2, 128, 256, "bfloat16", is_causal=True),
    "lengths, window, soft cap": Workload(
        "few", 2, 3, 300, 8, 2, 64, 64, "float16", is_causal=True, local_window_size=(100, 0), logits_soft_cap=4.0, split_size=128, **_LENGTHS
    ),
    "two tiles of rows": Workload("few", 1, 20, 300, 8, 1, 64, 128, "bfloat16", is_causal=True, split_size=256),
    "float32": Workload("few", 1, 2, 300, 4, 2, 64, 64, "float32", is_causal=True, split_size=128),
    "a short chain": Workload("few", 1, 1, 300, 4, 2, 64, 64, "bfloat16", is_causal=True, split_size=None),
}  # fmt: skip


@pytest.mark.parametrize("case", FEW)
def test_programs_that_share_a_split_change_nothing(case, monkeypatch):
    """What many multiprocessors do, because their programs would be few, gives what few multiprocessors do."""
    monkeypatch.setattr(decode_kernel, "_LONG_CHAIN", 1 if case != "a short chain" else 16)
    w, scores_first = FEW[case], case not in ("a short chain", "float32", "two tiles of rows")
    arrays = inputs(w)
    problem = problem_of(*arrays[:3], split_size=w.split_size, **w.options)
    rows, tiles = Rows(*map(int32, w.lengths.values())), tiles_for(target_gpu(), problem)
    few, many = (decode_kernel.cut_for(problem, tiles.decode, multiprocessors) for multiprocessors in (1, 1000))
    assert few.parts == 1 < many.parts
    assert (few.scores_first, many.scores_first) == (False, scores_first)

    def run(multiprocessors):
        out, lse = jax.jit(lambda q, k, v: decode_kernel.decode(q, k, v, rows, problem, tiles, multiprocessors))(*arrays[:3])
        return out, lse.swapaxes(1, 2)

    together, shared = run(1), run(1000)
    exact = oracle(arrays, **w.options)
    assert forward_errors(shared, exact) <= 1.0
    if few.per_split == many.per_split:
        assert_same(shared, together, exact, "triton")


_KEYS = np.array([64, 0, 300, 65, 128, 65, -3])  # of rows; below 0 are none


def test_rows_are_taken_by_their_lengths():
    """Each at one place, the longest at the first; of equal ones the first comes first. Numbers that are no lengths are at some place."""
    for keys in (_KEYS, _KEYS[:5], np.array([5, -(2**31), 2**31 - 1, 2**29, -(2**29)])):
        B = len(keys)
        w = Workload("rows", B, 1, 300, 2, 2, 64, 64, "bfloat16", key_value_seq_lengths=(0,) * B)
        problem = problem_of(*inputs(w)[:3], **w.options)

        def kernel(keys_ref, out_ref, problem=problem):
            out_ref[0] = decode_kernel._by_length((keys_ref,), problem, pl.program_id(0))

        specs = {"in_specs": [pl.BlockSpec((8,), lambda i: (0,))], "out_specs": [pl.BlockSpec((1,), lambda i: (i,))]}
        (found,) = launch(kernel, jnp.int32(keys), name="rows", grid=(B,), **specs, out_shape=[((B,), jnp.int32)], tile=Tile(0, 0, 4, 1))
        chex.assert_trees_all_equal(np.sort(found), np.arange(B, dtype=np.int32))
        if abs(keys).max() <= w.S:
            chex.assert_trees_all_equal(np.asarray(found), np.argsort(-keys, kind="stable").astype(np.int32))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("layers", [None, 3])
def test_the_order_of_the_rows_changes_nothing(layers, splits, monkeypatch):
    """More programs than run at once take their rows by length: the bits of those that take them as they come."""
    counts, w = np.array([2, 2, 2, 1, 2, 0, 2]), Workload("rows", len(_KEYS), 2, 300, 4, 2, 64, 64, "bfloat16", is_causal=True)
    query, key, value = inputs(w)[:3]
    rows = Rows(jnp.int32(counts), jnp.int32(_KEYS))
    if layers is not None:
        key, value = (jnp.stack([x[::-1], x, x[::-1]]) for x in (key, value))
        others = rows.key_length[::-1]
        keys, overflowed = jnp.stack([others, rows.key_length, others]), jnp.zeros((layers, w.B), bool).at[1, 4].set(True)
        rows = Rows(rows.query_length, keys, overflowed, jnp.array([1], jnp.int32))
    lengths = {"query_seq_lengths": counts} | ({"key_value_seq_lengths": _KEYS} if layers is None else {"cached": True})
    problem = problem_of(query, key, value, is_causal=True, split_size=512 if splits == 1 else 128, **lengths)
    tiles = tiles_for(target_gpu(), problem)

    def run(most_sorted):
        monkeypatch.setattr(decode_kernel, "_MOST_SORTED", most_sorted)
        cut = decode_kernel.cut_for(problem, tiles.decode, 1)
        assert (cut.short_last, cut.splits) == (most_sorted > 0, splits)
        assert [cut.split(jnp.int32(tile))[1] for tile in range(splits)] == (
            [1, 2, 0] if cut.short_last and splits > 1 else [*range(splits)]
        )
        return jax.jit(lambda *args: decode_kernel.decode(*args, problem, tiles, 1))(query, key, value, rows)

    chex.assert_trees_all_equal(run(64), run(0))


@pytest.mark.parametrize("case", ["one query, three splits", "lengths, window, soft cap"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_computed_first_at_large_logits(case, sign, monkeypatch):
    """All near +300 or all near -300 beside the ordinary ones, and under a soft cap near its end: blocks' highest ones decide."""
    monkeypatch.setattr(decode_kernel, "_LONG_CHAIN", 1)
    w = FEW[case]
    if w.logits_soft_cap:
        w = dataclasses.replace(w, logits_soft_cap=60.0)
    arrays = inputs(w)
    arrays = arrays._replace(query=(arrays.query * 8).at[..., 0].set(48.0 * sign), key=(arrays.key * 8).at[..., 0].set(48.0))
    problem = problem_of(*arrays[:3], split_size=w.split_size, **w.options)
    rows, tiles = Rows(*map(int32, w.lengths.values())), tiles_for(target_gpu(), problem)
    assert decode_kernel.cut_for(problem, tiles.decode, 1000).scores_first
    out, lse = jax.jit(lambda q, k, v: decode_kernel.decode(q, k, v, rows, problem, tiles, 1000))(*arrays[:3])
    assert forward_errors((out, lse.swapaxes(1, 2)), oracle(arrays, **w.options)) <= 1.0


def test_scores_computed_first_over_a_stacked_cache(monkeypatch):
    """The middle layer of three; rows of their own lengths, one without room; poison in unused slots and in padding."""
    monkeypatch.setattr(decode_kernel, "_LONG_CHAIN", 1)
    computed = []
    scores_first = decode_kernel._scores_first
    monkeypatch.setattr(decode_kernel, "_scores_first", lambda *arguments: computed.append(True) or scores_first(*arguments))
    before, counts = np.array([250, 0, 64, 289]), np.array([3, 3, 1, 3])
    totals = np.minimum(before + counts, 291)
    w = Workload(
        "scores first", 4, 3, 291, 4, 2, 64, 64, "bfloat16", is_causal=True, split_size=128,
        query_seq_lengths=tuple(counts), key_value_seq_lengths=tuple(totals),
    )  # fmt: skip
    arrays = inputs(w)
    exact = oracle(arrays, **w.options)
    for poison in (np.nan, np.inf):
        cache, new = split_at(arrays, before, counts, w.T, unused=poison)
        stack = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x[::-1]]), cache)
        query = tokens_of(arrays.query, [0] * 4, counts, w.T, poison)
        got, after = attend(query, *new, stack, jnp.asarray(counts, jnp.int32), jnp.int32(1), options=options_of(w, "triton"))
        np.testing.assert_array_equal(after.overflowed[1], [False, False, False, True])
        assert all(np.all(np.isnan(x[3])) for x in got)
        assert forward_errors(*jax.tree.map(lambda x: x[:3], (jax.device_get(got), exact))) <= 1.0
    assert computed  # when it was traced: no other test has this call
