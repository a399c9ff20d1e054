"""Attention forward: one program holds a tile of queries and walks over the keys it can see.

Keys are visited in blocks aligned to key 0, whatever the tile of queries: blocks of which every pair is visible without
a mask, those that a bound cuts with one, the others not at all. Partial sums are closed every `split_size` keys and
merged in order, so the additions of a row do not depend on the tile, the batch or the length around it.

Source: Dao, "FlashAttention-2" (2023), algorithm 1; closing in fixed splits is this package's (docs/numerics.md).
Measured on an H200 (2026-11-22): nested loops with the running total in registers is the cheapest closing.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax import online_softmax
from flashcore_jax.kernels.triton.blocks import Programs, column_chunks, padded, round_up, row_lengths
from flashcore_jax.kernels.triton.launch import dot, dot_chunks, launch, load_chunks, scaled_exp2, store, store_chunks, tanh_for
from flashcore_jax.logits import scores_of
from flashcore_jax.masks import quotient, visible, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.tiles import Tile, Tiles


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, tile: Tile, programs: Programs, closes: bool):
    *more_refs, out_ref, lse_ref = refs
    block_q, block_k = tile.block_q, tile.block_k
    query_length, key_length = row_lengths(more_refs, problem)
    _, query_tile, _ = programs.split(pl.program_id(0))
    first_query = query_tile * block_q
    queries = first_query + lax.iota(jnp.int32, block_q)
    is_query = queries < query_length
    in_t = None if problem.T % block_q == 0 else queries < problem.T
    h, hv = column_chunks(problem.H), column_chunks(problem.Hv)
    every_row_exists = not problem.ragged and in_t is None
    q = load_chunks(q_ref, h, rows=None if every_row_exists else is_query)
    nothing = online_softmax.start((block_q,), tuple(c.width for c in hv))

    def visit(block, partial, masked):
        keys = block * block_k + lax.iota(jnp.int32, block_k)
        is_key = keys < key_length if masked else None
        at_block = (pl.ds(block * block_k, block_k),)
        k = load_chunks(k_ref, h, at_block, is_key)
        scores, log2_scale = scores_of(dot_chunks(q, k, problem.precision), problem.scale, problem.logits_soft_cap, tanh_for(problem.dtype))
        if masked:
            seen = visible(queries[:, None], keys[None, :], query_length, key_length, problem.band)
            scores = jnp.where(seen, scores, -jnp.inf)
        v = load_chunks(v_ref, hv, at_block, is_key)

        def weigh(p):
            return [dot(p.astype(chunk.dtype), chunk, problem.precision) for chunk in v]

        return online_softmax.update(partial, scores, log2_scale, weigh, scaled_exp2)

    blocks = visible_blocks(first_query, block_q, query_length, key_length, problem.band, block_k)

    def visit_all(start, stop):
        unmasked_start = jnp.clip(blocks.unmasked_start, start, stop)
        unmasked_stop = jnp.clip(blocks.unmasked_stop, start, stop)
        partial = nothing
        if problem.band.left is not None:  # only a left bound cuts blocks before the unmasked ones
            partial = lax.fori_loop(start, unmasked_start, functools.partial(visit, masked=True), partial)
        partial = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), partial)
        return lax.fori_loop(unmasked_stop, stop, functools.partial(visit, masked=True), partial)

    if not closes:
        total = visit_all(blocks.start, blocks.stop)
    else:
        per_split = problem.split_size // block_k

        def close(split, total):
            closed = visit_all(jnp.maximum(blocks.start, split * per_split), jnp.minimum(blocks.stop, (split + 1) * per_split))
            return online_softmax.merge(total, closed)

        first_split, end_split = quotient(blocks.start, per_split), quotient(blocks.stop + (per_split - 1), per_split)
        total = lax.fori_loop(first_split, end_split, close, nothing)

    out, lse = online_softmax.finish(total)
    if not every_row_exists:
        out = tuple(jnp.where(is_query[:, None], chunk, 0.0) for chunk in out)
        lse = jnp.where(is_query, lse, -jnp.inf)
    store_chunks(out_ref, hv, out, in_t)
    store(lse_ref, lse, rows=in_t)


def forward(query, key, value, lengths, problem: Problem, tiles: Tiles):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]; `lengths` is () or two int32[B]."""
    p = problem
    closes = p.split_size is not None and p.S > p.split_size
    tile = tiles.closing if closes else tiles.forward
    programs = Programs(p.B, p.N, pl.cdiv(p.T, tile.block_q), tile.heads_fastest, last_tile_first=p.band.right is not None)
    S = round_up(p.S, tile.block_k)
    return launch(
        functools.partial(_kernel, problem=p, tile=tile, programs=programs, closes=closes),
        *(query, key, value, *lengths),
        name="flashcore_forward_closing" if closes else "flashcore_forward",
        grid=programs.grid,
        in_specs=[
            programs.spec((None, tile.block_q, None, padded(p.H)), lambda b, t, n: (b, t, n, 0)),
            programs.spec((None, S, None, padded(p.H)), lambda b, t, n: (b, 0, quotient(n, p.G), 0)),
            programs.spec((None, S, None, padded(p.Hv)), lambda b, t, n: (b, 0, quotient(n, p.G), 0)),
            *[programs.row_spec] * len(lengths),
        ],
        out_specs=[
            programs.spec((None, tile.block_q, None, padded(p.Hv)), lambda b, t, n: (b, t, n, 0)),
            programs.spec((None, None, tile.block_q), lambda b, t, n: (b, n, t)),
        ],
        out_shape=[((p.B, p.T, p.N, p.Hv), query.dtype), ((p.B, p.N, p.T), jnp.float32)],
        tile=tile,
    )
