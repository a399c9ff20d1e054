"""How the kernels cut a call into tiles: the order of the programs, the refs' block specs, and a row's lengths.

The grid is one axis, because CUDA's second and third end at 65535. Program numbers become (batch row, tile, head), and
which of tile and head runs fastest is the tile's choice: heads fastest keeps a group's shared keys in L2.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax.masks import quotient
from flashcore_jax.problem import Problem


@dataclasses.dataclass(frozen=True)
class Columns:
    """A run of a head dim's columns that a kernel holds as one array: a power of two wide, as Triton asks."""

    start: int
    width: int
    used: int  # columns of it that exist

    @property
    def at(self):
        return pl.ds(self.start, self.width)

    @property
    def exist(self):
        """The mask that hides the padding, or None where there is none."""
        return None if self.used == self.width else lax.iota(jnp.int32, self.width) < self.used


def column_chunks(size: int) -> tuple[Columns, ...]:
    """A head dim as powers of two, the widest first: 128 is one chunk, 192 is 128 + 64, 80 is 64 + 16."""
    chunks, start = [], 0
    while start < size:
        rest = size - start
        # 16 is the tensor core's smallest depth; below that the chunk is padded.
        width = max(16, 1 << (rest.bit_length() - 1))
        chunks.append(Columns(start, width, min(width, rest)))
        start += width
    return tuple(chunks)


def padded(size: int) -> int:
    """The columns that the chunks of a head dim span."""
    last = column_chunks(size)[-1]
    return last.start + last.width


@dataclasses.dataclass(frozen=True)
class Programs:
    """The programs of one launch: `tiles` tiles of `heads` heads of `batch` rows."""

    batch: int
    heads: int
    tiles: int
    heads_fastest: bool
    last_tile_first: bool

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.heads * self.tiles,)

    def split(self, program):
        """The (batch row, tile, head) of a program number."""
        fast = self.heads if self.heads_fastest else self.tiles
        slow = self.tiles if self.heads_fastest else self.heads
        rest, b = quotient(program, fast), quotient(program, fast * slow)
        x, y = program - rest * fast, rest - b * slow
        tile, head = (y, x) if self.heads_fastest else (x, y)
        return b, self.tiles - 1 - tile if self.last_tile_first else tile, head

    def spec(self, shape: tuple, index) -> pl.BlockSpec:
        """A block spec whose index is `index(batch row, tile, head)`."""
        return pl.BlockSpec(shape, lambda program: index(*self.split(program)))

    @property
    def row_spec(self) -> pl.BlockSpec:
        """The spec of an array with one number per batch row."""
        return self.spec((1,), lambda b, tile, head: (b,))


def row_lengths(refs, problem: Problem):
    """The row's valid queries and keys: from the first two refs, clamped to the arrays, or static."""
    if not problem.ragged:
        return problem.T, problem.S
    query_ref, key_ref, *_ = refs
    return jnp.clip(query_ref[0], 0, problem.T), jnp.clip(key_ref[0], 0, problem.S)


def layer_index(refs, problem: Problem) -> tuple:
    """What stands before the keys' index in a stacked cache: the layer, from the last ref; () where there is no stack."""
    return () if problem.L is None else (jnp.clip(refs[-1][0], 0, problem.L - 1),)


def key_spec(programs: Programs, problem: Problem, block: int, columns: int, index) -> pl.BlockSpec:
    """The spec of all rows of one head of key or value, where `index(tile, head)` gives (key/value head, block of columns).

    A stacked cache is indexed in the kernel: a layer sliced out of it would be a copy.
    """
    stack, first = ((), ()) if problem.L is None else ((problem.L,), (0,))

    def at(b, tile, head):
        kv_head, column = index(tile, head)
        return (*first, b, 0, kv_head, column)

    return programs.spec((*stack, None, round_up(problem.S, block), None, columns), at)


def scalar_specs(programs: Programs, problem: Problem) -> list[pl.BlockSpec]:
    """The specs of a row's two lengths and of the layer, where there are any."""
    return [programs.row_spec] * (2 * problem.ragged) + [pl.BlockSpec((1,), lambda program: (0,))] * (problem.L is not None)


def round_up(size: int, block: int) -> int:
    return pl.cdiv(size, block) * block
