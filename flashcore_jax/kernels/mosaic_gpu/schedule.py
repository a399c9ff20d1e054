"""Which program computes which tiles of queries: decided when a call is traced, or, where its rows have lengths, on the GPU.

A program stays for many tiles, of very different length under a causal mask: dealt out in turns, the unluckiest program of a
board's cell has up to 60 % more to do than the average one (P6), so they are dealt out to whoever has least so far. Tiles that would
make a program stay longer than the others must are dealt out in pieces, of fewer warpgroups.
"""

import bisect
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flashcore_jax.masks import Band, BlockRange, quotient, remainder, visible_blocks
from flashcore_jax.problem import Problem

ROWS = 64  # queries of a warpgroup
BLOCK = 64  # keys that the forward adds up together, as every Triton tile of such calls; the backward's of keys and queries
_L2 = 32 * 2**20  # bytes of it that keys and values may count on
_L2_BY_LENGTH = 128 * 2**20  # where tiles are dealt out by length: measured (docs/tuning.md)
_ENTRIES = 8192  # of a table, about: a larger one takes long to make, and is no better
_BETWEEN = 256  # keys' worth of time that passes between two tiles
# A block takes the time of the warpgroups that use it and of this many more: 2, 3 and 4 quarters for 1, 2 and 3 of three. Not measured:
# bounded by 0, where the tensor cores are never idle, and by a block that takes as long however few use it. Programs of two warpgroups,
# not three, took 0.75 of the time for a block (P7 of docs/tuning.md's prototypes, counting their rounds).
_UNCOVERED = 1
_CLOSE = 1.01  # to the mean: a longest program so close to it is let be
# Pieces, and very different numbers of tiles for the programs, must shorten the longest program by more than the 2 % that this count of
# its time may be wrong by.
_WORTH = 0.98


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    warpgroups: int  # of a whole tile
    rows: int  # of a head, in whole warpgroups
    heads: int  # of all rows of the batch
    N: int
    at_once: int  # heads in a row that an entry stands for
    # int32[programs, ...], a jax.Array where lengths decide: how many entries a program has, then each one's first head
    # + heads * piece, where a piece is (warpgroups in use - 1) + warpgroups * (its first row / ROWS).
    table: np.ndarray | jax.Array

    @property
    def programs(self) -> int:
        return self.table.shape[0]

    def for_turns(self, table_ref, program, run):
        """Calls `run(turn, blocks fetched before it)`, which tells how many were fetched after it, for every tile of a program."""
        lax.fori_loop(jnp.int32(0), table_ref[program, 0] * self.at_once, run, jnp.int32(0))

    def tile(self, table_ref, program, turn):
        """(row of the batch, head, first query, queries) of a program's turn."""
        entry = quotient(turn, self.at_once)
        number = table_ref[program, 1 + entry] + (turn - entry * self.at_once)
        piece = quotient(number, self.heads)
        head = number - piece * self.heads
        b = quotient(head, self.N)
        start = quotient(piece, self.warpgroups)
        return b, head - b * self.N, start * ROWS, (piece - start * self.warpgroups + 1) * ROWS

    def part(self, first, queries, warpgroup):
        """The first query of a warpgroup's part of a tile; if the tile does not use it one beyond `rows`, where there is nothing to visit
        and the copy engine finds zeros."""
        return first + jnp.where(warpgroup * ROWS < queries, warpgroup * ROWS, self.rows)


def blocks_of(first, size, lengths, band: Band, inside: BlockRange | None = None) -> BlockRange:
    """The blocks that the rows [first, first + size) must visit; of rows that are a part of a tile, within the tile's blocks `inside`,
    which a range of no block may lie outside of. lengths: (own, others')."""
    blocks = visible_blocks(first, size, *lengths, band, BLOCK)
    if inside is None:
        return blocks
    start = jnp.clip(blocks.start, inside.start, inside.stop)
    return dataclasses.replace(blocks, start=start, stop=jnp.clip(blocks.stop, start, inside.stop))


