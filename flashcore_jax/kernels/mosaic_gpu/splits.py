"""Decode on Hopper where there are splits enough to fill the GPU: a program of one warpgroup for each, as in kernels/triton/decode.py.

The copy engine brings the keys and values, several blocks ahead, and the warpgroup asks for a block itself when the place of an earlier
one is free. A tile has 64 rows, of which those of the query heads of a key/value head are real. Two programs share a multiprocessor.
The cut, the order of the programs, the additions and the merge are those of the Triton kernels: the bits are the same.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023); the loop is that of forward.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax.kernels.mosaic_gpu import registers
from flashcore_jax.kernels.mosaic_gpu.forward import finish, nothing_yet, sum_of
from flashcore_jax.kernels.mosaic_gpu.launch import launch, shared
from flashcore_jax.kernels.mosaic_gpu.registers import over_columns
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS
from flashcore_jax.kernels.triton.blocks import Programs, round_up
from flashcore_jax.kernels.triton.decode import Cut, cut_for, merge
from flashcore_jax.kernels.triton.forward import part_of
from flashcore_jax.masks import quotient, remainder, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of, told
from flashcore_jax.tuning.gpus import Gpu
from flashcore_jax.tuning.tiles import Tile

AT_ONCE = 2  # programs of a multiprocessor
_STAGES = 3  # blocks of keys, and of values, in shared memory
_SHORTEST = 1024  # keys
_MOST_LAYERS = 64  # whose rows' numbers are all loaded
_ENGINE_ROWS = 8


def plan_for(problem: Problem, tile: Tile, gpu: Gpu) -> Cut | None:
    """How a call is cut into programs, or None where it is not for this kernel. (At head dim 64 it takes as long as the Triton kernel.)"""
    p = problem
    if p.T > 1 or (p.H, p.Hv) != (128, 128) or p.S < _SHORTEST:
        return None
    # The copy engine takes eight rows at a time, and finds them in arrays of fewer or of a multiple.
    if p.S % _ENGINE_ROWS or p.G > ROWS or (p.G > _ENGINE_ROWS and p.G % _ENGINE_ROWS):
        return None
    cut = cut_for(p, tile, gpu.multiprocessors)
    return cut if cut.parts == 1 and tile.block_k == BLOCK else None


def number_of(ref, layer: tuple, b, layers: int | None):
    """Of row b: ref[layer, b], or ref[b] where there are no layers. Those of all layers are loaded: one alone would wait for its number."""
    if layers is None or layers > _MOST_LAYERS:
        return ref[(*layer, b)]
    return functools.reduce(lambda found, at: jnp.where(layer[0] == at, ref[at, b], found), range(1, layers), ref[0, b])


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, cut: Cut, programs: Programs):
    p = problem
    number_of_outputs = 2 if cut.splits == 1 else 3
    row_refs, refs = refs[: sum(told(p))], refs[sum(told(p)) :]
    out_refs, refs = refs[:number_of_outputs], refs[number_of_outputs:]
    (q_smem, statistics_smem, order_smem), (k_smem, out_smem), v_smem, q_full, k_full, k_free, v_full, v_free = refs
    program = lax.axis_index("program")
    b, number, kv_head = programs.split(program)
    _, split, _ = cut.split(number)
    if cut.short_last:
        lengths_ref = row_refs[int(p.query_lengths)]
        if layer := row_of(row_refs, p).before:
            lengths_ref = lengths_ref.at[layer]
        b = lax.cond(split == 0, lambda: registers.by_length(lengths_ref, order_smem, b), lambda: b)
        plgpu.commit_smem()  # the queries will take the place of the order
    row = row_of(row_refs, p, b, number_of)
    lengths = tuple(map(jnp.int32, row.lengths))
    blocks = visible_blocks(jnp.int32(0), p.T, *lengths, p.band, BLOCK)
    if cut.splits > 1:
        start, stop = part_of(blocks, split, cut.per_split)
        blocks = dataclasses.replace(blocks, start=start, stop=jnp.maximum(start, stop))
    count = registers.uniform(blocks.stop - blocks.start)
    # Of arrays as many rows too, though they may have fewer: the copy engine knows where one ends. (As a number jax 0.12 would not take it.)
    real = round_up(p.G, _ENGINE_ROWS)
    of_tile, of_array = pl.ds(0, real), pl.ds(0 * program, real)

    def fetch(block, ref, smem, full):
        """Of the split's blocks, counted from its first."""
        slot, at = remainder(block, _STAGES), pl.ds((blocks.start + block) * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(ref.at[(*row.before, b, at, kv_head)], smem.at[slot], full.at[slot])

    def leave(ref, smem, full, free):
        """Frees a block's place, and fetches what will take that of the block before: who has left that one need not be waited for."""

        def run(block):
            plgpu.barrier_arrive(free.at[remainder(block, _STAGES)])

            @pl.when((block > 0) & (block - 1 + _STAGES < count))
            def _():
                plgpu.barrier_wait(free.at[remainder(block - 1, _STAGES)])
                fetch(block - 1 + _STAGES, ref, smem, full)

        return run

    def add_up():
        plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head, of_array], q_smem.at[0, of_tile], q_full)
        for block in range(_STAGES):

            @pl.when(block < count)
            def _(block=block):
                fetch(jnp.int32(block), k_ref, k_smem, k_full)
                fetch(jnp.int32(block), v_ref, v_smem, v_full)

        plgpu.barrier_wait(q_full)
        offset = registers.uniform(-blocks.start)
        return sum_of(
            q_smem=q_smem, place=jnp.int32(0), k_smem=k_smem, v_smem=v_smem, full=(k_full, v_full),
            leave=(lambda: None, leave(k_ref, k_smem, k_full, k_free), leave(v_ref, v_smem, v_full, v_free)),
            first_query=0, lengths=lengths, blocks=registers.uniform_range(blocks, offset), offset=offset, total=None, addresses_stay=True,
            problem=p, group=p.G, real_rows=p.G,
        )  # fmt: skip

    def put(at, out, *statistics):
        out_smem[...] = out.astype(out_smem.dtype)  # in the place of the keys, as the statistics are in that of the queries
        for i, x in enumerate(statistics):
            statistics_smem[i] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[of_tile], out_refs[0].at[(*at, of_array)])
        for i, ref in enumerate(out_refs[1:]):
            plgpu.copy_smem_to_gmem(statistics_smem.at[i, pl.ds(0, ref.shape[-1])], ref.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    if cut.splits == 1:
        acc, running_max, row_sum = lax.fori_loop(jnp.int32(0), jnp.minimum(count, 1), lambda *_: add_up(), nothing_yet(p))
        queries = quotient(registers.row_iota(), p.G)
        factor, empty, nothing, lse = finish(running_max, row_sum, queries, lengths, row.overflowed)
        # Selected, not multiplied by 0: a product with a poisoned query is NaN.
        out = jnp.where(over_columns(empty, p.Hv), jnp.full(acc.shape, nothing), acc * over_columns(factor, p.Hv))
        put((b, kv_head), out, lse)
    else:

        @pl.when(count > 0)
        def _():
            acc, running_max, row_sum = add_up()
            put((b, kv_head, split), acc, row_sum, running_max)


def decode(query, key, value, rows: Rows, problem: Problem, cut: Cut):
    """As `forward.forward`: the output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p = problem
    programs = Programs(p.B, p.K, cut.programs, heads_fastest=True, last_tile_first=False, tiles_slowest=cut.short_last)
    splits = () if cut.splits == 1 else (cut.splits,)
    out = jax.ShapeDtypeStruct((p.B, p.K, *splits, p.G, p.Hv), jnp.float32 if splits else query.dtype)
    # Vectors are copied in 16 bytes.
    statistics = [jax.ShapeDtypeStruct((p.B, p.K, *splits, round_up(p.G, 4)), jnp.float32)] * (2 if splits else 1)
    found = launch(
        functools.partial(_kernel, problem=p, cut=cut, programs=programs),
        *(query.reshape(p.B, p.K, p.G, p.H), key, value, *rows.arrays),
        name="flashcore_decode",
        programs=programs.grid[0],
        warpgroups=1,
        out_type=(out, *statistics),
        scratch=[
            plgpu.RefUnion(
                shared((1, ROWS, p.H), p.dtype),
                plgpu.SMEM((len(statistics), ROWS), jnp.float32),
                plgpu.SMEM((registers.THREADS + 1,), jnp.int32),
            ),
            plgpu.RefUnion(shared((_STAGES, BLOCK, p.H), p.dtype), shared((ROWS, p.Hv), out.dtype)),
            shared((_STAGES, BLOCK, p.Hv), p.dtype),
            plgpu.Barrier(),
            *[plgpu.Barrier(num_barriers=_STAGES)] * 4,
        ],
    )
    if splits:
        return merge(found, rows, p, BLOCK, cut.per_split, cut.splits)
    out, lse = found
    return out.reshape(p.B, p.T, p.N, p.Hv), lse[:, :, : p.G].reshape(p.B, p.N, p.T)
