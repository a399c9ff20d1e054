"""`attention_with_kv_cache` is causal attention over the whole sequence, however its tokens are cut into calls, and nothing else."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import on_gpu

import flashcore_jax
from flashcore_jax import CacheOverflowError, DtypeError, KVCache, OptionError, ShapeError, attention_with_kv_cache, reference
from flashcore_jax.testing import GRADIENT_GATE, UNIT_ROUNDOFF, Inputs, Results, Workload, assert_right, errors, inputs, oracle


def options_of(w: Workload, implementation, **changed) -> tuple:
    """The options of a call, hashable: static arguments of the jitted functions below."""
    names = ("is_causal", "scale", "local_window_size", "logits_soft_cap", "split_size")
    return tuple(({name: getattr(w, name) for name in names} | {"implementation": implementation} | changed).items())


@functools.partial(jax.jit, static_argnames="options")
def attend(query, key, value, cache, lengths=None, layer=None, *, options):
    """One call: (out, lse), cache."""
    out, lse, cache = attention_with_kv_cache(
        query, key, value, cache, query_seq_lengths=lengths, layer=layer, return_lse=True, **dict(options)
    )
    return (out, lse), cache


def empty_cache(w: Workload, capacity=None) -> KVCache:
    """Its slots hold NaN, so that whoever reads what was not written is found out."""
    cache = KVCache.create(w.B, capacity or w.S, w.K, w.H, value_head_dim=w.Hv, dtype=w.dtype)
    return dataclasses.replace(cache, key=jnp.full_like(cache.key, jnp.nan), value=jnp.full_like(cache.value, jnp.nan))


def tokens_of(array, start, count, size, padding=jnp.nan):
    """[B, size, ...]: of each row the tokens from `start` on, `count` of them, then `padding`; behind the last slot, the last."""
    at = np.minimum(np.asarray(start)[:, None] + np.arange(size), array.shape[1] - 1)
    found = np.asarray(array)[np.arange(len(at))[:, None], at]
    found[np.arange(size) >= np.asarray(count)[:, None]] = padding
    return jnp.asarray(found)


def in_chunks(arrays: Inputs, cache: KVCache, start, until, size, options):
    """Gives each row its own tokens, from `start`, which it has, up to `until`, at most `size` at a time; padding is NaN.

    Returns (out, lse), cache: the outputs where the tokens stand in the sequence, and 0 and -inf elsewhere.
    """
    start, until, calls = np.asarray(start), np.asarray(until), []
    query, key, value = (np.asarray(x) for x in arrays[:3])
    while np.any(start < until):
        count = np.minimum(until - start, size)
        new = (tokens_of(x, start, count, size) for x in (query, key, value))
        got, cache = attend(*new, cache, jnp.asarray(count, jnp.int32), options=options)
        calls.append((start, count, got))
        start = start + count
    out = np.zeros((*arrays.query.shape[:3], arrays.value.shape[-1]), arrays.query.dtype)
    lse = np.full(out.shape[:3], -np.inf, np.float32)
    for start, count, got in calls:
        for b, n in enumerate(count):
            out[b, start[b] : start[b] + n], lse[b, start[b] : start[b] + n] = (np.asarray(x[b, :n]) for x in got)
    return (out, lse), cache


def split_at(arrays: Inputs, lengths, counts, T, capacity=None, unused=jnp.nan):
    """The keys and values of whole rows as a cache with each row's first `lengths`, and the `counts` behind them as T new ones."""
    S = arrays.key.shape[1]
    used = (np.arange(S) < np.asarray(lengths)[:, None])[..., None, None]
    room = ((0, 0), (0, (capacity or S) - S), (0, 0), (0, 0))
    slots = (jnp.pad(jnp.where(used, x, unused).astype(x.dtype), room, constant_values=unused) for x in arrays[1:3])
    cache = KVCache(*slots, jnp.asarray(lengths, jnp.int32), jnp.zeros(len(lengths), bool))
    return cache, [tokens_of(x, lengths, counts, T, unused) for x in arrays[1:3]]


# --- what "equal" means


def forward_errors(got, exact) -> float:
    """The larger of the errors of out and lse, as fractions of their gates."""
    out, lse = got
    gradients = (jnp.asarray(x, out.dtype) for x in exact.exact[2:])  # not asked for: the exact ones
    found = errors(Results(out, lse, *gradients), exact)
    return max(found["out"], found["lse"])


def assert_within(got, expected, allowed):
    got, expected = (np.asarray(x).astype(np.float64) for x in (got, expected))
    with np.errstate(invalid="ignore"):  # -inf less -inf, where the two are equal
        difference = np.where(got == expected, 0.0, np.abs(got - expected))
    assert np.all(difference <= allowed), f"{np.nanmax(difference / np.maximum(allowed, 1e-30)):.3g} of what is allowed"


