"""Rows of a batch and of a cache: their lengths, what an append does to them, and where those of a layer lie."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rows(NamedTuple):
    """What is told of a batch's rows beside the arrays; None: nothing."""

    query_length: jax.Array | None = None  # int32[B]
    key_length: jax.Array | None = None  # int32[B], of a stacked cache [L, B]
    overflowed: jax.Array | None = None  # bool of the same shape, for a cache
    layer: jax.Array | None = None  # int32[1], for a stacked one

    def of_layer(self) -> "Rows":
        return Rows(self.query_length, *(of_layer(x, self.layer) for x in (self.key_length, self.overflowed)))

    def lengths(self, problem) -> tuple:
        """(queries, keys) of each row, of one layer: int32[B], or an int for all of them."""
        of_row = problem.T if self.query_length is None else self.query_length
        return of_row, problem.S if self.key_length is None else of_layer(self.key_length, self.layer)

    def without_overflowed(self, T: int) -> "Rows":
        """The rows of one layer's, where those that have overflowed have no queries: their NaN depends on nothing."""
        return Rows(jnp.where(self.overflowed, 0, T if self.query_length is None else self.query_length), self.key_length)

    @property
    def arrays(self) -> list:
        return [x for x in self if x is not None]


def told(problem) -> tuple[bool, ...]:
    """Which fields of `Rows` a call's problem has."""
    p = problem
    return p.query_lengths, p.key_lengths, p.cached, p.L is not None


class Row(NamedTuple):
    """What a kernel knows of its batch row."""

    lengths: tuple  # valid queries and keys, clamped to the arrays
    overflowed: object = None  # of a cache's row: the answer is NaN
    before: tuple = ()  # what stands before the index of a token into keys and values: of a stack its layer


def row_of(refs, problem, b=0, number_of=lambda ref, layer, b, layers: ref[(*layer, b)]) -> Row:
    """Row b, from a kernel's refs of `Rows.arrays`, which others may follow. number_of: how the kernel reads a row's number."""
    p = problem
    refs = iter(refs)
    query_ref, key_ref, overflowed_ref, layer_ref = (next(refs) if there else None for there in told(p))
    layer = () if layer_ref is None else (layer_within(layer_ref[0], p.L),)
    query_length = p.T if query_ref is None else jnp.clip(query_ref[b], 0, p.T)
    key_length = p.S if key_ref is None else jnp.clip(number_of(key_ref, layer, b, p.L), 0, p.S)
    return Row((query_length, key_length), None if overflowed_ref is None else overflowed_ref[(*layer, b)], layer)


def append(length, overflowed, count, capacity: int):
    """(tokens to be written, length, overflowed) of rows that `count` tokens are appended to: all of a row's, or none."""
    overflowed = overflowed | (count > capacity - length)
    after = jnp.where(overflowed, length, length + count)
    return after - length, after, overflowed


def int32(lengths):
    """Lengths as the kernels take them, clamped to 32 bits where they have more; None stays None, and is never filled in: that would be
    a kernel of its own."""
    if lengths is None:
        return None
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)  # `jnp.asarray` would wrap around
    most, own = jnp.iinfo(jnp.int32), jnp.iinfo(lengths.dtype)
    if own.max > most.max or own.min < most.min:
        lengths = lengths.clip(max(own.min, most.min), most.max)
    return jnp.asarray(lengths, jnp.int32)


class Update(NamedTuple):
    start: jax.Array  # int32[B]: where a row's tokens go
    count: jax.Array  # int32[B]: how many of them are written
    arrays: tuple  # the cache's length and overflowed


def append_to_layer(length, overflowed, count, T: int, capacity: int, layer):
    """`append` of the first count[b] of T tokens, None for all of them, to the rows that a cache's arrays hold of a layer."""
    count = T if count is None else jnp.clip(count, 0, T)
    return append(of_layer(length, layer), of_layer(overflowed, layer), count, capacity)


def update(length, overflowed, count, T: int, capacity: int, layer) -> Update:
    """The same, in the arrays."""
    count, *after = append_to_layer(length, overflowed, count, T, capacity, layer)
    arrays = tuple(with_layer(x, layer, new) for x, new in zip((length, overflowed), after, strict=True))
    return Update(of_layer(length, layer), count, arrays)


def layer_within(layer, layers: int):
    """The number of one of so many layers: below 0 it counts from the end, and it is clamped. The kernels' form of what
    `dynamic_index_in_dim` does to an index."""
    return jnp.clip(jnp.where(layer < 0, layer + layers, layer), 0, layers - 1)


def of_layer(x, layer):
    """One layer (int32[1]) of a stack; x itself where layer is None."""
    return x if layer is None else jax.lax.dynamic_index_in_dim(x, layer[0], keepdims=False)


def with_layer(x, layer, new):
    """x with one layer replaced. (`.at[layer].set` would look first whether there is such a layer, in a kernel of its own.)"""
    return new if layer is None else jax.lax.dynamic_update_index_in_dim(x, new, layer[0], 0)
