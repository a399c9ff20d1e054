"""Tiles: how many queries and keys a program holds at a time, and with how many warps. A pure function, with reasons.

Two tiers only: a row measured on the GPU (tuning/measured.json), else a heuristic. Where the kernels of one family share
an order of additions (forward; decode, when it comes), `block_k` depends on dtype and head dim alone: it is part of the
numerics, and a tile that fits a shape better may not change it.
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
    dkdv: Tile
    dq: Tile


def tiles_for(gpu: Gpu | None, problem: Problem) -> Tiles:
    """The tiles of a call; without a GPU (interpreted) those of an H200."""
    T64 = Tile(64, 64, 4, 2)
    if problem.dtype == "float32":
        T64 = Tile(32, 32, 4, 1)
    return Tiles(T64, T64, T64)
