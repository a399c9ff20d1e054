"""Attention in plain JAX, block by block: any platform, O(T) memory forward and backward, derivatives of every order.

The same key grid and the same closing of splits as the kernels, on `block_k` keys at a time. The derivative is a
`custom_jvp` whose tangent is a sum over blocks that recomputes the probabilities from the log-sum-exp; JAX transposes it
for reverse mode. Since each block is rematerialised, that too keeps nothing of size T x S.

    dout = sum_j (p_j * dlogit_j) v_j + p_j dv_j - out * sum_j p_j dlogit_j,      dlse = sum_j p_j dlogit_j
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from flashcore_jax import online_softmax
from flashcore_jax.logits import scores_of, times_slope
from flashcore_jax.masks import visible, visible_blocks
from flashcore_jax.online_softmax import LOG2_E
from flashcore_jax.problem import RESIDUAL_NAMES, Problem
from flashcore_jax.rows import Rows, layer_within, of_layer, update
from flashcore_jax.sharding import varying_together

# Large enough that a CPU's matrix product is busy, small enough that a block's scores stay in its cache.
_BLOCK_Q, _BLOCK_K = 128, 128

_PRECISION = {
    "native": lax.Precision.DEFAULT,
    "tf32": lax.Precision.DEFAULT,
    "high": lax.Precision.HIGHEST,
    "float32": lax.Precision.HIGHEST,
}


def unsupported(problem: Problem | None) -> str | None:
    """Why this implementation cannot run the call, or None: it runs every call."""
    return None


def append(key_cache, value_cache, length, overflowed, key, value, count, layer):
    """As `kernels.triton.append.append`, by a scatter, which drops what lies outside the cache."""
    B, T, S = *key.shape[:2], key_cache.shape[-3]
    start, count, rows = update(length, overflowed, count, T, S, layer)
    token = jnp.arange(T, dtype=jnp.int32)
    slots = jnp.where(token[None] < count[:, None], start[:, None] + token[None], S + token[None])
    at = (*(() if layer is None else (layer_within(layer[0], key_cache.shape[0]),)), jnp.arange(B)[:, None], slots)
    written = (jnp.asarray(x).at[at].set(new, mode="drop", unique_indices=True) for x, new in ((key_cache, key), (value_cache, value)))
    return *written, *rows


def attend(query, key, value, rows: Rows, problem: Problem):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T], differentiable in every mode."""
    p = problem
    if not p.cached:
        return _attend_rows(query, key, value, rows, p)
    row = rows.of_layer()
    out, lse = _attend_rows(query, of_layer(key, rows.layer), of_layer(value, rows.layer), row.without_overflowed(p.T), p)
    overflowed = row.overflowed[:, None, None]
    return jnp.where(overflowed[..., None], jnp.nan, out), jnp.where(overflowed, jnp.nan, lse)


def _attend_rows(query, key, value, rows: Rows, problem: Problem):
    p = problem
    lengths = tuple(
        jnp.full(p.B, full, jnp.int32) if length is None else jnp.clip(length, 0, full)
        for length, full in ((rows.query_length, p.T), (rows.key_length, p.S))
    )
    # What lies beyond the lengths counts for nothing, whatever it holds: 0 here, and so 0 * anything in every derivative.
    query = _zero_beyond(query, lengths[0])
    key, value = _zero_beyond(key, lengths[1]), _zero_beyond(value, lengths[1])
    return _attend(query, key, value, *lengths, problem)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5,))