def assert_near(got, expected, exact):
    """`got` obeys the gate, and `expected` is a reference, in float32: off by the gate at most, and float32's own."""
    dtype = str(got[0].dtype)
    own = UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF[dtype]
    # Half an ulp of x is eps * |x| / 2 at most, and half the smallest number where x is subnormal.
    info = jnp.finfo(dtype)
    last = 0.5 * np.maximum(float(info.eps) * np.abs(exact.exact.out), float(info.smallest_subnormal))
    assert_within(got[0], expected[0], (1 + own) * exact.bound.out + last)
    assert_within(got[1], expected[1], 2 * exact.bound.lse)


def assert_same(got, expected, exact, implementation):
    """Two ways to compute one thing: the same bits where they are promised, elsewhere what two right results may differ by.

    Both obey the gate, so they are two gates apart at most: two roundings of P, and an ulp of the output. That is a worst case,
    for each number. What differs is the order of float32 additions alone, so before anything is rounded to 16 bits the two are
    within float32's gates, 2 * 2^-19 of the terms' size. Rounded, they differ only if the border between two float16 numbers,
    2^-10 apart, lies between them: for 1 in 2^8 numbers, or 1 in 25 where the output is a tenth of its terms. (The few P that
    fall on other sides of a border move a sum of many by less than that.) One in 8 is allowed; a wrong key changes them all.
    """
    chex.assert_trees_all_equal_shapes_and_dtypes(got, expected)
    is_16_bit = got[0].dtype != jnp.float32
    if on_gpu() and implementation == "triton" and is_16_bit:
        chex.assert_trees_all_equal(got, expected)
        return
    info = jnp.finfo(got[0].dtype)
    ulp = np.maximum(float(info.eps) * np.abs(exact.exact.out), float(info.smallest_subnormal))
    assert_within(got[0], expected[0], 2 * exact.bound.out + ulp)
    assert_within(got[1], expected[1], 2 * exact.bound.lse)
    if is_16_bit:
        sees = np.isfinite(exact.exact.lse)
        assert np.mean((got[0] != expected[0])[sees]) <= 1 / 8


def assert_holds(cache: KVCache, arrays: Inputs, length):
    """The cache has these lengths, and to the bit these tokens."""
    np.testing.assert_array_equal(cache.length, length)
    assert not np.any(cache.overflowed)
    for b, count in enumerate(length):
        chex.assert_trees_all_equal((cache.key[b, :count], cache.value[b, :count]), (arrays.key[b, :count], arrays.value[b, :count]))


# --- full == prefill + decode == every chunking

TOTALS = (290, 0, 131, 77)  # three splits of 128; none; just over one; less than one
_all = dict(B=4, T=290, S=290, is_causal=True, query_seq_lengths=TOTALS, key_value_seq_lengths=TOTALS, split_size=128)
CASES = {
    "bfloat16, 4:2": Workload("cache", N=4, K=2, H=16, Hv=24, dtype="bfloat16", **_all),
    "float16, 4:1, window, soft cap": Workload(
        "cache", N=4, K=1, H=32, Hv=16, dtype="float16", local_window_size=(150, 0), logits_soft_cap=4.0, **_all
    ),
    "float32, 3:3": Workload("cache", N=3, K=3, H=40, Hv=40, dtype="float32", **_all),
    "float16, 4:2, scale below 0": Workload("cache", N=4, K=2, H=16, Hv=16, dtype="float16", scale=-0.25, **_all),
}
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
def whole_sequence(implementation, case, shorter=0):
    """(out, lse) of one call of `attention`."""
    w = CASES[case]
    call = attention_of(options_of(w, implementation))
    keys = np.maximum(w.lengths["key_value_seq_lengths"] - shorter, 0)
    return call(*exact_whole(case)[0][:3], query_seq_lengths=w.lengths["query_seq_lengths"], key_value_seq_lengths=keys)


@functools.cache
def attention_of(options):
    return jax.jit(functools.partial(flashcore_jax.attention, return_lse=True, **dict(options)))


@pytest.mark.parametrize("case", SIZES)
def test_both_references_are_exact(case):
    """In float32, where the chunks are compared with them in their own dtype."""
    w, (_, exact) = CASES[case], exact_whole(case)
    own = UNIT_ROUNDOFF["float32"] / UNIT_ROUNDOFF[w.dtype]
    for out, lse in references(case):
        assert_within(out, exact.exact.out, own * exact.bound.out)
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
@pytest.mark.parametrize("split_size", [256, None])
def test_another_split_size_has_other_bits(split_size):
    """Equally right, and seen by the comparison of bits: it is not one that cannot fail."""
    case = "bfloat16, 4:2"
    w, (arrays, exact) = CASES[case], exact_whole(case)
    got, _ = in_chunks(arrays, empty_cache(w), [0] * 4, TOTALS, 1, options_of(w, "triton", split_size=split_size))
    assert forward_errors(got, exact) <= 1.0
    with pytest.raises(AssertionError):
        assert_same(got, whole_sequence("triton", case), exact, "triton")


