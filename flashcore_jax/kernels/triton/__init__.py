"""Attention through Pallas's Triton route: what it supports, forward and backward, and the cache's append."""

import jax

from flashcore_jax.kernels.triton.append import append
from flashcore_jax.kernels.triton.backward import backward as _backward
from flashcore_jax.kernels.triton.decode import decode as _decode
from flashcore_jax.kernels.triton.decode import suits as _suits_decode
from flashcore_jax.kernels.triton.forward import forward as _forward
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows
from flashcore_jax.tuning.gpus import gpu_of, listed_kind, target_gpu
from flashcore_jax.tuning.tiles import tiles_for

__all__ = ["append", "backward", "forward", "unsupported"]


def unsupported(problem: Problem | None) -> str | None:
    """Why this implementation cannot run the call on the GPU in sight, or None."""
    gpu = target_gpu()
    if gpu is None:
        return None
    if gpu.capability < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, and {gpu.kind} has {'.'.join(map(str, gpu.capability))}"
    if (0, 11) <= jax.__version_info__ < (0, 11, 2) and listed_kind(gpu) != gpu.kind:
        return f"jax {jax.__version__} compiles Pallas's Triton kernels for the GPUs in a list of its own, without {gpu.kind}; jax 0.11.2 for all"
    return None


def forward(query, key, value, rows: Rows, problem: Problem):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    gpu = target_gpu() or gpu_of("NVIDIA H200")
    tiles = tiles_for(gpu, problem)
    if _suits_decode(problem):
        return _decode(query, key, value, rows, problem, tiles, gpu.multiprocessors)
    return _forward(query, key, value, rows, problem, tiles)


def backward(query, key, value, rows: Rows, out, lse, dout, dlse, problem: Problem):
    """The gradients of query, key and value."""
    return _backward(query, key, value, rows, out, lse, dout, dlse, problem, tiles_for(target_gpu(), problem))