@functools.partial(jax.jit, static_argnums=(5,))
def _attend(query, key, value, query_length, key_length, problem: Problem):
    p = problem
    key, value = _blocks(key), _blocks(value)
    precision = _PRECISION[p.precision]

    def attend_tile(tile):
        q, first_query = tile
        nonempty, seen = _visibility(first_query, query_length, key_length, p)

        def visit(partial, block):
            def update(partial):
                k, v = key[block], value[block]
                products = jnp.einsum("bqkgh,bskh->bkgqs", q, k, precision=precision, preferred_element_type=jnp.float32)
                scores, log2_scale = scores_of(products, p.scale, p.logits_soft_cap)
                scores = jnp.where(seen(block), scores, -jnp.inf)
                weigh = functools.partial(jnp.einsum, "bkgqs,bskh->bkgqh", precision=precision, preferred_element_type=jnp.float32)
                return online_softmax.update(partial, scores, log2_scale, lambda w: (weigh(w.astype(v.dtype), v),))

            return lax.cond(nonempty(block), update, lambda partial: partial, partial), None

        rows = (p.B, p.K, p.G, q.shape[1]), (p.Hv,)
        # A loop keeps what it varies over: from the start what its arrays do.
        empty, nothing = varying_together(((online_softmax.start(*rows), online_softmax.nothing(*rows)), q, key, value))[0]

        def close(total, blocks):
            return online_softmax.merge(total, online_softmax.close(lax.scan(visit, empty, blocks)[0])), None

        count = key.shape[0]
        per_split = count if p.split_size is None else min(count, p.split_size // _BLOCK_K)
        closed = count // per_split * per_split
        total, _ = lax.scan(close, nothing, jnp.arange(closed).reshape(-1, per_split))
        total = close(total, jnp.arange(closed, count))[0] if closed < count else total
        (out,), lse = online_softmax.finish(total)
        return out, lse

    out, lse = lax.map(attend_tile, _tiles(query, p))
    is_query = jnp.arange(p.T)[None] < query_length[:, None]
    out = jnp.where(is_query[:, :, None, None], _untile(out, p).astype(query.dtype), 0)
    lse = jnp.where(is_query[:, :, None], _untile(lse[..., None], p)[..., 0], -jnp.inf)
    return out, lse.swapaxes(1, 2)


@_attend.defjvp
def _attend_jvp(problem: Problem, primals, tangents):
    query, key, value, query_length, key_length = primals
    out, lse = (checkpoint_name(x, name) for x, name in zip(_attend(*primals, problem), RESIDUAL_NAMES, strict=True))
    dquery, dkey, dvalue = tangents[:3]
    dout, dlse = _tangent(query, key, value, out, lse, dquery, dkey, dvalue, query_length, key_length, problem)
    return (out, lse), (dout.astype(out.dtype), dlse)


@functools.partial(jax.jit, static_argnums=(10,))
def _tangent(query, key, value, out, lse, dquery, dkey, dvalue, query_length, key_length, problem: Problem):
    p = problem
    precision = _PRECISION[p.precision]
    # float32 before the loops: what reverse mode sums over the blocks is then summed in float32.
    key, value, dkey, dvalue = (_blocks(x.astype(jnp.float32)) for x in (key, value, dkey, dvalue))
    query, dquery, out = (x.astype(jnp.float32) for x in (query, dquery, out))
    empty = jnp.isneginf(lse).swapaxes(1, 2)[..., None]
    lse = jnp.where(empty, jnp.inf, lse.swapaxes(1, 2)[..., None])  # p = 0 where a row sees nothing
    einsum = functools.partial(jnp.einsum, precision=precision)

    def tile_tangent(tile):
        (q, first_query), (dq, _), (lse, _) = tile
        nonempty, seen = _visibility(first_query, query_length, key_length, p)
        lse2 = jnp.moveaxis(lse[..., 0], 1, -1)[..., None] * LOG2_E

        def add_block(carry, block):
            k, v, dk, dv = key[block], value[block], dkey[block], dvalue[block]
            products = einsum("bqkgh,bskh->bkgqs", q, k)
            scores, log2_scale = scores_of(products, p.scale, p.logits_soft_cap)
            probabilities = jnp.exp2(jnp.where(seen(block), scores * log2_scale - lse2, -jnp.inf))
            dproducts = einsum("bqkgh,bskh->bkgqs", dq, k) + einsum("bqkgh,bskh->bkgqs", q, dk)
            weights = probabilities * times_slope(dproducts * p.scale, scores, p.logits_soft_cap)
            acc, row_sum = carry
            acc += einsum("bkgqs,bskh->bkgqh", weights, v) + einsum("bkgqs,bskh->bkgqh", probabilities, dv)
            return acc, row_sum + jnp.sum(weights, axis=-1)

        # Around the condition: inside it, each branch would hand out what it keeps, block by block.
        @jax.checkpoint
        def visit(carry, block):
            return lax.cond(nonempty(block), add_block, lambda carry, block: carry, carry, block), None

        rows = (p.B, p.K, p.G, q.shape[1])
        zeros = jnp.zeros((*rows, p.Hv), jnp.float32), jnp.zeros(rows, jnp.float32)
        return lax.scan(visit, varying_together((zeros, q, key, value))[0], jnp.arange(key.shape[0]))[0]

    acc, row_sum = lax.map(tile_tangent, (_tiles(query, p), _tiles(dquery, p), _tiles(lse, p)))
    row_sum = _untile(row_sum[..., None], p)
    # Selected, not left to be 0: transposed, this is what keeps a NaN in an empty row's cotangent out of every product.
    dout = jnp.where(empty, 0.0, _untile(acc, p) - out * row_sum)
    return dout, jnp.where(empty, 0.0, row_sum)[..., 0].swapaxes(1, 2)


def _visibility(first_query, query_length, key_length, p: Problem):
    """For a tile of queries: whether any row of the batch sees anything of a block, and the mask [B, 1, 1, queries, keys]."""
    size = min(p.T, _BLOCK_Q)
    blocks = jax.vmap(lambda q, k: visible_blocks(first_query, size, q, k, p.band, _BLOCK_K).__dict__)(query_length, key_length)
    queries = first_query + jnp.arange(size)

    def nonempty(block):
        return _any((blocks["start"] <= block) & (block < blocks["stop"]))

    def seen(block):
        keys = block * _BLOCK_K + jnp.arange(_BLOCK_K)
        per_row = (query_length[:, None, None], key_length[:, None, None])
        return visible(queries[None, :, None], keys[None, None, :], *per_row, p.band)[:, None, None]

    return nonempty, seen


@jax.custom_batching.custom_vmap
def _any(x):
    """Under `vmap` of any row of all batches: a condition for each would visit every block, and reverse mode cannot transpose what JAX
    makes of it."""
    return jnp.any(x)


@_any.def_vmap
def _any_of_every_batch(size, is_batched, x):
    return _any(x), False


def _zero_beyond(x, length):
    return jnp.where((jnp.arange(x.shape[1])[None] < length[:, None])[:, :, None, None], x, 0)


def _blocks(x):
    """[B, S, K, H] as blocks of keys [blocks, B, _BLOCK_K, K, H], the last one filled with zeros."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % _BLOCK_K), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, _BLOCK_K, *x.shape[2:]), 1, 0)


def _tiles(x, p: Problem):
    """[B, T, N, ...] as tiles of queries [tiles, B, block, K, G, ...], and the first query of each."""
    block = min(p.T, _BLOCK_Q)
    x = jnp.pad(x, ((0, 0), (0, -p.T % block), (0, 0), (0, 0)))
    x = jnp.moveaxis(x.reshape(p.B, -1, block, p.K, p.G, x.shape[-1]), 1, 0)
    return x, jnp.arange(x.shape[0]) * block


def _untile(x, p: Problem):
    """[tiles, B, K, G, block, H] as [B, T, N, H]."""
    x = jnp.moveaxis(x, (1, 0, 4, 2, 3), (0, 1, 2, 3, 4))
    return x.reshape(p.B, -1, p.N, x.shape[-1])[:, : p.T]