# --- one call over a cache that holds something


def tail(case, T, lengths, counts) -> tuple[Workload, Inputs]:
    """Rows of which a cache holds the first `lengths` tokens, and `counts` of T new ones are real."""
    totals = tuple(int(n) for n in np.add(lengths, counts))
    counts = tuple(int(n) for n in counts)
    w = dataclasses.replace(CASES[case], T=T, B=len(counts), query_seq_lengths=counts, key_value_seq_lengths=totals)
    return w, inputs(w)


def call_after(w, arrays: Inputs, lengths, implementation, unused=jnp.nan, capacity=None):
    counts = w.query_seq_lengths
    cache, new = split_at(arrays, lengths, counts, w.T, capacity, unused)
    query = tokens_of(arrays.query, [0] * len(counts), counts, w.T, unused)
    return attend(query, *new, cache, jnp.asarray(counts, jnp.int32), options=options_of(w, implementation))


@pytest.mark.parametrize("case", ["bfloat16, 4:2", "float16, 4:2, scale below 0", "float32, 3:3"])
@pytest.mark.parametrize("near", [0, -30])
def test_ones_stay_ones(implementation, near, case):
    """V = 1 gives 1, before, at and behind the ends of blocks and splits. With every score near -30, a slot that was never
    written, let in with score 0, would outweigh all others: the slots hold 0 here, as `create` leaves them."""
    T, lengths = 7, [16, 57, 121, 250]
    w, arrays = tail(case, T, lengths, [T] * 4)
    scale = w.scale or w.H**-0.5
    arrays = arrays._replace(
        query=arrays.query.at[..., 0].set(near), key=arrays.key.at[..., 0].set(1 / scale), value=jnp.ones_like(arrays.value)
    )
    (out, lse), cache = call_after(w, arrays, lengths, implementation, unused=0.0)
    np.testing.assert_array_equal(cache.length, np.add(lengths, T))
    exact = oracle(arrays, **w.options)
    assert forward_errors((out, lse), exact) <= 1.0
    assert np.all((exact.exact.lse < -15) if near else (exact.exact.lse > -5))  # the inputs are what they are meant to be
    if w.dtype == "float32":
        chex.assert_trees_all_close(out, jnp.ones_like(out), atol=UNIT_ROUNDOFF["float32"], rtol=0)
    else:
        # Roundings of P have random signs. From 16 keys on their mean is below u / 8, and 1 - u / 2 still rounds to 1.
        np.testing.assert_array_equal(out, 1.0)


@pytest.mark.parametrize("case", ["bfloat16, 4:2", "float16, 4:2, scale below 0"])
def test_large_logits(implementation, case):
    """|logits| up to about 1000, both signs, over three splits: finite, and the gate as ever."""
    lengths = [283, 0, 100, 130]
    w, arrays = tail(case, 7, lengths, [7, 7, 1, 4])
    arrays = arrays._replace(query=arrays.query * 16, key=arrays.key * 16)
    got, _ = call_after(w, arrays, lengths, implementation)
    exact = oracle(arrays, **w.options)
    assert 500 < np.max(np.abs(exact.exact.lse[np.isfinite(exact.exact.lse)])) < 2000
    chex.assert_tree_all_finite((got[0], jnp.exp(-jnp.abs(got[1]))))
    assert forward_errors(got, exact) <= 1.0


@pytest.mark.parametrize(("N", "K"), [(4, 4), (8, 4), (8, 2), (8, 1), (32, 1), (7, 1), (28, 4)])
def test_every_query_head_reads_its_groups_key_value_head(implementation, N, K):
    """V = the number of the kv head, in the cache and in the new tokens, so the output is it."""
    w = Workload("heads", 2, 2, 19, N, K, 8, 8, "float32", is_causal=True, query_seq_lengths=(2, 2), key_value_seq_lengths=(19, 6))
    arrays = inputs(w)
    arrays = arrays._replace(value=jnp.broadcast_to(jnp.arange(K, dtype=jnp.float32)[:, None], arrays.value.shape))
    (out, _), _ = call_after(w, arrays, [17, 4], implementation)

    def right(head_of):
        return np.allclose(out[..., 0], np.broadcast_to(head_of, (2, 2, N)), rtol=2**-19, atol=2**-19)

    assert right(np.arange(N) // (N // K))
    if 1 < K < N:  # else the two are the same
        assert not right(np.arange(N) % K)


@pytest.mark.parametrize("window", [None, (3, 5)], ids=str)
def test_who_sees_whom_where_it_is_not_causal(implementation, window):
    """Equal scores and V = identity: each output row is 1 / count at the slots that it sees, new tokens behind it included."""
    T, S, lengths, counts = 9, 48, np.array([20, 0, 7, 30]), np.array([9, 4, 0, 9])
    zeros, identity = jnp.zeros((4, S, 1, 8)), jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (4, S, 1, S))
    w = Workload("sees", 4, T, S, 1, 1, 8, S, "float32", local_window_size=window, query_seq_lengths=tuple(counts))
    (out, _), _ = call_after(w, Inputs(zeros[:, :T], zeros, identity, None, None), lengths, implementation)
    left, right = window or (S, S)
    for b, i in np.ndindex(4, T):
        p = lengths[b] + i
        seen = np.array([i < counts[b] and j < lengths[b] + counts[b] and p - left <= j <= p + right for j in range(S)], float)
        np.testing.assert_allclose(out[b, i, 0], seen / max(seen.sum(), 1), rtol=2**-20, atol=0)


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


