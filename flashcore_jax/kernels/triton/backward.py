"""Attention backward: two kernels, no atomics, so the same call always gives the same bits.

Both recompute the probabilities from the log-sum-exp. `dkdv` holds a tile of keys and walks over the queries that see
it, of every head of the group, so the group is summed in its float32 accumulators; `dq` holds a tile of queries and walks
over the keys. Blocks that no bound cuts go without masks; blocks without a visible pair are never visited.

    p = exp2(scores * log2_scale - lse),   ds = p * (dout @ value - delta),   delta = rowsum(dout * out) - dlse
    dvalue = p^T @ dout,   dkey = scale * ds^T @ query,   dquery = scale * ds @ key

Source: Dao, "FlashAttention-2" (2023), algorithm 2, in two passes.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax.kernels.triton.blocks import Programs, head_chunks, padded, round_up, row_specs
from flashcore_jax.kernels.triton.launch import dot, dot_chunks, launch, load, load_chunks, scaled_exp2, store_chunks, tanh_for
from flashcore_jax.logits import scores_of, times_slope
from flashcore_jax.masks import quotient, sees_any, visible, visible_blocks
from flashcore_jax.online_softmax import LOG2_E
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of
from flashcore_jax.tuning.tiles import Tile, Tiles


def _walk(blocks, visit, carry):
    """Visits a tile's blocks in order: those cut by the first bound, those without a mask, those cut by the last."""
    carry = lax.fori_loop(blocks.start, blocks.unmasked_start, functools.partial(visit, masked=True), carry)
    carry = lax.fori_loop(blocks.unmasked_start, blocks.unmasked_stop, functools.partial(visit, masked=False), carry)
    return lax.fori_loop(blocks.unmasked_stop, blocks.stop, functools.partial(visit, masked=True), carry)


def _dkdv_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, problem: Problem, tile: Tile, programs: Programs):
    *row_refs, dk_ref, dv_ref = refs
    block_q, block_k = tile.block_q, tile.block_k
    query_length, key_length = row_of(row_refs, problem).lengths
    _, key_tile, _ = programs.split(pl.program_id(0))
    first_key = key_tile * block_k
    keys = first_key + lax.iota(jnp.int32, block_k)
    is_key = keys < key_length
    h, hv = head_chunks(problem)
    every_key_exists = not problem.key_lengths and problem.S % block_k == 0
    k = load_chunks(k_ref, h, rows=None if every_key_exists else is_key)
    v = load_chunks(v_ref, hv, rows=None if every_key_exists else is_key)

    # Scores stand transposed, [keys, queries], so that p and ds are the left operands of their products as they are.
    def visit(group_head, block, carry, masked):
        dk, dv = carry
        queries = block * block_q + lax.iota(jnp.int32, block_q)
        # A row that sees nothing has no log-sum-exp, and whatever its cotangent holds must not count.
        is_row = sees_any(queries, query_length, key_length, problem.band) if masked else None
        at_block = (group_head, pl.ds(block * block_q, block_q))
        q = load_chunks(q_ref, h, at_block[::-1], is_row)
        scores, log2_scale = scores_of(dot_chunks(k, q, problem.precision), problem.scale, problem.logits_soft_cap, tanh_for(problem))
        lse = load(lse_ref, at_block, rows=is_row) * LOG2_E
        p = scaled_exp2(scores, log2_scale, lse[None, :])
        if masked:
            seen = visible(queries[None, :], keys[:, None], query_length, key_length, problem.band)
            p = jnp.where(seen, p, 0.0)
        dout = load_chunks(dout_ref, hv, at_block[::-1], is_row)
        dv = tuple(a + dot(p.astype(x.dtype), x, problem.precision) for a, x in zip(dv, dout, strict=True))
        dp = dot_chunks(v, dout, problem.precision)
        delta = load(delta_ref, at_block, rows=is_row)
        ds = times_slope(p * (dp - delta[None, :]), scores, problem.logits_soft_cap)
        dk = tuple(a + dot(ds.astype(x.dtype), x, problem.precision) for a, x in zip(dk, q, strict=True))
        return dk, dv

    blocks = visible_blocks(first_key, block_k, key_length, query_length, problem.band.transposed, block_q)
    zeros = tuple(tuple(jnp.zeros((block_k, c.width), jnp.float32) for c in chunks) for chunks in (h, hv))
    dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(problem.G), lambda g, carry: _walk(blocks, functools.partial(visit, g), carry), zeros)
    dk = tuple(chunk * problem.scale for chunk in dk)
    if not every_key_exists:
        dk, dv = (tuple(jnp.where(is_key[:, None], chunk, 0.0) for chunk in x) for x in (dk, dv))
    in_s = None if problem.S % block_k == 0 else keys < problem.S
    store_chunks(dk_ref, h, dk, in_s)
    store_chunks(dv_ref, hv, dv, in_s)