def schedule_of(problem: Problem, warpgroups: int, programs: int, lengths: tuple | None = None) -> Schedule:
    """Of rows with `lengths`, as `_by_length` takes them. None: all of them full, and then decided here.

    Heads whose keys and values fit the L2 together are computed together; among them the longest tiles are dealt out first, each to
    the program that has least to do so far. Where that pays, the last heads that are computed together are dealt out to end together:
    in pieces where tiles are too long, and so that no program has more than a limit, which is searched for.

    Where a tile has the more to do the later it stands, the one that is not full is the first: of 4,096 causal queries in tiles of
    192 that saves one part in 18."""
    p = problem
    parts = -(-p.T // ROWS)
    if lengths is not None and p.B * p.N * -(-parts // warpgroups) > 2 * programs:  # fewer tiles are not worth the kernels that deal them
        return _by_length(p, warpgroups, programs, *lengths)
    edges = sorted({0, *range(0 if p.band.right is None else parts % warpgroups, parts, warpgroups), parts})
    work = _work(p, warpgroups)
    tiles = sorted(itertools.pairwise(edges), key=lambda tile: -work[tile[1] - tile[0]][tile[0]])
    heads, together = p.B * p.N, _together(p, p.B * p.N)
    entries = heads * len(tiles)
    at_once = next(n for n in range(1, together + 1) if together % n == 0 and (entries <= n * _ENTRIES or n == together))
    *groups, last = ([(*tile, h) for tile in tiles for h in range(g, g + together, at_once)] for g in range(0, heads, together))
    before = [(0, program) for program in range(min(programs, heads // at_once * parts))], []
    for group in groups:
        before = _dealt(*before, group, work)
    whole = best = _dealt(*before, last, work)
    longest, least = best[0][-1][0], max(before[0][-1][0], sum(load for load, _ in best[0]) / len(best[0]))
    while longest > least * _CLOSE:
        limit = (least + longest) / 2
        if dealt := _dealt(*before, last, work, limit):
            best, longest = dealt, dealt[0][-1][0]
        else:
            least = limit
    if longest > _WORTH * whole[0][-1][0]:
        best = whole
    dealt = [{} for _ in best[0]]  # to each program, of each group
    for program, start, size, head in best[1]:
        dealt[program].setdefault(head // together, []).append((start * warpgroups + size - 1) * heads + head)
    # Each program begins at another of a group's tiles: where all begin with the longest, all read keys and values from memory then, and
    # find them in the L2 later. Not with a window, whose tiles share the less the further apart they stand.
    turned = p.band.left is None or p.band.right is None  # the backward's causal tiles have a left bound
    found = [
        np.concatenate([np.roll(group, -program * turned) for group in groups.values()]) for program, groups in enumerate(dealt) if groups
    ]
    table = np.zeros((len(found), 1 + max(map(len, found))), np.int32)
    for row, numbers in zip(table, found, strict=True):
        row[: 1 + len(numbers)] = len(numbers), *numbers
    return Schedule(warpgroups, parts * ROWS, heads, p.N, at_once, table)


def _together(problem: Problem, heads: int) -> int:
    """How many of so many heads are computed together: a divisor."""
    p = problem
    most = _L2 // max(p.S * (p.H + p.Hv) * 2 // p.G, 1)
    return max((n for n in range(1, heads + 1) if heads % n == 0 and n <= most), default=1)


def _by_length(problem: Problem, warpgroups: int, programs: int, own, others) -> Schedule:
    """Of rows with these lengths, int32[B] or an int for all: their valid queries and keys (of a tile of keys the other way round).

    Tiles are of each row's own length. What is beyond has others: nothing is computed there, but zeros are written. Among heads that are
    computed together the tiles with most to do come first, the ones beyond at the end of all, and they are dealt out in turns, to and fro.

    As arrays, for lengths are known on the GPU only: [rows of the batch, parts of their heads that are computed together, tiles of a head]."""
    p, heads, parts = problem, problem.B * problem.N, -(-problem.T // ROWS)
    size = _together(p, p.N)
    own, others = (jnp.clip(jnp.broadcast_to(x, p.B), 0, most)[:, None] for x, most in ((own, p.T), (others, p.S)))
    tile, inside = jnp.arange(-(-parts // warpgroups) + 1, dtype=jnp.int32), quotient(own + (ROWS - 1), ROWS)
    first = jnp.zeros_like(inside) if p.band.right is None else remainder(inside, warpgroups)
    first = jnp.where(first == 0, warpgroups, first)  # the warpgroups of a head's first tile; the others are whole, but for the last
    tiles = quotient(inside + (warpgroups - 1), warpgroups)
    beyond = inside + (tile - tiles) * warpgroups
    start = jnp.where(tile < tiles, jnp.where(tile == 0, 0, first + (tile - 1) * warpgroups), beyond)
    stop = jnp.where(tile < tiles, jnp.minimum(first + tile * warpgroups, inside), jnp.minimum(beyond + warpgroups, parts))
    blocks = blocks_of(start * ROWS, (stop - start) * ROWS, (own, others), p.band)
    work = (blocks.stop - blocks.start) * (stop - start + _UNCOVERED)
    kind = jnp.where(tile < tiles, 0, jnp.where(start < parts, 1, 2))  # the last ones are no tiles
    shape = (p.B, p.N // size, tile.size)
    row, part = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    number = row * p.N + part * size + heads * (stop - start - 1 + warpgroups * start)[:, None]
    keys = -work[:, None], kind[:, None]
    of_part = size * (p.H + p.Hv) * 2 / p.G / _L2_BY_LENGTH  # for each key
    if p.B * shape[1] * p.S * of_part > 1:
        group = jnp.floor(jnp.cumsum(jnp.broadcast_to(others * of_part, shape[:2]))).reshape(*shape[:2], 1)
        keys = keys[0], group, keys[1]
    order = jnp.lexsort([jnp.broadcast_to(x, shape).ravel() for x in keys])
    programs = min(programs, heads * -(-parts // warpgroups))
    turn, program = np.arange(-(-order.size * size // programs), dtype=np.int32), np.arange(programs, dtype=np.int32)[:, None]
    place = turn * programs + np.where(turn % 2 == 0, program, programs - 1 - program)
    entries = number.ravel()[order][np.minimum(place // size, order.size - 1)] + place % size
    turns = jnp.sum(place < size * shape[1] * jnp.sum(kind < 2, dtype=jnp.int32), axis=1, keepdims=True, dtype=jnp.int32)
    return Schedule(warpgroups, parts * ROWS, heads, p.N, 1, jnp.concatenate([turns, entries.astype(jnp.int32)], axis=1))


def _dealt(loads, pieces, tiles, work, limit=None):
    """(each program's load and number, sorted; the pieces dealt out) after these tiles, a piece being (program, start, warpgroups, head).
    A tile is for the program that has least to do; with a limit, for the one that has most of those that it leaves within the limit. If it
    fits none, the widest piece that fits one is cut off its end; None where no piece does."""
    loads, pieces = list(loads), list(pieces)
    for start, stop, head in tiles:
        while start < stop:
            for size in range(stop - start, 0, -1):
                more = work[size][stop - size]
                at = 0 if limit is None else bisect.bisect_right(loads, (limit - more, len(loads))) - 1
                if at >= 0:
                    break
            else:
                return None
            load, program = loads.pop(at)
            bisect.insort(loads, (load + more, program))
            stop -= size
            pieces.append((program, stop, size, head))
    return loads, pieces


def _work(problem: Problem, warpgroups: int) -> list[list[int]]:
    """How long pieces of so many warpgroups take that begin at each warpgroup's rows, in keys of one warpgroup."""
    p = problem
    first, shift = np.arange(0, p.T, ROWS), p.S - p.T
    low = np.zeros_like(first) if p.band.left is None else np.maximum(first + shift - p.band.left, 0)
    work = []
    for size in range(warpgroups + 1):
        last = np.minimum(first + size * ROWS, p.T) - 1
        high = np.full_like(first, p.S) if p.band.right is None else np.minimum(last + shift + p.band.right + 1, p.S)
        keys = np.maximum(high - low, 0)
        work.append((keys * (size + _UNCOVERED) + _BETWEEN * (warpgroups + _UNCOVERED)).tolist())
    return work