# --- overflow

OTHERS = np.array([0, 2, 3])


@pytest.mark.parametrize("T", [1, 7])
def test_overflow_under_jit_is_nan_for_that_row_and_only_it(implementation, T):
    """The others have the bits that they have beside a row with room; and the row is NaN until it is whole again."""
    lengths = np.array([290 - T, 291 - T, 0, 128])
    w, arrays = tail("bfloat16, 4:2", T, lengths, [T] * 4)
    (cache, new), options = split_at(arrays, lengths, [T] * 4, T), options_of(w, implementation)
    counts = jnp.full(4, T)
    got, after = attend(arrays.query, *new, cache, counts, options=options)
    np.testing.assert_array_equal(after.overflowed, [False, True, False, False])
    np.testing.assert_array_equal(after.length, [290, lengths[1], T, 128 + T])
    chex.assert_trees_all_equal((after.key[1], after.value[1]), (cache.key[1], cache.value[1]))
    with pytest.raises(CacheOverflowError, match=r"rows \[1\]"):
        after.check()
    pick = functools.partial(jax.tree.map, lambda x: x[OTHERS])
    beside = attend(arrays.query, *new, cache.truncate(np.array([290, 5, 290, 290])), counts, options=options)
    chex.assert_trees_all_equal(pick((got, after)), pick(beside))
    chex.assert_tree_all_finite(pick(got))
    assert all(np.all(np.isnan(x[1])) for x in got)
    # It stays NaN in a call that asks for nothing.
    got, still = attend(arrays.query, *new, after, jnp.zeros(4, jnp.int32), options=options)
    assert all(np.all(np.isnan(x[1])) for x in got)
    np.testing.assert_array_equal(got[0][OTHERS], 0.0)
    chex.assert_trees_all_equal(still, after)
    # Rolled back to where there is room, it has the bits of a row that never overflowed.
    back = np.array([0, 290 - T, 0, 0])
    healed = attend(arrays.query, *new, still.truncate(back), counts, options=options)
    clean = attend(arrays.query, *new, cache.truncate(back), counts, options=options)
    chex.assert_trees_all_equal(healed[0], clean[0])
    chex.assert_tree_all_finite(healed[0])
    healed[1].check()


def test_an_exact_fit_to_the_last_slot(implementation):
    """Without jit: the call that fills a row is right, and the next raises before it writes."""
    lengths, T = [283, 0, 283, 50], 7
    w, arrays = tail("bfloat16, 4:2", T, lengths, [T] * 4)
    cache, new = split_at(arrays, lengths, [T] * 4, T)
    options = dict(options_of(w, implementation))
    out, lse, full = attention_with_kv_cache(arrays.query, *new, cache, return_lse=True, **options)
    assert forward_errors((out, lse), oracle(arrays, **w.options)) <= 1.0
    assert_holds(full, arrays, w.key_value_seq_lengths)
    before = jax.tree.map(np.array, full)
    with pytest.raises(CacheOverflowError, match=r"rows \[0, 2\]"):
        attention_with_kv_cache(arrays.query, *new, full, **options)
    chex.assert_trees_all_equal(full, before)


# --- cache-precision.md: the items of its table that have a cache, fp16, largest difference from float64 rounded to fp16


# Each gate is one ulp of numbers up to a certain size: of N(0, 1) inputs these are some whose outputs are no larger.
SEED = 11


def difference_from_rounded(got, exact, gate) -> float:
    """The largest, as a fraction of the gate."""
    assert np.max(np.abs(exact.exact.out)) < gate * 2**11
    assert forward_errors(got, exact) <= 1.0
    rounded = exact.exact.out.astype(np.float16).astype(np.float64)
    return float(np.max(np.abs(np.asarray(got[0], np.float64) - rounded))) / gate