def _dq_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, delta_ref, *refs, problem: Problem, tile: Tile, programs: Programs):
    *row_refs, dq_ref = refs
    block_q, block_k = tile.block_q, tile.block_k
    query_length, key_length = row_of(row_refs, problem).lengths
    _, query_tile, _ = programs.split(pl.program_id(0))
    first_query = query_tile * block_q
    queries = first_query + lax.iota(jnp.int32, block_q)
    h, hv = head_chunks(problem)
    is_row = sees_any(queries, query_length, key_length, problem.band)
    q = load_chunks(q_ref, h, rows=is_row)
    dout = load_chunks(dout_ref, hv, rows=is_row)
    lse = load(lse_ref, rows=is_row) * LOG2_E
    delta = load(delta_ref, rows=is_row)

    def visit(block, dq, masked):
        keys = block * block_k + lax.iota(jnp.int32, block_k)
        is_key = keys < key_length if masked else None
        at_block = (pl.ds(block * block_k, block_k),)
        k = load_chunks(k_ref, h, at_block, is_key)
        scores, log2_scale = scores_of(dot_chunks(q, k, problem.precision), problem.scale, problem.logits_soft_cap, tanh_for(problem))
        p = scaled_exp2(scores, log2_scale, lse[:, None])
        if masked:
            seen = visible(queries[:, None], keys[None, :], query_length, key_length, problem.band)
            p = jnp.where(seen, p, 0.0)
        v = load_chunks(v_ref, hv, at_block, is_key)
        dp = dot_chunks(dout, v, problem.precision)
        ds = times_slope(p * (dp - delta[:, None]), scores, problem.logits_soft_cap)
        return tuple(a + dot(ds.astype(x.dtype), x, problem.precision) for a, x in zip(dq, k, strict=True))

    blocks = visible_blocks(first_query, block_q, query_length, key_length, problem.band, block_k)
    dq = _walk(blocks, visit, tuple(jnp.zeros((block_q, c.width), jnp.float32) for c in h))
    dq = tuple(jnp.where(is_row[:, None], chunk * problem.scale, 0.0) for chunk in dq)
    in_t = None if problem.T % block_q == 0 else queries < problem.T
    store_chunks(dq_ref, h, dq, in_t)


def dkdv(operands, problem: Problem, tile: Tile):
    """The gradients of key and value. operands: query, key, value, dout, lse, delta, and those of rows."""
    p = problem
    programs = Programs(p.B, p.K, pl.cdiv(p.S, tile.block_k), tile.heads_fastest, last_tile_first=False)
    T = round_up(p.T, tile.block_q)
    group = [programs.spec((None, T, p.G, padded(size)), lambda b, s, k: (b, 0, k, 0)) for size in (p.H, p.Hv)]
    own = [programs.spec((None, tile.block_k, None, padded(size)), lambda b, s, k: (b, s, k, 0)) for size in (p.H, p.Hv)]
    statistic = programs.spec((None, p.G, T), lambda b, s, k: (b, k, 0))
    return launch(
        functools.partial(_dkdv_kernel, problem=p, tile=tile, programs=programs),
        *operands,
        name="flashcore_dkdv",
        grid=programs.grid,
        in_specs=[group[0], *own, group[1], statistic, statistic, *row_specs(programs, p)],
        out_specs=own,
        out_shape=[((p.B, p.S, p.K, p.H), p.dtype), ((p.B, p.S, p.K, p.Hv), p.dtype)],
        tile=tile,
    )


def dq(operands, problem: Problem, tile: Tile):
    """The gradient of query; operands as of `dkdv`."""
    p = problem
    programs = Programs(p.B, p.N, pl.cdiv(p.T, tile.block_q), tile.heads_fastest, last_tile_first=p.band.right is not None)
    S = round_up(p.S, tile.block_k)
    own = [programs.spec((None, tile.block_q, None, padded(size)), lambda b, t, n: (b, t, n, 0)) for size in (p.H, p.Hv)]
    group = [programs.spec((None, S, None, padded(size)), lambda b, t, n: (b, 0, quotient(n, p.G), 0)) for size in (p.H, p.Hv)]
    statistic = programs.spec((None, None, tile.block_q), lambda b, t, n: (b, n, t))
    (gradient,) = launch(
        functools.partial(_dq_kernel, problem=p, tile=tile, programs=programs),
        *operands,
        name="flashcore_dq",
        grid=programs.grid,
        in_specs=[own[0], *group, own[1], statistic, statistic, *row_specs(programs, p)],
        out_specs=[own[0]],
        out_shape=[((p.B, p.T, p.N, p.H), p.dtype)],
        tile=tile,
    )
    return gradient


def backward(query, key, value, rows: Rows, out, lse, dout, dlse, problem: Problem, tiles: Tiles):
    """The gradients of query, key and value. lse and dlse float32[B, N, T]."""
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    operands = (query, key, value, dout, lse, delta, *rows.arrays)
    return dq(operands, problem, tiles.dq), *dkdv(operands, problem, tiles.dkdv)
