"""Append: writes new keys and values behind those of each row, in place.

The cache's buffers are the kernel's inputs and its outputs (`input_output_aliases`). XLA copies them only where the caller
still needs the old ones: never under jit with donation, nor for a cache that a loop carries. A stacked cache is indexed in
the kernel. Rows with nothing to write are not touched, and neither is anything else.

Where one program holds all new tokens of a row, it brings the row's length up to date too. In a decode loop that is then
the only kernel beside attention: each one costs a microsecond, whatever it does.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax import rows
from flashcore_jax.kernels.triton.blocks import LAYER_SPEC, Programs, column_chunks, number_of, number_spec, padded, stack_spec
from flashcore_jax.kernels.triton.launch import barrier, launch, load, store
from flashcore_jax.tuning.tiles import Tile

_NUMBERS = 16384  # of a program, in each of key and value: 128 a thread
_WARPS = 4


def _kernel(
    new_key_ref, new_value_ref, *refs, T: int, S: int, sizes: tuple[int, int], layers: int | None, counted: bool, whole: bool, tile: Tile,
    programs: Programs,
):  # fmt: skip
    refs, rows_after = (refs[:-2], refs[-2:]) if whole else (refs, ())
    *more_refs, _, _, length_ref, overflowed_ref, key_ref, value_ref = refs
    layer = () if layers is None else (rows.layer_within(more_refs[-1][0], layers),)
    tokens = jnp.clip(more_refs[0][0], 0, T) if counted else T
    row = (*layer, jnp.int32(0))
    _, token_tile, _ = programs.split(pl.program_id(0))
    first = token_tile * tile.block_q
    start = number_of(length_ref, layer, jnp.int32(0), layers)
    count, *after = rows.append(start, overflowed_ref[row], tokens, S)
    written = first + lax.iota(jnp.int32, tile.block_q) < count
    for size, new_ref, ref in zip(sizes, (new_key_ref, new_value_ref), (key_ref, value_ref), strict=True):
        for c in column_chunks(size):
            new = load(new_ref, (slice(None), c.at), written, c.exist)
            store(ref, new, (*layer, pl.ds(start + first, tile.block_q), c.at), written, c.exist)
    if whole:
        barrier()  # every thread has read the row as it was
        for ref, new in zip(rows_after, after, strict=True):
            ref[row] = new


def append(key_cache, value_cache, length, overflowed, key, value, count, layer):
    """The arrays of a `KVCache` afterwards: [B, S, K, H] twice, int32[B] and bool[B]; of a stack all with L in front.

    count: int32[B], so many of the new tokens [B, T, K, H] are real, the first ones; None for all of them. layer: int32[1].
    """
    B, T = key.shape[:2]
    layers = None if layer is None else key_cache.shape[0]
    S = key_cache.shape[-3]
    # A token's heads lie in a row: to a program they are one.
    caches = [x.reshape(*x.shape[:-2], -1) for x in (key_cache, value_cache)]
    new = [x.reshape(B, T, -1) for x in (key, value)]
    sizes = tuple(x.shape[-1] for x in new)
    at_once = max(1, _NUMBERS // pl.next_power_of_2(max(sizes)))
    tile = Tile(min(at_once, pl.next_power_of_2(T)), 0, num_warps=_WARPS, num_stages=1)
    programs = Programs(B, 1, pl.cdiv(T, tile.block_q), heads_fastest=False, last_tile_first=False)
    # Room for a whole tile behind the last slot: the interpreter would move one that leaves the ref (the GPU has the mask).
    own = [stack_spec(programs, layers, (None, S + tile.block_q, padded(size)), lambda b, t, _: (b, 0, 0)) for size in sizes]
    row = 2 * [number_spec(programs, layers)]
    told = [(count, number_spec(programs)), (layer, LAYER_SPEC)]
    inputs = [*new, *(x for x, _ in told if x is not None)]
    whole = T <= tile.block_q
    after = launch(
        functools.partial(
            _kernel, T=T, S=S, sizes=sizes, layers=layers, counted=count is not None, whole=whole, tile=tile, programs=programs
        ),
        *(*inputs, *caches, length, overflowed),
        name="flashcore_append",
        grid=programs.grid,
        in_specs=[
            *[programs.spec((None, tile.block_q, padded(size)), lambda b, t, _: (b, t, 0)) for size in sizes],
            *(spec for x, spec in told if x is not None),
            *(own + row),
        ],
        out_specs=own + row * whole,
        out_shape=[(x.shape, x.dtype) for x in caches + [length, overflowed] * whole],
        aliases={len(inputs) + output: output for output in range(2 + 2 * whole)},
        tile=tile,
    )
    if not whole:
        after = [*after, *rows.update(length, overflowed, count, T, S, layer).arrays]
    return *(x.reshape(old.shape) for x, old in zip(after, (key_cache, value_cache), strict=False)), *after[2:]
