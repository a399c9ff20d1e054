"""Softmax over keys that arrive block by block: start, update, close, merge, finish. The one place where additions are ordered.

Scores are in log2 units, so that every exponential is one exp2. The running maximum is rounded up to an integer: each
rescaling factor is then an exact power of two, and neither the blocks' order of maxima nor a fused multiply-add can
change a bit of what is accumulated.

A row's sum is a binary tree of additions of two numbers. Those commute, so the bits do not depend on which thread holds which
number: every tile, of prefill or decode, gives the same ones. The levels that a tensor core's layout spreads over four
neighbouring threads come last, once per split and not once per block.

A row that has seen no key has `row_sum` 0. All statistics are float32.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), algorithm 3; Dao et al.,
"FlashAttention" (2022), algorithm 1. The tree is this package's; on an H200 it costs nothing (docs/tuning.md).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

LOG2_E = float(np.log2(np.e))
LN_2 = float(np.log(2.0))
# Below every score, and finite: a masked score of -inf less this maximum is still -inf, never NaN.
LOWEST = float(np.finfo(np.float32).min)


class Partial(NamedTuple):
    """What a range of keys adds up to, for each query row."""

    acc: tuple  # of float32[..., rows, columns]: sum of 2^(score - running_max) * value, in chunks of its columns
    row_sum: object  # float32[..., rows]: sum of 2^(score - running_max); before `close` in four parts, [..., rows, 2, 2]
    running_max: object  # float32[..., rows]: an integer, log2 units


def nothing(rows: tuple[int, ...], columns: tuple[int, ...]) -> Partial:
    """A closed sum of no keys, for chunks of so many columns."""
    acc = tuple(jnp.zeros((*rows, width), jnp.float32) for width in columns)
    return Partial(acc, jnp.zeros(rows, jnp.float32), jnp.full(rows, LOWEST, jnp.float32))


def start(rows: tuple[int, ...], columns: tuple[int, ...]) -> Partial:
    """A sum of no keys yet, to be updated and closed."""
    return nothing(rows, columns)._replace(row_sum=jnp.zeros((*rows, 2, 2), jnp.float32))


def scaled_exp2(scores, log2_scale: float, shift):
    """2^(scores * log2_scale - shift)."""
    return jnp.exp2(scores * log2_scale - shift)


def highest_of(scores, log2_scale: float):
    """The rows' maxima in log2 units, rounded up to integers."""
    return jnp.ceil(jnp.max(scores, axis=-1) * log2_scale)


def update(partial: Partial, scores, log2_scale: float, weigh, scaled_exp2=scaled_exp2, highest=None) -> Partial:
    """Adds one block of keys. `scores * log2_scale` are the logits in log2 units (log2_scale > 0), -inf where masked;
    `weigh(p)` is the product of the unnormalised probabilities with the block's values, in float32, chunk by chunk;
    `scaled_exp2` is the hardware's form of the function above, where there is a faster one; highest: `highest_of` it, where known."""
    highest = highest_of(scores, log2_scale) if highest is None else highest
    running_max = jnp.maximum(partial.running_max, highest)
    p = scaled_exp2(scores, log2_scale, running_max[..., None])
    rescale = scaled_exp2(partial.running_max, 1.0, running_max)
    acc = tuple(a * rescale[..., None] + added for a, added in zip(partial.acc, weigh(p), strict=True))
    return Partial(acc, partial.row_sum * rescale[..., None, None] + _four_sums(p), running_max)


def close(partial: Partial) -> Partial:
    """Ends a sum: adds up the four parts of the row sums."""
    return partial._replace(row_sum=jnp.sum(jnp.sum(partial.row_sum, axis=-1), axis=-1))


def _four_sums(p):
    """[..., keys] to [..., 2, 2], by additions of pairs: over the last bit of the key's number in its block, then over all from
    the fourth on. The second and third bit, which a tensor core's layout spreads over threads, are left."""
    levels = p.shape[-1].bit_length() - 1
    sums = jnp.sum(p.reshape(*p.shape[:-1], *[2] * levels), axis=-1)
    for _ in range(levels - 3):
        sums = jnp.sum(sums, axis=-3)
    return sums


def merge(total: Partial, *closed: Partial, scaled_exp2=scaled_exp2) -> Partial:
    """Adds closed partial sums, in order, to the total of those before them. An empty one changes nothing, to the bit.

    All maxima come first, then all factors, then the sums: a chain of additions that waits for no exponential."""
    maxima = [total.running_max]
    for one in closed:
        maxima.append(jnp.maximum(maxima[-1], one.running_max))
    factors = [
        tuple(scaled_exp2(x, 1.0, new) for x in (old, one.running_max)) for old, new, one in zip(maxima, maxima[1:], closed, strict=False)
    ]
    acc, row_sum = total.acc, total.row_sum
    for one, (of_total, of_one) in zip(closed, factors, strict=True):
        acc = tuple(a * of_total[..., None] + b * of_one[..., None] for a, b in zip(acc, one.acc, strict=True))
        row_sum = row_sum * of_total + one.row_sum * of_one
    return Partial(acc, row_sum, maxima[-1])


def finish(total: Partial):
    """The output in chunks of its columns, and the natural log of the sum of exponentials: 0 and -inf where no key was seen."""
    empty = total.row_sum == 0.0
    factor = (1.0 / jnp.where(empty, 1.0, total.row_sum))[..., None]
    lse = (total.running_max + jnp.log2(total.row_sum)) * LN_2
    return tuple(a * factor for a in total.acc), jnp.where(empty, -jnp.inf, lse)
