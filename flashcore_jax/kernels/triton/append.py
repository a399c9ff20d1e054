"""Append: writes new keys and values behind those of each row, in place.

The cache's buffers are the kernel's inputs and its outputs (`input_output_aliases`). XLA copies them only where the caller
still needs the old ones: never under jit with donation, nor for a cache that a loop carries. A stacked cache is indexed in
the kernel. Rows with nothing to write are not touched, and neither is anything else.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flashcore_jax.kernels.triton.blocks import Programs, column_chunks, padded
from flashcore_jax.kernels.triton.launch import launch, load, store
from flashcore_jax.tuning.tiles import Tile

_TOKENS = 16  # of a program


def _kernel(
    new_key_ref, new_value_ref, start_ref, count_ref, *refs, sizes: tuple[int, int], tile: Tile, programs: Programs, layers: int | None
):
    *layer_refs, _, _, key_ref, value_ref = refs
    _, token_tile, _ = programs.split(pl.program_id(0))
    first = token_tile * tile.block_q
    written = first + lax.iota(jnp.int32, tile.block_q) < count_ref[0]
    layer = () if layers is None else (jnp.clip(layer_refs[0][0], 0, layers - 1),)
    for size, new_ref, ref in zip(sizes, (new_key_ref, new_value_ref), (key_ref, value_ref), strict=True):
        for c in column_chunks(size):
            new = load(new_ref, (slice(None), c.at), written, c.exist)
            store(ref, new, (*layer, pl.ds(start_ref[0] + first, tile.block_q), c.at), written, c.exist)


def append(cache_key, cache_value, key, value, start, count, layer=None):
    """The caches [B, S, K, H] (a stack [L, B, S, K, H] with `layer` int32[1]) with key and value [B, T, K, H] written behind.

    start, count: int32[B]; row b gets its first count[b] tokens at start[b]. They must fit.
    """
    B, T, K, _ = key.shape
    S = cache_key.shape[-3]
    tile = Tile(min(_TOKENS, pl.next_power_of_2(T)), 0, num_warps=1 if T == 1 else 4, num_stages=1)
    programs = Programs(B, K, pl.cdiv(T, tile.block_q), heads_fastest=True, last_tile_first=False)
    stack, first = ((), ()) if layer is None else ((cache_key.shape[0],), (0,))
    scalars = (start, count) if layer is None else (start, count, layer)
    # Room for a whole tile behind the last slot: the interpreter would move one that leaves the ref (the GPU has the mask).
    own = [
        programs.spec((*stack, None, S + tile.block_q, None, padded(x.shape[-1])), lambda b, t, k: (*first, b, 0, k, 0))
        for x in (key, value)
    ]
    new = [programs.spec((None, tile.block_q, None, padded(x.shape[-1])), lambda b, t, k: (b, t, k, 0)) for x in (key, value)]
    inputs = (key, value, *scalars)
    return launch(
        functools.partial(
            _kernel,
            sizes=(key.shape[-1], value.shape[-1]),
            tile=tile,
            programs=programs,
            layers=None if layer is None else cache_key.shape[0],
        ),
        *(*inputs, cache_key, cache_value),
        name="flashcore_append",
        grid=programs.grid,
        in_specs=[*new, programs.row_spec, programs.row_spec, *[pl.BlockSpec((1,), lambda program: (0,))] * (layer is not None), *own],
        out_specs=own,
        out_shape=[(x.shape, x.dtype) for x in (cache_key, cache_value)],
        aliases={len(inputs): 0, len(inputs) + 1: 1},
        tile=tile,
    )
