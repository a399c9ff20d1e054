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
from flashcore_jax.kernels.triton.blocks import Programs, columns_of, padded, round_up, row_lengths
from flashcore_jax.kernels.triton.launch import dot, launch, load, scaled_exp2, store
from flashcore_jax.logits import scores_of
from flashcore_jax.masks import visible, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.tiles import Tile


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, tile: Tile, programs: Programs):
    *length_refs, out_ref, lse_ref = refs
    block_q, block_k = tile.block_q, tile.block_k
    query_length, key_length = row_lengths(length_refs, problem)
    _, query_tile, _ = programs.split(pl.program_id(0))
    first_query = query_tile * block_q
    queries = first_query + lax.iota(jnp.int32, block_q)
    is_query = queries < query_length
    in_h, in_hv = columns_of(problem.H), columns_of(problem.Hv)
    every_row_exists = not problem.ragged and problem.T % block_q == 0
    q = load(q_ref, rows=None if every_row_exists else is_query, columns=in_h)

    def visit(block, partial, masked):
        keys = block * block_k + lax.iota(jnp.int32, block_k)
        is_key = keys < key_length if masked else None
        at_block = (pl.ds(block * block_k, block_k), slice(None))
        k = load(k_ref, at_block, rows=is_key, columns=in_h)
        scores, log2_scale = scores_of(dot(q, k, problem.precision, contract=(1, 1)), problem.scale, problem.logits_soft_cap)
        if masked:
            seen = visible(queries[:, None], keys[None, :], query_length, key_length, problem.band)
            scores = jnp.where(seen, scores, -jnp.inf)
        v = load(v_ref, at_block, rows=is_key, columns=in_hv)
        weigh = lambda p: dot(p.astype(v.dtype), v, problem.precision)  # noqa: E731
        return online_softmax.update(partial, scores, log2_scale, weigh, scaled_exp2)

    blocks = visible_blocks(first_query, block_q, query_length, key_length, problem.band, block_k)

    def visit_all(start, stop):
        partial = online_softmax.start((block_q,), padded(problem.Hv))
        unmasked_start = jnp.clip(blocks.unmasked_start, start, stop)
        unmasked_stop = jnp.clip(blocks.unmasked_stop, start, stop)
        if problem.band.left is not None:  # only a left bound cuts blocks before the unmasked ones
            partial = lax.fori_loop(start, unmasked_start, functools.partial(visit, masked=True), partial)
        partial = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), partial)
        return lax.fori_loop(unmasked_stop, stop, functools.partial(visit, masked=True), partial)

    if problem.split_size is None or problem.S <= problem.split_size:
        total = visit_all(blocks.start, blocks.stop)
    else:
        blocks_per_split = problem.split_size // block_k

        def close(split, total):
            start = jnp.maximum(blocks.start, split * blocks_per_split)
            stop = jnp.minimum(blocks.stop, (split + 1) * blocks_per_split)
            return online_softmax.merge(total, visit_all(start, stop))

        first = lax.div(blocks.start, jnp.int32(blocks_per_split))
        stop = lax.div(blocks.stop + (blocks_per_split - 1), jnp.int32(blocks_per_split))
        total = lax.fori_loop(first, stop, close, online_softmax.start((block_q,), padded(problem.Hv)))

    out, lse = online_softmax.finish(total)
    if not every_row_exists:
        out = jnp.where(is_query[:, None], out, 0.0)
        lse = jnp.where(is_query, lse, -jnp.inf)
    in_t = None if problem.T % block_q == 0 else queries < problem.T
    store(out_ref, out, rows=in_t, columns=in_hv)
    store(lse_ref, lse, rows=in_t)


def forward(query, key, value, lengths, problem: Problem, tile: Tile):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]; `lengths` is () or two int32[B]."""
    p, block_q = problem, tile.block_q
    programs = Programs(p.B, p.N, pl.cdiv(p.T, block_q), tile.heads_fastest, last_tile_first=p.band.right is not None)
    S = round_up(p.S, tile.block_k)
    return launch(
        functools.partial(_kernel, problem=p, tile=tile, programs=programs),
        query, key, value, *lengths,
        name="flashcore_forward",
        grid=programs.grid,
        in_specs=[
            programs.spec((None, block_q, None, padded(p.H)), lambda b, t, n: (b, t, n, 0)),
            programs.spec((None, S, None, padded(p.H)), lambda b, t, n: (b, 0, lax.div(n, p.G), 0)),
            programs.spec((None, S, None, padded(p.Hv)), lambda b, t, n: (b, 0, lax.div(n, p.G), 0)),
            *[programs.row_spec] * len(lengths),
        ],
        out_specs=[
            programs.spec((None, block_q, None, padded(p.Hv)), lambda b, t, n: (b, t, n, 0)),
            programs.spec((None, None, block_q), lambda b, t, n: (b, n, t)),
        ],
        out_shape=[((p.B, p.T, p.N, p.Hv), query.dtype), ((p.B, p.N, p.T), jnp.float32)],
        tile=tile,
    )  # fmt: skip
