"""Attention twice, in plain jax.numpy and in the order of its definition: the whole sequence at once, and token by token.

Both are slow, hold every score in memory, and mean exactly what `flashcore_jax.attention` means. They compute in float32, or
in float64 under `jax_enable_x64`, and return that without rounding; gradients come from autodiff, in the inputs' dtypes.
"""

import math

import jax
import jax.numpy as jnp

from flashcore_jax.masks import Band, visible


def attention(
    query,
    key,
    value,
    *,
    is_causal=False,
    scale=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    return_lse=False,
):
    """The whole sequence at once: `softmax(cap(scale * query @ key^T)) @ value`, over the keys that `masks.visible` allows.

    Args:
        query: [B, T, N, H].
        key, value: [B, S, K, H] and [B, S, K, Hv], where K divides N.
        is_causal, scale, query_seq_lengths, key_value_seq_lengths, local_window_size, logits_soft_cap: as in
            `flashcore_jax.attention`.
        return_lse: also return the natural log of the sum of the exponentials.

    Returns:
        out [B, T, N, Hv], or (out, lse [B, T, N]). A query that sees no key: out 0, lse -inf, gradients 0.
    """
    band = Band.of(is_causal, local_window_size)
    attend = _attend(query.shape[-1], scale, logits_soft_cap)

    def row(query, key, value, query_length, key_length):
        i, j = jnp.arange(query.shape[0]), jnp.arange(key.shape[0])
        query, key, value = _valid(query, query_length), _valid(key, key_length), _valid(value, key_length)
        return attend(query, key, value, visible(i[:, None], j, query_length, key_length, band))

    out, lse = _over_batch(row, query, key, value, query_seq_lengths, key_value_seq_lengths)
    return (out, lse) if return_lse else out


def incremental_attention(
    query,
    key,
    value,
    *,
    is_causal=False,
    scale=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    return_lse=False,
):
    """The same function token by token: append one key and value to a growing cache, then attend with the one new query.

    A causal query needs no mask here, since its future is not in the cache yet. Where queries may look `ahead` (a right
    window, or everything when there is neither bound), keys enter the cache that much earlier than the query beside them.
    The keys before the first query's are in the cache from the start.

    Arguments and results are those of `attention` above.
    """
    band = Band.of(is_causal, local_window_size)
    attend = _attend(query.shape[-1], scale, logits_soft_cap)

    def row(query, key, value, query_length, key_length):
        j = jnp.arange(key.shape[0])
        ahead = key.shape[0] + query.shape[0] if band.right is None else band.right
        query, key, value = _valid(query, query_length), _valid(key, key_length), _valid(value, key_length)
        first = key_length - query_length  # the position of query 0; below 0 it stands before every key

        def step(cache, query_and_index):
            one_query, i = query_and_index
            p = first + i
            cache = _write(cache, (key, value), j == p + ahead)
            length = jnp.minimum(p + ahead + 1, key_length)
            seen = (j < length) & (i < query_length)
            if band.left is not None:
                seen &= p - j <= band.left
            out, lse = attend(one_query[None], *cache, seen[None])
            return cache, (out[0], lse[0])

        empty = (jnp.zeros_like(key), jnp.zeros_like(value))
        cache = _write(empty, (key, value), j < first + ahead)
        return jax.lax.scan(step, cache, (query, jnp.arange(query.shape[0])))[1]

    out, lse = _over_batch(row, query, key, value, query_seq_lengths, key_value_seq_lengths)
    return (out, lse) if return_lse else out


def _attend(head_dim: int, scale: float | None, soft_cap: float | None):
    """Attention of one row: query [T, N, H], key [S, K, H], value [S, K, Hv], seen [T, S] -> out [T, N, Hv], lse [T, N]."""
    scale = 1.0 / math.sqrt(head_dim) if scale is None else scale

    def attend(query, key, value, seen):
        T, N, H = query.shape
        K = key.shape[1]
        grouped = query.reshape(T, K, N // K, H)
        logits = scale * jnp.einsum("tkgh,skh->tkgs", grouped, key, precision="highest")
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        seen = seen[:, None, None, :]
        any_seen = jnp.any(seen, axis=-1)
        # Unseen logits never reach exp: were they large, the derivative would be 0 * inf.
        highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, where=seen, initial=-jnp.inf))
        highest = jnp.where(any_seen, highest, 0.0)
        weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - highest[..., None], 0.0)), 0.0)
        total = jnp.where(any_seen, jnp.sum(weights, axis=-1), 1.0)
        out = jnp.einsum("tkgs,skh->tkgh", weights / total[..., None], value, precision="highest")
        out = jnp.where(any_seen[..., None], out, 0.0)
        lse = jnp.where(any_seen, highest + jnp.log(total), -jnp.inf)
        return out.reshape(T, N, value.shape[-1]), lse.reshape(T, N)

    return attend


def _over_batch(row, query, key, value, query_lengths, key_lengths):
    dtype = jax.dtypes.canonicalize_dtype(float)
    query, key, value = (jnp.asarray(a).astype(dtype) for a in (query, key, value))
    B, T, S = query.shape[0], query.shape[1], key.shape[1]
    query_lengths = jnp.full(B, T, jnp.int32) if query_lengths is None else jnp.clip(query_lengths, 0, T)
    key_lengths = jnp.full(B, S, jnp.int32) if key_lengths is None else jnp.clip(key_lengths, 0, S)
    return jax.vmap(row)(query, key, value, query_lengths, key_lengths)


def _valid(array, length):
    """Zero past `length`. A selection, not a product: 0 * NaN would be NaN."""
    return jnp.where((jnp.arange(array.shape[0]) < length)[:, None, None], array, 0.0)


def _write(cache, arrays, where):
    return tuple(jnp.where(where[:, None, None], new, old) for new, old in zip(arrays, cache, strict=True))