@pytest.mark.parametrize(
    ("N", "K", "is_causal", "steps", "gate", "decode_gate"),
    # The table's 0.00195 is 2^-9, 0.00098 is 2^-10, 0.00049 is 2^-11, 0.00024 is 2^-12.
    [(8, 8, True, 10, 2**-9, 2**-11), (32, 8, False, 5, 2**-10, 2**-10), (32, 8, True, 5, 2**-9, 2**-10)],
    ids=["prefill + decode", "GQA + cache", "causal + cache, GQA"],
)
def test_gates_of_prefill_and_decode(implementation, N, K, is_causal, steps, gate, decode_gate):
    """The matching reference of a call that is not causal is not causal itself, over the tokens that are there by then."""
    prompt, S = 64, 64 + steps
    w = Workload("prefill and decode", 2, S, S, N, K, 64, 64, "float16", is_causal=is_causal)
    arrays, options = inputs(w, SEED), options_of(w, implementation)
    cache = empty_cache(w)
    for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, S))]:
        query, *cotangents = (a[:, start:stop] for a in (arrays.query, arrays.out_cotangent, arrays.lse_cotangent))
        exact = oracle(Inputs(query, arrays.key[:, :stop], arrays.value[:, :stop], *cotangents), is_causal=is_causal)
        got, cache = attend(*(a[:, start:stop] for a in arrays[:3]), cache, options=options)
        assert difference_from_rounded(got, exact, gate if start == 0 else decode_gate) <= 1.0
    assert_holds(cache, arrays, [S, S])


@pytest.mark.parametrize(
    ("B", "prompt", "T", "capacity", "gate"), [(4, 0, 128, 128, 2**-11), (2, 256, 1, 4096, 2**-12)], ids=["first call", "single decode"]
)
def test_gates_of_one_call(implementation, B, prompt, T, capacity, gate):
    """Not causal. The decode uses a part of the first of its splits, and reads nothing of the other slots."""
    S = prompt + T
    w = Workload("one call", B, T, S, 8, 8, 64, 64, "float16")
    arrays = inputs(w, SEED)
    cache, new = split_at(arrays, [prompt] * B, [T] * B, T, capacity)
    got, cache = attend(arrays.query, *new, cache, options=options_of(w, implementation))
    assert_holds(cache, arrays, [S] * B)
    assert difference_from_rounded(got, oracle(arrays, **w.options), gate) <= 1.0


@pytest.mark.parametrize("size", [1, 8])
def test_causal_means_of_a_ramp(implementation, size):
    """Q = K = 1 and V = 0..7 give out[i] = i / 2, to one ulp: one by one as all at once."""
    w = Workload("ramp", 1, 8, 8, 1, 1, 8, 8, "float16", is_causal=True)
    ones = jnp.ones((1, 8, 1, 8), jnp.float16)
    ramp = ones * jnp.arange(8, dtype=jnp.float16)[None, :, None, None]
    (out, _), _ = in_chunks(Inputs(ones, ones, ramp, None, None), empty_cache(w, 40), [0], [8], size, options_of(w, implementation))
    expected = np.broadcast_to(np.arange(8.0)[:, None] / 2, (8, 8))
    np.testing.assert_allclose(out[0, :, 0].astype(np.float64), expected, rtol=2**-10, atol=0)


# --- gradients, and poison


@functools.partial(jax.jit, static_argnames="options")
def differentiate(query, new, cache, lengths, cotangents, layer=None, *, options):
    """(out, lse), and the gradients of query, the new key and value, and the cache's key and value."""

    def call(query, new, key, value):
        state = dataclasses.replace(cache, key=key, value=value)
        return attend(query, *new, state, lengths, layer, options=options)[0]

    got, pull = jax.vjp(call, query, new, cache.key, cache.value)
    return got, pull(cotangents)


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
    layer = None
    if "layer" in w.name:
        cache, layer = jax.tree.map(lambda x: jnp.stack([x[::-1], x, x]), cache), jnp.int32(1)
    cotangents = arrays.out_cotangent, arrays.lse_cotangent
    got, (dquery, dnew, *dcache) = differentiate(
        arrays.query, new, cache, jnp.asarray(counts), cotangents, layer, options=options_of(w, implementation)
    )
    if layer is not None:
        for x in dcache:
            np.testing.assert_array_equal(x[::2], 0.0)
        dcache = [x[1] for x in dcache]
    # The gradients of the cache's contents and of the new tokens, put where the tokens stand in the sequence. The rest is 0.
    whole = [np.zeros(x.shape, np.float64) for x in arrays[1:3]]
    for b, (before, count) in enumerate(zip(BEFORE, counts, strict=True)):
        for full, cached, added in zip(whole, dcache, dnew, strict=True):
            full[b, :before], full[b, before : before + count] = cached[b, :before], added[b, :count]
            np.testing.assert_array_equal(cached[b, before:], 0.0)
            np.testing.assert_array_equal(added[b, count:], 0.0)
    results = Results(*got, dquery, *(jnp.asarray(x, w.dtype) for x in whole))
    assert_right(results, oracle(arrays, **w.options))
    for a, b in zip(results[2:], reference_gradients(w), strict=True):
        difference, size = (jnp.sqrt(jnp.mean(jnp.square(x))) for x in (a.astype(jnp.float32) - b, b))
        # assert_right holds the one to this gate, and the reference, in float32, is better than it.
        assert difference <= 2 * GRADIENT_GATE[w.dtype] * size


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
    arrays, counts, before = inputs(w), jnp.full(4, w.T), np.array([183, 184, 0, 7])
    cache, new = split_at(arrays, before, counts, w.T)
    run = functools.partial(differentiate, options=options_of(w, implementation))
    cotangents = arrays.out_cotangent, arrays.lse_cotangent
    (_, lse), gradients = run(arrays.query, new, cache, counts, cotangents)
    assert np.all(np.isnan(lse[1]))
    chex.assert_tree_all_finite(gradients)
    for x in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(x[1], 0.0)
    _, expected = run(arrays.query, new, cache.truncate(np.array([200, 5, 200, 200])), counts, cotangents)
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[OTHERS], x) for x in (gradients, expected)))


