"""How the kernels cut a call into tiles: the order of the programs, the refs' block specs, and a row's lengths.

The grid is one axis, because CUDA's second and third end at 65535. Program numbers become (batch row, tile, head), and
which of tile and head runs fastest is the tile's choice: heads fastest keeps a group's shared keys in L2.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax.problem import Problem


def padded(size: int) -> int:
    """A head dim as the kernels hold it: a power of two, and at least 16, the tensor core's smallest depth."""
    return max(16, 1 << (size - 1).bit_length())


def columns_of(size: int):
    """The mask that hides a head dim's padding, or None where there is none."""
    return None if padded(size) == size else lax.iota(jnp.int32, padded(size)) < size


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
        rest, x = lax.div(program, jnp.int32(fast)), lax.rem(program, jnp.int32(fast))
        b, y = lax.div(rest, jnp.int32(slow)), lax.rem(rest, jnp.int32(slow))
        tile, head = (y, x) if self.heads_fastest else (x, y)
        return b, (self.tiles - 1 - tile if self.last_tile_first else tile), head

    def spec(self, shape: tuple, index) -> pl.BlockSpec:
        """A block spec whose index is `index(batch row, tile, head)`."""
        return pl.BlockSpec(shape, lambda program: index(*self.split(program)))

    @property
    def row_spec(self) -> pl.BlockSpec:
        """The spec of an array with one number per batch row."""
        return self.spec((1,), lambda b, tile, head: (b,))


def row_lengths(refs, problem: Problem):
    """The row's valid queries and keys: from the refs of the lengths, clamped to the arrays, or static."""
    if not refs:
        return problem.T, problem.S
    query_ref, key_ref = refs
    return jnp.clip(query_ref[0], 0, problem.T), jnp.clip(key_ref[0], 0, problem.S)


def round_up(size: int, block: int) -> int:
    return pl.cdiv(size, block) * block
