"""Which program computes which tiles of queries, decided when a call is traced.

A program stays for many tiles, of very different length under a causal mask: dealt out in turns, the unluckiest program of a
board's cell has up to 60 % more to do than the average one (P6), dealt out to whoever has least so far 8 % (P9, which has few tiles),
in all others 3 % at most.
"""

import dataclasses
import heapq

import jax.numpy as jnp
import numpy as np
from jax import lax

from flashcore_jax.masks import Band, BlockRange, quotient, visible_blocks
from flashcore_jax.problem import Problem

ROWS = 64  # queries of a warpgroup
BLOCK = 64  # keys that the forward adds up together, as every Triton tile of such calls; the backward's of keys and queries
_L2 = 32 * 2**20  # bytes of it that keys and values may count on
_ENTRIES = 8192  # of a table, about: a larger one takes long to make, and is no better
_BETWEEN = 256  # keys' worth of time that passes between two tiles


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    queries: int  # of a tile
    before: int  # how many of the first tile's stand before query 0
    heads: int  # of all rows of the batch
    N: int
    at_once: int  # heads in a row that an entry stands for
    table: np.ndarray  # int32[programs, ...]: how many entries a program has, then each one's first head, and tile times heads

    @property
    def programs(self) -> int:
        return self.table.shape[0]

    def for_turns(self, table_ref, program, run):
        """Calls `run(turn, blocks fetched before it)`, which tells how many were fetched after it, for every tile of a program."""
        lax.fori_loop(jnp.int32(0), table_ref[program, 0] * self.at_once, run, jnp.int32(0))

    def tile(self, table_ref, program, turn):
        """(row of the batch, head, first query) of a program's turn; the first query may be below 0."""
        entry = quotient(turn, self.at_once)
        number = table_ref[program, 1 + entry] + (turn - entry * self.at_once)
        tile = quotient(number, self.heads)
        head = number - tile * self.heads
        b = quotient(head, self.N)
        return b, head - b * self.N, tile * self.queries - self.before


def blocks_of(first, size: int, lengths, band: Band, inside: BlockRange | None = None) -> BlockRange:
    """The blocks that the rows [first, first + size) of a schedule's tile must visit, which may begin before row 0; of rows that are a
    part of a tile, within the tile's blocks `inside`, which a range of no block may lie outside of. lengths: (own, others')."""
    before = jnp.minimum(first, 0)
    blocks = visible_blocks(first - before, size + before, *lengths, band, BLOCK)
    if inside is None:
        return blocks
    start = jnp.clip(blocks.start, inside.start, inside.stop)
    return dataclasses.replace(blocks, start=start, stop=jnp.clip(blocks.stop, start, inside.stop))


def schedule_of(problem: Problem, queries: int, programs: int) -> Schedule:
    """Heads whose keys and values fit the L2 together are computed together; among them the longest tiles come first, each by
    the program that has least to do so far. Lengths that only the call knows are taken to be full.

    Where a tile has the more to do the later it stands, the one that is not full is the first: of 4,096 causal queries in tiles of
    192 that saves one part in 18."""
    p = problem
    before = 0 if p.band.right is None else -(-(-p.T // ROWS) * ROWS) % queries
    heads, bytes_of_head = p.B * p.N, p.S * (p.H + p.Hv) * 2 // p.G
    together = max((n for n in range(1, heads + 1) if heads % n == 0 and n * bytes_of_head <= _L2), default=1)
    work = _work(p, queries, before)
    entries = heads * len(work)
    at_once = next(n for n in range(1, together + 1) if together % n == 0 and (entries <= n * _ENTRIES or n == together))
    loads = [(0, program) for program in range(min(programs, entries // at_once))]
    found = [[] for _ in loads]
    for group in range(0, heads, together):
        for tile in np.argsort(-work, kind="stable"):
            for head in range(group, group + together, at_once):
                load, program = loads[0]
                heapq.heapreplace(loads, (load + int(work[tile]) * at_once, program))
                found[program].append(int(tile) * heads + head)
    table = np.zeros((len(found), 1 + max(map(len, found))), np.int32)
    for row, numbers in zip(table, found, strict=True):
        row[: 1 + len(numbers)] = len(numbers), *numbers
    return Schedule(queries, before, heads, p.N, at_once, table)


def _work(problem: Problem, queries: int, before: int) -> np.ndarray:
    """How long each tile of a head takes, in keys."""
    p = problem
    first = np.arange(-before, p.T, queries)
    first, last, shift = np.maximum(first, 0), np.minimum(first + queries, p.T) - 1, p.S - p.T
    low = np.zeros_like(first) if p.band.left is None else first + shift - p.band.left
    high = np.full_like(first, p.S) if p.band.right is None else last + shift + p.band.right + 1
    return np.maximum(np.minimum(high, p.S) - np.maximum(low, 0), 0) + _BETWEEN