def test_xla_has_forward_mode_in_every_argument():
    """README: "xla" has every order and mode."""
    w = Workload("forward mode", 1, 2, 9, 2, 1, 8, 8, "float32", is_causal=True)
    arrays = inputs(w)[:3]

    def with_cache(query, key, value):
        cache = KVCache.create(1, 9, 1, 8, dtype=jnp.float32).append(key[:, :7], value[:, :7], implementation="xla")
        return attention_with_kv_cache(query, key[:, 7:], value[:, 7:], cache, implementation="xla")[0]

    tangents = tuple(jnp.cos(a) for a in arrays)
    plain = functools.partial(reference.attention, is_causal=True)
    got, expected = (jax.jit(functools.partial(jax.jvp, call))(arrays, tangents)[1] for call in (with_cache, plain))
    assert jnp.sqrt(jnp.mean(jnp.square(got - expected))) <= 2 * GRADIENT_GATE["float32"] * jnp.sqrt(jnp.mean(jnp.square(expected)))


# --- JAX's transformations


def test_vmap(implementation):
    """Over a second batch axis: two caches, and each call's own lengths. One row overflows in one of them."""
    case, T = "bfloat16, 4:2", 7
    lengths, counts = ([0, 283, 20, 5], [284, 1, 130, 11]), np.array([[7, 7, 1, 0], [7, 2, 7, 1]])
    calls, exact = [], []
    for seed in range(2):
        fits = np.where(np.add(lengths[seed], counts[seed]) <= 290, counts[seed], 0)
        w, _ = tail(case, T, lengths[seed], fits)
        arrays = inputs(w, seed)
        exact.append(oracle(arrays, **w.options))
        calls.append((arrays.query, *split_at(arrays, lengths[seed], counts[seed], T), jnp.asarray(counts[seed], jnp.int32)))
    options = options_of(w, implementation)

    def call(query, cache, new, counts):
        return attend(query, *new, cache, counts, options=options)

    got = jax.jit(jax.vmap(call))(*jax.tree.map(lambda *x: jnp.stack(x), *calls))
    np.testing.assert_array_equal(got[1].overflowed, [[False] * 4, [True, False, False, False]])
    for i, rows in enumerate((slice(0, 4), slice(1, 4))):
        mapped, (alone, cache) = jax.tree.map(lambda x, i=i: x[i], got), call(*calls[i])
        chex.assert_trees_all_equal(mapped[1], cache)
        pick = functools.partial(jax.tree.map, lambda x, rows=rows: x[rows])
        assert_same(pick(mapped[0]), pick(alone), pick(exact[i]), implementation)
        assert forward_errors(pick(mapped[0]), pick(exact[i])) <= 1.0
    assert np.all(np.isnan(got[0][0][1, 0]))


def test_donation_in_a_loop(implementation):
    """A donated stack of caches, carried through a while_loop: what the loop leaves is right, and lies where the cache lay."""
    lengths, T = np.array([18, 3]), 6
    w = Workload("loop", 2, T, 24, 2, 1, 16, 16, "float32", is_causal=True, query_seq_lengths=(6, 6), key_value_seq_lengths=(24, 9))
    arrays, options = inputs(w), options_of(w, implementation)
    cache, new = split_at(arrays, lengths, [T, T], T)
    stack = jax.tree.map(lambda x: jnp.stack([x[::-1], x]), cache)
    first_layer = jax.tree.map(np.array, cache)

    @functools.partial(jax.jit, donate_argnums=0)
    def loop(stack):
        def step(state):
            t, stack, outs, lses = state
            one = (jax.lax.dynamic_slice_in_dim(x, t, 1, 1) for x in (arrays.query, *new))
            (out, lse), stack = attend(*one, stack, layer=jnp.int32(1), options=options)
            return t + 1, stack, *(jax.lax.dynamic_update_slice_in_dim(a, b, t, 1) for a, b in ((outs, out), (lses, lse)))

        nothing = jnp.zeros((2, T, 2, 16)), jnp.zeros((2, T, 2))
        return jax.lax.while_loop(lambda state: state[0] < T, step, (0, stack, *nothing))

    addresses = [x.unsafe_buffer_pointer() for x in (stack.key, stack.value)]
    _, after, *got = loop(stack)
    assert stack.key.is_deleted()
    assert [x.unsafe_buffer_pointer() for x in (after.key, after.value)] == addresses
    assert forward_errors(got, oracle(arrays, **w.options)) <= 1.0
    assert_holds(jax.tree.map(lambda x: x[1], after), arrays, [24, 9])
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0, ::-1], after), first_layer)


