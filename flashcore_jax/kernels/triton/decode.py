"""Attention of few queries on many keys: programs share out the keys of a row, and a second kernel adds up what they found.

A tile holds the query rows (query x head) of one key/value head's whole group, so each key is read once. A program covers
one split of `split_size` keys: the partial sums that the forward kernel closes, from the same `key_walk`, merged in the
same order. Decode therefore has the bits of prefill. Splits beyond a row's length or window are neither visited nor
merged; the grid depends on the capacity alone, so the call lives in a loop without asking the host anything.

Where that leaves multiprocessors idle (few rows, few splits), the columns of value are shared out too, and what takes the time is a
split's chain of blocks. A long one is kept short: a kernel with a program for every block computes the scores first. The additions are
what they were.

Where there are more programs than run at once, the first splits of all rows come last, that of the longest row before the others: what
the last programs read is then soon read.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023); fixed splits are this package's (docs/numerics.md).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax import online_softmax
from flashcore_jax.kernels.triton.blocks import Columns, Programs, column_chunks, head_chunks, key_spec, number_of, padded, row_specs
from flashcore_jax.kernels.triton.forward import finish, key_walk, part_of, scores_at, splits_of
from flashcore_jax.kernels.triton.launch import launch, load, load_chunks, scaled_exp2, store
from flashcore_jax.logits import log2_scale_of
from flashcore_jax.masks import quotient, remainder, visible_blocks
from flashcore_jax.problem import DEFAULT_SPLIT_SIZE, Problem
from flashcore_jax.rows import Row, Rows, row_of
from flashcore_jax.tuning.tiles import Tile, Tiles

_MERGED_AT_ONCE = 32  # partial sums that are loaded before the first is added: their latencies overlap
_MERGED_UNSEEN = 4  # that are loaded before the row's length is there, though it may have fewer
_MERGING = Tile(0, 0, num_warps=4, num_stages=1)
_LONG_CHAIN = 16  # blocks of a split, from which on it pays to compute the scores in a kernel of their own
_CHAIN = dict(block_q=16, num_warps=4, num_stages=4)  # of the tile that finds its scores computed
_MOST_SORTED = 128  # rows: a program compares each with each


@dataclasses.dataclass(frozen=True)
class Cut:
    """How the work of one key/value head is cut into programs."""

    tile: Tile
    row_tiles: int  # tiles of query rows
    per_split: int  # key blocks of a split
    splits: int
    parts: int  # of value's columns
    scores_first: bool
    short_last: bool  # the order of the programs: those of the first splits come last, by the lengths of their rows

    @property
    def programs(self) -> int:
        return self.row_tiles * self.splits * self.parts

    def split(self, tile):
        """The (row tile, split, part) of a tile number."""
        rest, row_tile = quotient(tile, self.parts), quotient(tile, self.parts * self.splits)
        split = rest - row_tile * self.splits
        return row_tile, remainder(split + 1, self.splits) if self.short_last else split, tile - rest * self.parts


def suits(problem: Problem) -> bool:
    """Whether a call is faster here than in the forward kernel, which fills the GPU with tiles of queries. The bits are the same."""
    p = problem
    return p.T <= 16 or (p.split_size is not None and p.B * p.N * p.T <= 4096 and p.S >= 4 * p.split_size)


def cut_for(problem: Problem, tile: Tile, multiprocessors: int) -> Cut:
    """Splits of `split_size` keys; with None of the default's, or shorter ones where those leave multiprocessors idle. Where they do
    all the same, parts of value's columns."""
    p = problem
    row_tiles, blocks = pl.cdiv(p.T * p.G, tile.block_q), pl.cdiv(p.S, tile.block_k)
    tiles = p.B * p.K * row_tiles
    per_split = (p.split_size or DEFAULT_SPLIT_SIZE) // tile.block_k
    if p.split_size is None and 4 * tiles * pl.cdiv(blocks, per_split) < 3 * multiprocessors:
        per_split = max(pl.cdiv(blocks, _splits_for(tiles, multiprocessors)), 128 // tile.block_k)
    per_split = min(per_split, blocks)  # else the end of an empty split behind them may not fit 32 bits
    splits = pl.cdiv(blocks, per_split)
    parts = 1
    while 2 * tiles * splits * parts <= multiprocessors and p.Hv % (2 * parts) == 0 and p.Hv // (2 * parts) in (32, 64, 128):
        parts *= 2
    # Of few rows, or the scores are larger than the keys. Not in float32, where it has not been measured and ptxas spills (A100).
    scores_first = parts > 1 and per_split >= _LONG_CHAIN and p.T * p.G <= _CHAIN["block_q"] and p.dtype != "float32"
    if scores_first:
        tile = dataclasses.replace(tile, **_CHAIN)
    elif parts > 1:
        # An empty split, left at once: with one split alone ptxas makes the tensor cores wait after every product (D7: 33 us).
        splits = max(splits, 2)
    at_once = multiprocessors * max(256 // p.H, 1)  # by the shared memory that they take
    short_last = p.key_lengths and 1 < p.B <= _MOST_SORTED and row_tiles == 1 and tiles * splits > at_once and p.S * p.B < 2**30
    return Cut(tile, row_tiles, per_split, splits, parts, scores_first, short_last)


def _splits_for(tiles: int, multiprocessors: int) -> int:
    """So many that each multiprocessor has one program, or two, and few have none; else that each has about four."""
    for each in (1, 2):
        splits = each * multiprocessors // tiles
        if splits * tiles >= 0.9 * each * multiprocessors:
            return splits
    return 4 * multiprocessors // tiles


def _rows_of(first, count: int, problem: Problem):
    """For tile rows from `first` on: each row's query and head of the group, and the (first query, number of queries)."""
    rows = first + lax.iota(jnp.int32, count)
    queries = quotient(rows, problem.G)
    first_query, last_query = quotient(first, problem.G), quotient(first + (count - 1), problem.G)
    return rows, queries, rows - queries * problem.G, (first_query, last_query + 1 - first_query)


def _row_of(row_refs, problem: Problem, b) -> Row:
    """Row b of refs that have all rows."""
    row = row_of(row_refs, problem, b, number_of)
    return row._replace(before=(*row.before, b))


def _by_length(row_refs, problem: Problem, place):
    """The row that comes at this place when those with the most keys come first."""
    p, size = problem, pl.next_power_of_2(problem.B)
    rows = lax.iota(jnp.int32, size)
    key_ref, before = row_refs[int(p.query_lengths)], row_of(row_refs, p).before
    lengths = load(key_ref, (*before, pl.ds(0, size)), rows < p.B, fill=-(1 << 31) // size)
    # Of rows with as many keys the first has the highest number. All have different ones, though the product may wrap around.
    numbers = lengths * size + (size - 1 - rows)
    places = jnp.sum(numbers[:, None] > numbers[None, :], axis=0, dtype=jnp.int32)
    return jnp.sum(jnp.where(places == place, rows, 0), dtype=jnp.int32)


def _scores(q_ref, k_ref, row, b, out_rows, queries, problem: Problem, block_k: int):
    """`scores_at` of the rows of query [B, T * N, H]."""
    h, _ = head_chunks(problem)
    q = tuple(load(q_ref, (b, *_scattered(out_rows, c)), queries < row.lengths[0], c.exist) for c in h)
    return scores_at(q, k_ref, row, queries, problem, block_k)


def _scores_kernel(q_ref, k_ref, *refs, problem: Problem, tile: Tile, programs: Programs):
    *row_refs, scores_ref, highest_ref = refs
    p = problem
    b, block, kv_head = programs.split(pl.program_id(0))
    row = _row_of(row_refs, p, b)
    rows, queries, head, span = _rows_of(jnp.int32(0), tile.block_q, p)
    exist = rows < p.T * p.G
    visited = visible_blocks(*span, *row.lengths, p.band, tile.block_k)

    @pl.when((visited.start <= block) & (block < visited.stop))
    def _():
        out_rows = queries * p.N + kv_head * p.G + head
        scores = _scores(q_ref, k_ref, row, b, out_rows, queries, p, tile.block_k)(block, masked=True)
        highest = online_softmax.highest_of(scores, log2_scale_of(p.scale, p.logits_soft_cap))
        store(scores_ref, scores, (b, slice(None), slice(None)), exist)
        store(highest_ref, highest, (b, slice(None)), exist)


def _split_kernel(left_ref, right_ref, v_ref, *refs, problem: Problem, programs: Programs, cut: Cut):
    """left_ref and right_ref: query and key; or the scores and their highest."""
    p, block_q, block_k = problem, cut.tile.block_q, cut.tile.block_k
    number_of_outputs = 2 if cut.splits == 1 else 3
    row_refs, out_refs = refs[:-number_of_outputs], refs[-number_of_outputs:]
    b, tile_number, kv_head = programs.split(pl.program_id(0))
    row_tile, split, part = cut.split(tile_number)
    if cut.short_last:
        b = lax.cond(split == 0, functools.partial(_by_length, row_refs, p), lambda b: b, b)
    row = _row_of(row_refs, p, b)
    rows, queries, head, span = _rows_of(row_tile * block_q, block_q, p)
    hv, _ = _columns(p, cut)
    exist, is_query, out_rows = rows < p.T * p.G, queries < row.lengths[0], queries * p.N + kv_head * p.G + head

    def walk():
        if not cut.scores_first:
            scores, highest = _scores(left_ref, right_ref, row, b, out_rows, queries, p, block_k), None
        else:

            def scores(block, masked):
                return load(left_ref, (b, slice(None), pl.ds(block * block_k, block_k)), exist)

            def highest(block):
                return load(right_ref, (b, block, slice(None)), exist)

        return key_walk(scores, v_ref, row, block_q, span, p, block_k, hv, highest)

    if cut.splits == 1:
        blocks, sums = walk()
        columns = tuple(dataclasses.replace(c, start=c.start + part * c.width) for c in hv) if cut.parts > 1 else hv
        _store(sums(blocks.start, blocks.stop), out_refs, columns, b, out_rows, is_query, exist, row)
        return
    blocks = visible_blocks(*span, *row.lengths, p.band, block_k)
    start, stop = part_of(blocks, split, cut.per_split)

    @pl.when(start < stop)
    def _():
        _, sums = walk()
        partial = sums(start, stop)
        acc_ref, sum_ref, max_ref = out_refs
        for c, chunk in zip(hv, partial.acc, strict=True):
            store(acc_ref, chunk, (b, slice(None), c.at), exist, c.exist)
        store(sum_ref, partial.row_sum, (b, slice(None)), exist)
        store(max_ref, partial.running_max, (b, slice(None)), exist)


def _merge_kernel(
    acc_ref, sum_ref, max_ref, *refs, problem: Problem, block_k: int, programs: Programs, per_split: int, splits: int, count: int
):
    *row_refs, out_ref, lse_ref = refs
    p = problem
    b, row_tile, kv_head = programs.split(pl.program_id(0))
    row = _row_of(row_refs, p, b)
    rows, queries, head, span = _rows_of(row_tile * count, count, p)
    hv = column_chunks(p.Hv)
    exist = rows < p.T * p.G
    first, end = splits_of(visible_blocks(*span, *row.lengths, p.band, block_k), per_split)
    at_once = min(_MERGED_AT_ONCE, splits)

    def partial(split):
        there, at = exist & (split < end), (b, split, slice(None))
        acc = load_chunks(acc_ref, hv, at, there)
        return online_softmax.Partial(acc, load(sum_ref, at, there), load(max_ref, at, there, fill=online_softmax.LOWEST))

    def partial_if_any(split):
        """What a row that has no such split may find there does not count."""
        at, there = (b, jnp.int32(split), slice(None)), (first <= split) & (split < end)
        acc, row_sum, running_max = load_chunks(acc_ref, hv, at, exist), load(sum_ref, at, exist), load(max_ref, at, exist)
        acc = tuple(jnp.where(there, x, 0.0) for x in acc)
        return online_softmax.Partial(acc, jnp.where(there, row_sum, 0.0), jnp.where(there, running_max, online_softmax.LOWEST))

    def add(group, total):
        return online_softmax.merge(total, *[partial(first + group * at_once + i) for i in range(at_once)], scaled_exp2=scaled_exp2)

    nothing = online_softmax.nothing((count,), tuple(c.width for c in hv))
    if splits <= _MERGED_UNSEEN:
        total = online_softmax.merge(nothing, *map(partial_if_any, range(splits)), scaled_exp2=scaled_exp2)
    else:
        total = lax.fori_loop(jnp.int32(0), quotient(end - first + (at_once - 1), at_once), add, nothing)
    _store(total, (out_ref, lse_ref), hv, b, queries * p.N + kv_head * p.G + head, queries < row.lengths[0], exist, row)


def _scattered(rows, columns: Columns):
    """The index of rows that need not be neighbours. (A row that does not exist must lie outside the array: the interpreter
    writes back what was there under a mask, and would undo another row's store.)"""
    shape = (rows.shape[0], columns.width)
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to((columns.start + lax.iota(jnp.int32, columns.width))[None, :], shape)


def _store(total, out_refs, hv, b, out_rows, is_query, exist, row):
    out_ref, lse_ref = out_refs
    out, lse = finish(total, is_query, row)
    for c, chunk in zip(hv, out, strict=True):
        store(out_ref, chunk, (b, *_scattered(out_rows, c)), exist, c.exist)
    store(lse_ref, lse, (b, out_rows), exist)


def _columns(problem: Problem, cut: Cut):
    """The columns of value that a program holds, and how many its block spans."""
    if cut.parts == 1:
        _, hv = head_chunks(problem, whole=128)
        return hv, padded(problem.Hv)
    width = problem.Hv // cut.parts
    return (Columns(0, width, width),), width


def decode(query, key, value, rows: Rows, problem: Problem, tiles: Tiles, multiprocessors: int):
    """As `forward.forward`: the output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p = problem
    cut = cut_for(p, tiles.decode, multiprocessors)
    tile = cut.tile
    programs = Programs(p.B, p.K, cut.programs, tile.heads_fastest, last_tile_first=False, whole_batch=True, tiles_slowest=cut.short_last)
    _, width = _columns(p, cut)
    query = query.reshape(p.B, p.T * p.N, p.H)

    def per_split(*columns):
        """The spec of an array [B, K, splits, rows] or [B, K, splits, rows, columns]."""

        def at(b, t, k):
            row_tile, split, part = cut.split(t)
            return (b, k, split, row_tile, *[part] * len(columns))

        return programs.spec((None, None, None, tile.block_q, *columns), at)

    if cut.scores_first:
        left = _scores_first(query, key, rows, p, tiles.decode)
        left_specs = [
            programs.spec((None, None, tile.block_q, left[0].shape[-1]), lambda b, t, k: (b, k, cut.split(t)[0], 0)),
            programs.spec((None, None, left[1].shape[2], tile.block_q), lambda b, t, k: (b, k, 0, cut.split(t)[0])),
        ]
    else:
        left = query, key
        left_specs = [
            programs.spec((None, p.T * p.N, padded(p.H)), lambda b, t, k: (b, 0, 0)),
            key_spec(programs, p, tile.block_k, padded(p.H), lambda t, k: (k, 0)),
        ]
    partial_shape = (p.B, p.K, cut.splits, p.T * p.G)
    found = launch(
        functools.partial(_split_kernel, problem=p, programs=programs, cut=cut),
        *(*left, value, *rows.arrays),
        name="flashcore_decode",
        grid=programs.grid,
        in_specs=[*left_specs, key_spec(programs, p, tile.block_k, width, lambda t, k: (k, cut.split(t)[2])), *row_specs(programs, p)],
        out_specs=_every_row(programs, p) if cut.splits == 1 else [per_split(width), per_split(), per_split()],
        out_shape=_out_shape(p) if cut.splits == 1 else [((*partial_shape, *last), jnp.float32) for last in ((p.Hv,), (), ())],
        tile=tile,
    )
    if cut.splits > 1:
        return merge(found, rows, p, tile.block_k, cut.per_split, cut.splits)
    return _by_query(found, p)


def _every_row(programs: Programs, problem: Problem):
    """The specs of out [B, T * N, Hv] and lse [B, T * N]."""
    rows = problem.T * problem.N
    return [programs.spec((None, rows, padded(problem.Hv)), lambda b, t, k: (b, 0, 0)), programs.spec((None, rows), lambda b, t, k: (b, 0))]


def _out_shape(problem: Problem):
    p = problem
    return [((p.B, p.T * p.N, p.Hv), p.dtype), ((p.B, p.T * p.N), jnp.float32)]


def _by_query(found, problem: Problem):
    p, (out, lse) = problem, found
    return out.reshape(p.B, p.T, p.N, p.Hv), lse.reshape(p.B, p.T, p.N).swapaxes(1, 2)


def merge(partials, rows: Rows, problem: Problem, block_k: int, per_split: int, splits: int):
    """Adds up what splits of so many key blocks have found: acc float32[B, K, splits, T * G, Hv], row_sum and running_max without Hv.
    (There may be more than T * G rows.) Returns what `decode` does."""
    p = problem
    # One number a thread where many sums are held at once, four where few are.
    count = max(1, 128 * (4 if splits <= 8 else 1) // pl.next_power_of_2(padded(p.Hv)))
    programs = Programs(p.B, p.K, pl.cdiv(p.T * p.G, count), heads_fastest=False, last_tile_first=False, whole_batch=True)
    statistic = programs.spec((None, None, splits, count), lambda b, t, k: (b, k, 0, t))
    acc = programs.spec((None, None, splits, count, padded(p.Hv)), lambda b, t, k: (b, k, 0, t, 0))
    found = launch(
        functools.partial(_merge_kernel, problem=p, block_k=block_k, programs=programs, per_split=per_split, splits=splits, count=count),
        *(*partials, *rows.arrays),
        name="flashcore_merge",
        grid=programs.grid,
        in_specs=[acc, statistic, statistic, *row_specs(programs, p)],
        out_specs=_every_row(programs, p),
        out_shape=_out_shape(p),
        tile=_MERGING,
    )
    return _by_query(found, p)


def _scores_first(query, key, rows: Rows, problem: Problem, tile: Tile):
    """Of queries [B, T * N, H]: the scores float32[B, K, rows, S in whole blocks] and `highest_of` them float32[B, K, blocks, rows], where
    a row is a query of a head of the group. Blocks that no row sees are not written."""
    p = problem
    blocks, count = pl.cdiv(p.S, tile.block_k), p.T * p.G
    programs = Programs(p.B, p.K, blocks, heads_fastest=False, last_tile_first=False, whole_batch=True)
    return launch(
        functools.partial(_scores_kernel, problem=p, tile=tile, programs=programs),
        *(query, key, *rows.arrays),
        name="flashcore_decode_scores",
        grid=programs.grid,
        in_specs=[
            programs.spec((None, p.T * p.N, padded(p.H)), lambda b, t, k: (b, 0, 0)),
            key_spec(programs, p, tile.block_k, padded(p.H), lambda t, k: (k, 0)),
            *row_specs(programs, p),
        ],
        out_specs=[
            programs.spec((None, None, tile.block_q, tile.block_k), lambda b, t, k: (b, k, 0, t)),
            programs.spec((None, None, None, tile.block_q), lambda b, t, k: (b, k, t, 0)),
        ],
        out_shape=[((p.B, p.K, count, blocks * tile.block_k), jnp.float32), ((p.B, p.K, blocks, count), jnp.float32)],
        tile=tile,
    )
