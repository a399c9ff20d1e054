"""Tiles: how many queries and keys a program holds at a time, and with how many warps. A pure function, with reasons.

Two tiers only: a row measured on the GPU (tuning/measured.json), else a heuristic from the GPU's limits.

`block_k` of the forward and decode tiles is part of the numerics: it is one number for a GPU, dtype and head dim, whatever the
lengths, the batch and the heads are, so that a row has the same bits in every call. The other fields are free.
"""

import dataclasses
import functools
import json
from importlib import resources

from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import Gpu, gpu_of


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's tile. `spills` says why a tile that spills registers is shipped all the same; "" promises none."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    heads_fastest: bool = True
    reason: str = ""
    spills: str = ""


@dataclasses.dataclass(frozen=True)
class Tiles:
    forward: Tile
    closing: Tile  # forward, where partial sums are closed and the total of the earlier ones needs registers too
    dkdv: Tile
    dq: Tile
    decode: Tile  # few queries: the rows of a whole group


_KERNELS = [field.name for field in dataclasses.fields(Tiles)]


def tiles_for(gpu: Gpu | None, problem: Problem) -> Tiles:
    """The tiles of a call; without a GPU (interpreted) those of an H200."""
    gpu = gpu or gpu_of("NVIDIA H200")
    bucket = _bucket(max(problem.H, problem.Hv))
    rows = _measured().get((gpu.capability, problem.dtype != "float32", bucket)) or _heuristic(gpu, problem.dtype, bucket)
    if problem.band.right is None:
        # Every query tile reads every key: tile after tile of one head finds that head's keys in the L2 (P7: 5 %, closing 2 %).
        rows = {
            name: dataclasses.replace(tile, heads_fastest=False) if name in ("forward", "closing") else tile for name, tile in rows.items()
        }
    return Tiles(**rows)


def _bucket(head_dim: int) -> int:
    return next(size for size in (64, 128, 256) if head_dim <= size)


@functools.cache
def _measured() -> dict:
    """{(compute capability, 16-bit, head dim bucket): {kernel: Tile}}"""
    rows = json.loads(resources.files("flashcore_jax.tuning").joinpath("measured.json").read_text())
    found = {}
    for row in rows:
        key = (gpu_of(row.pop("gpu")).capability, row.pop("bits") == 16, row.pop("head_dim"))
        kernel = row.pop("kernel")
        found.setdefault(key, {})[kernel] = Tile(**row)
    return found


# Why a tile that spills is shipped: where two accumulators, or an accumulator and the running total, fill the registers,
# ptxas keeps loop invariants and the total in local memory, outside the loop over blocks.
_TWO_ACCUMULATORS = "two accumulators of the whole head dim fill the registers; loop invariants spill"
_RUNNING_TOTAL = (
    "the running total of closed splits takes as many registers as the accumulator; what spills is outside the loop over blocks"
)
_EVERY_OPTION = "only with lengths, a window and a soft cap together, whose state is kept beside the accumulator"
_SPLIT_OPERANDS = "3xTF32 holds two halves of every operand; loop invariants spill"


def _heuristic(gpu: Gpu, dtype: str, bucket: int) -> dict[str, Tile]:
    """Tiles nobody has measured on this GPU: the largest that its shared memory and registers hold, as its compiler says."""
    roomy = gpu.shared_memory >= 160 * 1024
    if dtype == "float32":
        reason = "3xTF32 holds operands twice over: the largest tile whose halves fit the registers and 99 KiB of shared memory"
        block, warps = {64: (32, 4), 128: (32, 8), 256: (16, 8)}[bucket]
        return dict.fromkeys(_KERNELS, Tile(block, block, warps, 1, reason=reason, spills=_SPLIT_OPERANDS))
    if bucket == 64:
        tile = Tile(64, 64, 4, 3 if roomy else 2, reason="head dim 64: four programs of 64 queries fit a multiprocessor")
        narrow = dataclasses.replace(tile, block_q=32, spills=_TWO_ACCUMULATORS)
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
            reason="16 rows a warp, so that a row's sum stays in one; the keys' blocks fill the shared memory",
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
        "forward": dataclasses.replace(tile, spills=_TWO_ACCUMULATORS),
        "closing": dataclasses.replace(tile, spills=_RUNNING_TOTAL),
        "dkdv": Tile(16, 32, 8, 1, reason="two accumulators of 32 keys over 8 warps", spills=_TWO_ACCUMULATORS),
        "dq": Tile(32, 32, 8, 1, reason="queries, their cotangents and a block of keys and values fit 99 KiB"),
        "decode": dataclasses.replace(tile, spills=_TWO_ACCUMULATORS),
    }