# --- mistakes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


RIGHT = {"query": array(2, 5, 4, 16), "key": array(2, 5, 2, 16), "value": array(2, 5, 2, 8)}
WRONG = [
    ("more queries than new keys", {"query": array(2, 6, 4, 16)}, ShapeError),
    ("fewer queries than new keys", {"query": array(2, 1, 4, 16)}, ShapeError),
    ("heads that no group divides", {"query": array(2, 5, 7, 16)}, ShapeError),
    ("query's head dim", {"query": array(2, 5, 4, 24)}, ShapeError),
    ("another batch", {"query": array(3, 5, 4, 16)}, ShapeError),
    ("query's dtype", {"query": array(2, 5, 4, 16, dtype=jnp.bfloat16)}, DtypeError),
    ("the new tokens' dtype", {"key": array(2, 5, 2, 16, dtype=jnp.bfloat16)}, DtypeError),
    ("the new tokens' heads", {"key": array(2, 5, 4, 16), "value": array(2, 5, 4, 8)}, ShapeError),
    ("lengths as floats", {"query_seq_lengths": array(2)}, DtypeError),
    ("lengths of another batch", {"query_seq_lengths": array(3, dtype=jnp.int32)}, ShapeError),
    ("a layer of none", {"layer": 0}, OptionError),
    ("a window of -1", {"local_window_size": -1}, OptionError),
    ("a split of 100", {"split_size": 100}, OptionError),
]


