"""Attention forward: one program holds a tile of queries and walks over the keys it can see.

Keys are visited in blocks aligned to key 0, whatever the tile of queries: blocks of which every pair is visible without
a mask, those that a bound cuts with one, the others not at all. Partial sums are closed every `split_size` keys and
merged in order, so the additions of a row do not depend on the tile, the batch or the length around it. The first split has a loop of
its own: beside it no total of others holds registers.

Source: Dao, "FlashAttention-2" (2023), algorithm 1; closing in fixed splits is this package's (docs/numerics.md).
Measured on an H200 (2026-11-22): nested loops with the running total in registers is the cheapest closing.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax import online_softmax
from flashcore_jax.kernels.triton.blocks import Programs, head_chunks, key_spec, padded, row_specs
from flashcore_jax.kernels.triton.launch import dot, dot_chunks, launch, load_chunks, scaled_exp2, store, store_chunks, tanh_for
from flashcore_jax.logits import log2_scale_of, scores_of
from flashcore_jax.masks import quotient, visible, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Row, Rows, row_of
from flashcore_jax.tuning.tiles import Tile, Tiles


def scores_at(q, k_ref, row: Row, queries, problem: Problem, block_k: int):
    """A function that computes a block's scores, -inf where masked. queries: int32[rows], each row's query."""
    query_length, key_length = row.lengths
    h, _ = head_chunks(problem)

    def scores(block, masked):
        keys = block * block_k + lax.iota(jnp.int32, block_k)
        is_key = keys < key_length if masked else None
        k = load_chunks(k_ref, h, (*row.before, pl.ds(block * block_k, block_k)), is_key)
        scores, _ = scores_of(dot_chunks(q, k, problem.precision), problem.scale, problem.logits_soft_cap, tanh_for(problem))
        if not masked:
            return scores
        return jnp.where(visible(queries[:, None], keys[None, :], query_length, key_length, problem.band), scores, -jnp.inf)

    return scores


def key_walk(scores, v_ref, row: Row, rows: int, span, problem: Problem, block_k: int, hv, highest=None):
    """What a tile of query rows sees: the range of key blocks, and a function that gives the partial sums over a part of it.

    scores: a function as `scores_at` gives it; span: the tile's first query and how many there are; hv: value's columns; highest: a
    function that gives `online_softmax.highest_of` a block, where that is known.
    This is the one place where scores are weighed and added up: forward and decode have the same bits because of it.
    """
    blocks = visible_blocks(*span, *row.lengths, problem.band, block_k)
    log2_scale = log2_scale_of(problem.scale, problem.logits_soft_cap)

    def visit(block, partial, masked):
        is_key = block * block_k + lax.iota(jnp.int32, block_k) < row.lengths[1] if masked else None
        block_scores = scores(block, masked)
        v = load_chunks(v_ref, hv, (*row.before, pl.ds(block * block_k, block_k)), is_key)

        def weigh(p):
            return [dot(p.astype(chunk.dtype), chunk, problem.precision) for chunk in v]

        known = None if highest is None else highest(block)
        return online_softmax.update(partial, block_scores, log2_scale, weigh, scaled_exp2, known)

    def sums(start, stop):
        unmasked_start = jnp.clip(blocks.unmasked_start, start, stop)
        unmasked_stop = jnp.clip(blocks.unmasked_stop, start, stop)
        partial = online_softmax.start((rows,), tuple(c.width for c in hv))
        if problem.band.left is not None:  # only a left bound cuts blocks before the unmasked ones
            partial = lax.fori_loop(start, unmasked_start, functools.partial(visit, masked=True), partial)
        partial = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), partial)
        return online_softmax.close(lax.fori_loop(unmasked_stop, stop, functools.partial(visit, masked=True), partial))

    return blocks, sums


def splits_of(blocks, per_split: int):
    """The splits [first, end) that hold a range of blocks."""
    return quotient(blocks.start, per_split), quotient(blocks.stop + (per_split - 1), per_split)


def part_of(blocks, split, per_split: int):
    """The blocks [start, stop) of one split."""
    return jnp.maximum(blocks.start, split * per_split), jnp.minimum(blocks.stop, (split + 1) * per_split)


def finish(total, is_query, row: Row):
    """`online_softmax.finish`, with 0 and -inf for rows of a tile that are no queries, and NaN if the cache's row has overflowed."""
    out, lse = online_softmax.finish(total)
    if is_query is not None:
        out, lse = tuple(jnp.where(is_query[:, None], chunk, 0.0) for chunk in out), jnp.where(is_query, lse, -jnp.inf)
    if row.overflowed is not None:
        out, lse = tuple(jnp.where(row.overflowed, jnp.nan, chunk) for chunk in out), jnp.where(row.overflowed, jnp.nan, lse)
    return out, lse


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, tile: Tile, programs: Programs, closes: bool):
    *row_refs, out_ref, lse_ref = refs
    block_q, block_k = tile.block_q, tile.block_k
    row = row_of(row_refs, problem)
    _, query_tile, _ = programs.split(pl.program_id(0))
    first_query = query_tile * block_q
    queries = first_query + lax.iota(jnp.int32, block_q)
    is_query = queries < row.lengths[0]
    in_t = None if problem.T % block_q == 0 else queries < problem.T
    h, hv = head_chunks(problem, whole=128)
    every_row_exists = not problem.query_lengths and in_t is None
    q = load_chunks(q_ref, h, rows=None if every_row_exists else is_query)
    span = first_query, block_q
    blocks, sums = key_walk(scores_at(q, k_ref, row, queries, problem, block_k), v_ref, row, block_q, span, problem, block_k, hv)

    if not closes:
        total = sums(blocks.start, blocks.stop)
    else:
        per_split = problem.split_size // block_k

        def close(split, total):
            return online_softmax.merge(total, sums(*part_of(blocks, split, per_split)), scaled_exp2=scaled_exp2)

        nothing = online_softmax.nothing((block_q,), tuple(c.width for c in hv))
        first, end = splits_of(blocks, per_split)
        total = lax.fori_loop(first + 1, end, close, close(first, nothing))

    out, lse = finish(total, None if every_row_exists else is_query, row)
    store_chunks(out_ref, hv, out, in_t)
    store(lse_ref, lse, rows=in_t)


def forward(query, key, value, rows: Rows, problem: Problem, tiles: Tiles):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p = problem
    closes = p.split_size is not None and p.S > p.split_size
    tile = tiles.closing if closes else tiles.forward
    programs = Programs(p.B, p.N, pl.cdiv(p.T, tile.block_q), tile.heads_fastest, last_tile_first=p.band.right is not None)
    return launch(
        functools.partial(_kernel, problem=p, tile=tile, programs=programs, closes=closes),
        *(query, key, value, *rows.arrays),
        name="flashcore_forward_closing" if closes else "flashcore_forward",
        grid=programs.grid,
        in_specs=[
            programs.spec((None, tile.block_q, None, padded(p.H)), lambda b, t, n: (b, t, n, 0)),
            *(key_spec(programs, p, tile.block_k, padded(size), lambda t, n: (quotient(n, p.G), 0)) for size in (p.H, p.Hv)),
            *row_specs(programs, p),
        ],
        out_specs=[
            programs.spec((None, tile.block_q, None, padded(p.Hv)), lambda b, t, n: (b, t, n, 0)),
            programs.spec((None, None, tile.block_q), lambda b, t, n: (b, n, t)),
        ],
        out_shape=[((p.B, p.T, p.N, p.Hv), query.dtype), ((p.B, p.N, p.T), jnp.float32)],
        tile=tile,
    )
