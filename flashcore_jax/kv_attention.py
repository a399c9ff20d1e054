"""`attention_with_kv_cache`: append, then attend over the cache. Prefill, chunks, speculation and decode are this one call."""

from flashcore_jax import implementations
from flashcore_jax.attention import attend
from flashcore_jax.axes import Key, Lengths, LogSumExp, Output, Query, Value
from flashcore_jax.cache import KVCache, layer_index
from flashcore_jax.errors import ArgumentError, ShapeError, check
from flashcore_jax.problem import DEFAULT_SPLIT_SIZE, Problem, problem_of
from flashcore_jax.rows import Rows, int32


def attention_with_kv_cache(
    query: Query,
    key: Key,
    value: Value,
    cache: KVCache,
    *,
    layer=None,
    query_seq_lengths: Lengths | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    precision=None,
    split_size: int | None = DEFAULT_SPLIT_SIZE,
    implementation: str | None = None,
    return_lse: bool = False,
) -> tuple[Output, KVCache] | tuple[Output, LogSumExp, KVCache]:
    """Appends T new tokens to each row of the cache, then lets their queries attend to all that the row holds.

        cache = cache.append(key, value, layer=layer, query_seq_lengths=query_seq_lengths)
        out = attention(query, cache.key, cache.value, is_causal=is_causal, query_seq_lengths=query_seq_lengths,
                        key_value_seq_lengths=cache.length, ...)

    T = 1 is a decode step, T > 1 a prompt, a chunk of one, or tokens to be verified; a row's new tokens stand behind those it
    has. With the default `split_size`, in 16 bits, implementations "mosaic_gpu" and "triton" give the same bits however the tokens
    were cut into calls.

    Args:
      query: [B, T, N, H].
      key: [B, T, K, H], the new tokens' keys, in the cache's dtype; rotary positions, if any, already applied.
      value: [B, T, K, Hv].
      cache: a `KVCache` for B rows, K heads and these head dims. Donate it to `jit`, or carry it in the loop, and nothing is
        copied.
      layer: of a stacked cache, the layer to use: an int, or an int32 scalar such as a scan's counter. As in `KVCache.append`.
      query_seq_lengths: int32[B]: the real tokens of each row, the first ones; the rest is padding. Default T.
      is_causal: True hides from each token those behind it.
      scale, local_window_size, logits_soft_cap, precision, split_size, implementation, return_lse: as in `attention`.

    Returns:
      (out, cache), or (out, lse, cache): out [B, T, N, Hv] in query's dtype, lse float32[B, T, N], and the cache with the tokens
      appended. Padding has out 0 and lse -inf. A row whose tokens did not fit has out and lse NaN, its padding too, in this
      call and the following ones; see `KVCache.overflowed`.

    Differentiable in query, key, value and the cache's contents.

    Raises:
      CacheOverflowError: outside `jit`, before anything is written, if a row has no room.
      ArgumentError, Unsupported: as `attention`.
    """
    problem = _problem_of(
        query, key, cache, is_causal=is_causal, scale=scale, query_seq_lengths=query_seq_lengths,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, precision=precision, split_size=split_size,
    )  # fmt: skip
    cache = cache.append(key, value, layer=layer, query_seq_lengths=query_seq_lengths, implementation=implementation)
    rows = Rows(int32(query_seq_lengths), cache.length, cache.overflowed, layer_index(cache, layer))
    out, lse = attend(query, cache.key, cache.value, rows, problem, implementation)
    return (out, lse, cache) if return_lse else (out, cache)


def explain_with_kv_cache(
    query,
    key,
    value,
    cache: KVCache,
    *,
    layer=None,
    query_seq_lengths=None,
    is_causal: bool = True,
    scale: float | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    precision=None,
    split_size: int | None = DEFAULT_SPLIT_SIZE,
    implementation: str | None = None,
    return_lse: bool = False,
) -> implementations.Explanation:  # the signature of `attention_with_kv_cache`; tests/test_errors.py holds the two together
    """`explain`, for the call of `attention_with_kv_cache` with these arguments: a cache's S is its capacity.

    The arrays, the cache's too, may be `jax.ShapeDtypeStruct`s; nothing is computed. Raises what the call raises for shapes, dtypes and
    options.
    """
    problem = _problem_of(
        query, key, cache, is_causal=is_causal, scale=scale, query_seq_lengths=query_seq_lengths,
        local_window_size=local_window_size, logits_soft_cap=logits_soft_cap, precision=precision, split_size=split_size,
    )  # fmt: skip
    cache._check(key, value, query_seq_lengths)
    layer_index(cache, layer)
    return implementations.explain(problem, implementation)


def _problem_of(query, key, cache: KVCache, **options) -> Problem:
    check([(isinstance(cache, KVCache), ArgumentError, "cache to be a KVCache", type(cache).__name__, "make one with KVCache.create(...)")])
    problem = problem_of(query, cache.key, cache.value, **options, cached=True)
    check([
        (getattr(key, "shape", ())[1:2] == query.shape[1:2], ShapeError, f"key with query's T = {query.shape[1]}", tuple(getattr(key, "shape", ())), "give each new token one query and one key; cache.append() alone takes keys without queries"),
    ])  # fmt: skip
    return problem
