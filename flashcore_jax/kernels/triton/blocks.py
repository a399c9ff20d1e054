"""How the kernels cut a call into tiles: the order of the programs, the refs' block specs, and what is told of a row.

The grid is one axis, because CUDA's second and third end at 65535. Program numbers become (batch row, tile, head), and
which of tile and head runs fastest is the tile's choice: heads fastest keeps a group's shared keys in L2.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax.kernels.triton.launch import by_parts, load
from flashcore_jax.masks import quotient, remainder
from flashcore_jax.problem import Problem
from flashcore_jax.rows import told


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


def head_chunks(problem: Problem, whole: int = 64) -> tuple[tuple[Columns, ...], tuple[Columns, ...]]:
    """How a kernel holds the columns of query and key, and those of value; it has registers for `whole` columns of value at once."""
    if not by_parts(problem.precision):
        return column_chunks(problem.H), column_chunks(problem.Hv)
    # Each operand takes registers three times, and each product's sum stands beside the accumulator: 64 columns spill least.
    return column_chunks(problem.H, 64), column_chunks(problem.Hv, whole if problem.Hv <= whole else 64)


def column_chunks(size: int, widest: int = 256) -> tuple[Columns, ...]:
    """A head dim as powers of two, the widest first: 128 is one chunk, 192 is 128 + 64, 80 is 64 + 16."""
    chunks, start = [], 0
    while start < size:
        rest = size - start
        # 16 is the tensor core's smallest depth; below that the chunk is padded.
        width = min(widest, max(16, 1 << (rest.bit_length() - 1)))
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
    whole_batch: bool = False  # the refs have all rows, and the kernel chooses its own
    tiles_slowest: bool = False  # else the rows are

    @property
    def grid(self) -> tuple[int]:
        return (self.batch * self.heads * self.tiles,)

    def split(self, program):
        """The (batch row, tile, head) of a program number."""
        if self.tiles_slowest:
            rest = quotient(program, self.heads)
            return remainder(rest, self.batch), quotient(rest, self.batch), remainder(program, self.heads)
        fast = self.heads if self.heads_fastest else self.tiles
        slow = self.tiles if self.heads_fastest else self.heads
        rest, b = quotient(program, fast), quotient(program, fast * slow)
        # That a tile's number is below the number of tiles is what tells Triton that the masks of whole tiles are true.
        x, y = remainder(program, fast), remainder(rest, slow)
        tile, head = (y, x) if self.heads_fastest else (x, y)
        return b, self.tiles - 1 - tile if self.last_tile_first else tile, head

    def spec(self, shape: tuple, index) -> pl.BlockSpec:
        """A block spec whose index is `index(batch row, tile, head)`. The first axis is the batch's."""
        if self.whole_batch:
            return pl.BlockSpec((self.batch, *shape[1:]), lambda program: (0, *index(*self.split(program))[1:]))
        return pl.BlockSpec(shape, lambda program: index(*self.split(program)))


def row_specs(programs: Programs, problem: Problem) -> list[pl.BlockSpec]:
    """The specs of `Rows.arrays`."""
    p = problem
    of_cache = number_spec(programs, p.L)
    return [spec for spec, there in zip((number_spec(programs), of_cache, of_cache, LAYER_SPEC), told(p), strict=True) if there]


def number_spec(programs: Programs, layers: int | None = None) -> pl.BlockSpec:
    """The spec of an array with one number per batch row. Rounded up, since kernels load a power of two of them."""
    spec = stack_spec(programs, layers, (1,), lambda b, tile, head: (b,))
    return pl.BlockSpec(tuple(map(pl.next_power_of_2, spec.block_shape)), spec.index_map)


def stack_spec(programs: Programs, layers: int | None, shape: tuple, index) -> pl.BlockSpec:
    """`programs.spec` of an array with an axis of layers in front, if any. All of it: a layer sliced out would be a copy."""
    spec = programs.spec(shape, index)
    return spec if layers is None else pl.BlockSpec((layers, *spec.block_shape), lambda program: (0, *spec.index_map(program)))


def number_of(ref, layer: tuple, b, layers: int | None):
    """Of row b: ref[layer, b], or ref[b] where there are no layers. Those of all layers are loaded: one alone would wait for its number."""
    if layers is None:
        return ref[b]
    every = lax.iota(jnp.int32, pl.next_power_of_2(layers))
    return jnp.sum(jnp.where(every == layer[0], load(ref, (pl.ds(0, every.size), b), every < layers, fill=0), 0), dtype=jnp.int32)


LAYER_SPEC = pl.BlockSpec((1,), lambda program: (0,))


def key_spec(programs: Programs, problem: Problem, block: int, columns: int, index) -> pl.BlockSpec:
    """The spec of all rows of one head of key or value, where `index(tile, head)` gives (key/value head, block of columns)."""

    def at(b, tile, head):
        kv_head, column = index(tile, head)
        return (b, 0, kv_head, column)

    return stack_spec(programs, problem.L, (None, round_up(problem.S, block), None, columns), at)


def round_up(size: int, block: int) -> int:
    return pl.cdiv(size, block) * block
