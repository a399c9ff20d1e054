"""Which key a query sees. Functions of positions, never of shapes, so every implementation asks the same lines.

Query `i` of a row with `query_length` valid queries and `key_length` valid keys stands at position `p = key_length -
query_length + i`: the last query stands on the last key (bottom-right alignment). Key `j` is visible to it iff

    i < query_length,  j < key_length,  p - left <= j <= p + right        (a bound of None is no bound)

    3 queries, 5 keys, causal           5 queries, 3 keys, causal          4 queries, 6 keys, window (1, 0)
        j 0 1 2 3 4                         j 0 1 2                            j 0 1 2 3 4 5
    i 0   # # # . .    p = 2            i 0   . . .    p = -2              i 0   . # # . . .    p = 2
      1   # # # # .    p = 3              1   . . .    p = -1                1   . . # # . .    p = 3
      2   # # # # #    p = 4              2   # . .    p = 0                 2   . . . # # .    p = 4
                                          3   # # .    p = 1                 3   . . . . # #    p = 5
                                          4   # # #    p = 2
"""

import dataclasses
import numbers

import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Band:
    """The visible keys around a query's position: `p - left <= j <= p + right`; None is no bound. Causal is right = 0."""

    left: int | None = None
    right: int | None = None

    @classmethod
    def of(cls, is_causal: bool, local_window_size: int | tuple[int, int] | None) -> "Band":
        window = local_window_size
        left, right = (window, window) if isinstance(window, numbers.Integral) or window is None else window
        return cls(left, 0 if is_causal else right)

    @property
    def transposed(self) -> "Band":
        """The same pairs seen from the key's side."""
        return Band(self.right, self.left)


@dataclasses.dataclass(frozen=True)
class BlockRange:
    """Block numbers along the other axis: [start, stop) hold visible pairs, and in [unmasked_start, unmasked_stop)
    every pair is visible. Blocks outside [start, stop) are never visited."""

    start: object
    unmasked_start: object
    unmasked_stop: object
    stop: object


def visible(i, j, query_length, key_length, band: Band):
    """Whether query i sees key j: integer arrays that broadcast against each other, to a boolean array."""
    p = i + (key_length - query_length)
    seen = (i < query_length) & (j < key_length)
    if band.left is not None:
        seen &= j >= p - band.left
    if band.right is not None:
        seen &= j <= p + band.right
    return seen


def visible_keys(i, own_length, other_length, band: Band):
    """The first and the last key that query i < own_length sees, if it sees any: `visible`, row by row."""
    p = i + (other_length - own_length)
    first = 0 if band.left is None else jnp.maximum(p - band.left, 0)
    last = other_length - 1 if band.right is None else jnp.minimum(p + band.right, other_length - 1)
    return first, last


def sees_any(i, own_length, other_length, band: Band):
    """Whether query i sees a key at all. With the lengths swapped and `band.transposed`: whether any query sees key i."""
    first, last = visible_keys(i, own_length, other_length, band)
    return (i < own_length) & (first <= last)


def seeing(own_length, other_length, band: Band):
    """The queries for which `sees_any` holds: [first, stop), where that is not empty."""
    first = 0 if band.right is None else jnp.maximum(own_length - other_length - band.right, 0)
    return first, own_length * jnp.clip(other_length, 0, 1)


def visible_blocks(start, size: int, own_length, other_length, band: Band, block: int) -> BlockRange:
    """The blocks of `block` keys that the tile of queries [start, start + size) must visit.

    Called for a tile of keys, with the lengths swapped and `band.transposed`, it gives the blocks of queries. Rows of
    the tile past `own_length` count as seeing everything: the kernels load them as zero and never store them.
    """
    last = jnp.minimum(start + size, own_length) - 1
    shift = other_length - own_length
    # A product, not a select: Pallas's Triton lowering (jax 0.11.2) mistypes a select between two constants.
    has_rows = jnp.clip(last + 1 - start, 0, 1)
    lo, hi = jnp.int32(0), has_rows * other_length
    unmasked_lo, unmasked_hi = lo, hi
    if band.left is not None:
        lo = jnp.maximum(lo, start + shift - band.left)
        unmasked_lo = jnp.maximum(lo, last + shift - band.left)
    if band.right is not None:
        hi = jnp.minimum(hi, last + shift + band.right + 1)
        unmasked_hi = jnp.minimum(hi, start + shift + band.right + 1)
    first = quotient(lo, block)
    stop = jnp.maximum(first, quotient(jnp.maximum(hi, 0) + (block - 1), block))
    unmasked_first = jnp.clip(quotient(unmasked_lo + (block - 1), block), first, stop)
    unmasked_stop = jnp.clip(quotient(jnp.maximum(unmasked_hi, 0), block), unmasked_first, stop)
    return BlockRange(first, unmasked_first, unmasked_stop, stop)


def quotient(x, n: int):
    """x // n for integers x >= 0, in x's dtype: one division, where `//` also corrects for signs."""
    return lax.div(x, jnp.asarray(n, x.dtype))


def remainder(x, n: int):
    """x % n of the same. To a compiler it says that the result is below n; `x - quotient(x, n) * n` does not."""
    return lax.rem(x, jnp.asarray(n, x.dtype))
