"""Tiles: how many queries and keys a program holds at a time, and with how many warps. A pure function, with reasons.

Two tiers only: a row measured on the GPU, else a heuristic from the GPU's limits. Rows that `python -m benchmarks.tune` wrote on
this machine (`user_file`) come before those of the package (tuning/measured.json).

`block_k` of the forward and decode tiles is part of the numerics: it is one number for a GPU, dtype and head dim, whatever the
lengths, the batch and the heads are, so that a row has the same bits in every call. The other fields are free.
"""

import dataclasses

from flashcore_jax.errors import OptionError, check
from flashcore_jax.masks import Band
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import Gpu, gpu_of
from flashcore_jax.tuning.tile_rows import HEAD_DIMS, KERNELS, ON_THE_KEY_GRID, REMEDY, Row, Rows, Tile, Tiles, rows_for, user_rows


def tiles_for(gpu: Gpu | None, problem: Problem) -> Tiles:
    """The tiles of a call; without a GPU (interpreted) those of an H200. Raises `OptionError` for a user's file that is wrong."""
    gpu = gpu or gpu_of("NVIDIA H200")
    bits = 32 if problem.dtype == "float32" else 16
    head_dim = next(size for size in HEAD_DIMS if max(problem.H, problem.Hv) <= size)
    # What rows say is measured on tensor cores; in float32 multiply-adds a tile as large spills all that it has.
    on_tensor_cores = problem.precision != "float32"
    tiles = bucket_tiles(gpu, bits, head_dim, user_rows()) if on_tensor_cores else Tiles(**_heuristic(gpu, bits, head_dim))
    if problem.band == Band():
        # Every query tile reads every key: tile after tile of one head finds that head's keys in the L2 (P7: 5 %; where it closes, 2 %
        # slower). That is the mask's doing, and stands above what a row says, which is measured causal.
        tiles = dataclasses.replace(tiles, forward=dataclasses.replace(tiles.forward, heads_fastest=False))
    return tiles


def bucket_tiles(gpu: Gpu, bits: int, head_dim: int, user: Rows) -> Tiles:
    """The tiles of one bucket: the user's rows before the package's, these before the heuristic."""
    heuristic = {name: Row(tile, "the heuristic") for name, tile in _heuristic(gpu, bits, head_dim).items()}
    rows = heuristic | rows_for(gpu, bits, head_dim, user)
    on_grid = {name: rows[name] for name in ON_THE_KEY_GRID}
    check([
        (
            len({row.tile.block_k for row in on_grid.values()}) == 1, OptionError,
            f"one block_k for {', '.join(on_grid)} ({gpu.kind}, {bits} bits, head dim {head_dim}): decode has the bits of prefill because of it",
            ", ".join(f"{name} {row.tile.block_k} ({row.where})" for name, row in on_grid.items()), REMEDY,
        ),
    ])  # fmt: skip
    return Tiles(**{name: row.tile for name, row in rows.items()})


# Why a tile that spills is shipped: where two accumulators, or an accumulator and the running total, fill the registers,
# ptxas keeps loop invariants and the total in local memory, outside the loop over blocks.
_TWO_ACCUMULATORS = "two accumulators of the whole head dim fill the registers; loop invariants spill"
_RUNNING_TOTAL = (
    "the running total of closed splits takes as many registers as the accumulator; what spills is outside the loop over blocks"
)
_WIDE = "an accumulator of 256 columns and the scores fill the registers; loop invariants spill"
_EVERY_OPTION = "only with lengths, a window and a soft cap together, whose state is kept beside the accumulator"
_SPLIT_OPERANDS = "3xTF32 holds two halves of every operand; of wide heads not all fit the registers"


def _heuristic(gpu: Gpu, bits: int, bucket: int) -> dict[str, Tile]:
    """Tiles nobody has measured on this GPU: the largest that its shared memory and registers hold, as its compiler says."""
    roomy = gpu.shared_memory >= 160 * 1024
    if bits == 32:
        if bucket == 256:
            reason = "3xTF32: by count of instructions for each pair of a query and a key (docs/tuning.md), and not timed"
            tile = Tile(16, 32, 4, 1, reason=reason, spills=_SPLIT_OPERANDS)
            # dkdv's two accumulators of 32 keys would not fit.
            return dict.fromkeys(KERNELS, tile) | {"dkdv": dataclasses.replace(tile, block_q=32 if roomy else 16, block_k=16)}
        reason = "3xTF32 holds operands twice over: the largest tile whose halves fit the registers and 99 KiB of shared memory"
        return dict.fromkeys(KERNELS, Tile(32, 32, {64: 4, 128: 8}[bucket], 1, reason=reason, spills=_SPLIT_OPERANDS))
    if bucket == 64:
        tile = Tile(
            64,
            64,
            4,
            3 if roomy else 2,
            reason="head dim 64: 64 queries over 4 warps leave room for two programs and more on a multiprocessor",
        )
        narrow = dataclasses.replace(tile, block_q=32, reason="two accumulators of 64 keys over 4 warps", spills=_TWO_ACCUMULATORS)
        return {
            "forward": tile,
            "closing": dataclasses.replace(tile, spills=_RUNNING_TOTAL),
            "dkdv": narrow,
            "dq": dataclasses.replace(tile, spills=_EVERY_OPTION),
            "decode": tile,
        }
    if bucket == 128:
        tile = Tile(
            128,
            64 if roomy else 32,
            8,
            2,
            reason="16 rows a warp, so that a row's sum stays in one; two blocks of keys and values in flight",
        )
        return {
            "forward": tile,
            "closing": dataclasses.replace(tile, spills=_RUNNING_TOTAL),
            "dkdv": Tile(32, 64, 8, 1, reason="two accumulators of 64 keys over 8 warps", spills=_TWO_ACCUMULATORS),
            "dq": Tile(64, 32, 4, 2, reason="64 queries over 4 warps; 32 keys, because two products a block read them"),
            "decode": dataclasses.replace(tile, block_q=64, num_warps=4),
        }
    tile = Tile(64, 32, 4, 1, reason="head dim 256: queries and one block of keys and values fit 99 KiB")
    return {
        "forward": dataclasses.replace(tile, spills=_WIDE),
        "closing": dataclasses.replace(tile, spills=_RUNNING_TOTAL),
        "dkdv": Tile(16, 32, 8, 1, reason="two accumulators of 32 keys over 8 warps", spills=_TWO_ACCUMULATORS),
        "dq": Tile(32, 32, 8, 1, reason="queries, their cotangents and a block of keys and values fit 99 KiB"),
        "decode": dataclasses.replace(tile, spills=_WIDE),
    }