@pytest.mark.parametrize(("changed", "error"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_arguments(changed, error):
    cache = KVCache.create(2, 20, 2, 16, value_head_dim=8, dtype=jnp.float32)
    arguments = RIGHT | changed
    arrays = {name: a for name, a in arguments.items() if hasattr(a, "shape")}
    static = {name: a for name, a in arguments.items() if name not in arrays}
    with pytest.raises(error, match=r"^expected .*; got .*; "):
        jax.eval_shape(lambda **arrays: attention_with_kv_cache(**arrays, **static, cache=cache), **arrays)


def test_32_query_heads_on_7_raise_and_on_8_do_not():
    """cache-precision.md."""
    for K, right in ((7, False), (8, True)):
        cache = KVCache.create(2, 20, K, 16, dtype=jnp.float32)
        arrays = array(2, 5, 32, 16), array(2, 5, K, 16), array(2, 5, K, 16)
        if right:
            assert jax.eval_shape(attention_with_kv_cache, *arrays, cache)[0].shape == (2, 5, 32, 16)
        else:
            with pytest.raises(ShapeError, match="multiple of key/value heads"):
                jax.eval_shape(attention_with_kv_cache, *arrays, cache)


# --- a model

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 64, 128, 2, 4, 2, 16
PROMPTS, NEW = (12, 3, 1, 7), 200


def random_llama():
    """Weights of a LLaMA-shaped model, the layers stacked."""
    keys = iter(jax.random.split(jax.random.key(5), 9))

    def matrix(*shape, size=1.0):
        return size * jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    layers = {
        "query": matrix(LAYERS, WIDTH, HEADS * HEAD_DIM, size=2.0),
        "key": matrix(LAYERS, WIDTH, KV_HEADS * HEAD_DIM, size=2.0),
        "value": matrix(LAYERS, WIDTH, KV_HEADS * HEAD_DIM),
        "out": matrix(LAYERS, HEADS * HEAD_DIM, WIDTH),
        "gate": matrix(LAYERS, WIDTH, HIDDEN),
        "up": matrix(LAYERS, WIDTH, HIDDEN),
        "down": matrix(LAYERS, HIDDEN, WIDTH),
    }
    return {"embed": jax.random.normal(next(keys), (VOCABULARY, WIDTH)), "layers": layers, "head": matrix(WIDTH, VOCABULARY, size=3.0)}


def times(x, w):
    return jnp.matmul(x, w, precision="highest")  # on a GPU, JAX's own default is TF32


def rms_norm(x):
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def rotate(x, position):
    """Rotary positions: x [B, T, N, H] turned by the angles of each token's own position [B, T]."""
    angle = position[:, :, None, None] * 100.0 ** (-jnp.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], axis=-1)


def llama(model, tokens, position, attention, state):
    """Logits [B, T, V], and the state that `attention(query, key, value, layer, state)` hands on from layer to layer."""

    def layer(carry, weights_and_index):
        (x, state), (w, index) = carry, weights_and_index
        h = rms_norm(x)
        query, key, value = (times(h, w[name]).reshape(*h.shape[:2], -1, HEAD_DIM) for name in ("query", "key", "value"))
        out, state = attention(rotate(query, position), rotate(key, position), value, index, state)
        x = x + times(out.reshape(*out.shape[:2], -1), w["out"])
        h = rms_norm(x)
        return (x + times(jax.nn.silu(times(h, w["gate"])) * times(h, w["up"]), w["down"]), state), None

    x = model["embed"][tokens]
    (x, state), _ = jax.lax.scan(layer, (x, state), (model["layers"], jnp.arange(LAYERS)))
    return times(rms_norm(x), model["head"]), state


@functools.cache
def uncached_generation():
    """Tokens [B, S] and logits [B, NEW, V]: each token from the whole sequence before it, by the plain reference."""
    model, lengths, tokens = random_llama(), jnp.array(PROMPTS), prompts()
    rows, position = jnp.arange(len(PROMPTS)), jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attention(query, key, value, layer, state):
        return reference.attention(query, key, value, is_causal=True), state

    @jax.jit
    def generate(tokens):
        def write(i, carry):
            tokens, seen = carry
            logits = llama(model, tokens, position, attention, None)[0][rows, lengths + i - 1]
            return tokens.at[rows, lengths + i].set(jnp.argmax(logits, axis=-1)), seen.at[:, i].set(logits)

        return jax.lax.fori_loop(0, NEW, write, (tokens, jnp.zeros((len(PROMPTS), NEW, VOCABULARY))))

    return generate(tokens)


def prompts():
    """int32[B, longest prompt + NEW], padded on the right with a token that is none."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (len(PROMPTS), max(PROMPTS) + NEW))
    return jnp.asarray(np.where(np.arange(tokens.shape[1]) < np.array(PROMPTS)[:, None], tokens, 0), jnp.int32)


@pytest.mark.parametrize("implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_llama_writes_the_same_200_tokens_with_and_without_a_cache(implementation):
    """Four prompts of different lengths, padded, in one prefill; then one jitted while_loop, each row at its own position."""
    model, lengths = random_llama(), jnp.array(PROMPTS)
    tokens = prompts()
    rows = jnp.arange(len(PROMPTS))

    def forward(tokens, counts, cache):
        def attention(query, key, value, layer, cache):
            return attention_with_kv_cache(query, key, value, cache, layer=layer, query_seq_lengths=counts, implementation=implementation)

        position = cache.length[0][:, None] + jnp.arange(tokens.shape[1])
        logits, cache = llama(model, tokens, position, attention, cache)
        return logits[rows, counts - 1], cache

    @jax.jit
    def generate(tokens, cache):
        def write(state):
            i, tokens, logits, cache, seen = state
            new = jnp.argmax(logits, axis=-1).astype(tokens.dtype)
            tokens, seen = tokens.at[rows, lengths + i].set(new), seen.at[:, i].set(logits)
            return i + 1, tokens, *forward(new[:, None], jnp.ones_like(lengths), cache), seen

        logits, cache = forward(tokens[:, : max(PROMPTS)], lengths, cache)
        start = (0, tokens, logits, cache, jnp.zeros((len(PROMPTS), NEW, VOCABULARY)))
        _, tokens, _, cache, seen = jax.lax.while_loop(lambda state: state[0] < NEW, write, start)
        return tokens, seen, cache

    cache = KVCache.create(len(PROMPTS), max(PROMPTS) + NEW, KV_HEADS, HEAD_DIM, layers=LAYERS, dtype=jnp.float32)
    written, logits, cache = generate(tokens, cache)
    cache.check()
    np.testing.assert_array_equal(cache.length, np.broadcast_to(np.array(PROMPTS) + NEW, (LAYERS, len(PROMPTS))))
    expected, expected_logits = uncached_generation()
    np.testing.assert_array_equal(written, expected)
    # The test means something: the text does not repeat itself, and no choice was as close as the two logits are apart.
    for b, length in enumerate(PROMPTS):
        assert len(set(np.array(expected[b, length : length + NEW]).tolist())) >= VOCABULARY // 4
    two_best = jnp.sort(expected_logits, axis=-1)[..., -2:]
    closest = jnp.min(two_best[..., 1] - two_best[..., 0])
    assert jnp.max(jnp.abs(logits - expected_logits)) < closest / 4
