"""Attention through Pallas's Triton route: what it supports, forward and backward."""

from flashcore_jax.kernels.triton.backward import backward as _backward
from flashcore_jax.kernels.triton.forward import forward as _forward
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import target_gpu
from flashcore_jax.tuning.tiles import tiles_for


def unsupported(problem: Problem) -> str | None:
    """Why this implementation cannot run the call on the GPU in sight, or None."""
    gpu = target_gpu()
    if gpu is not None and gpu.capability < (8, 0):
        return f"it needs an NVIDIA GPU of compute capability 8.0 or newer, and {gpu.kind} has {'.'.join(map(str, gpu.capability))}"
    return None


def forward(query, key, value, lengths, problem: Problem):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    return _forward(query, key, value, lengths, problem, tiles_for(target_gpu(), problem))


def backward(query, key, value, lengths, out, lse, dout, dlse, problem: Problem):
    """The gradients of query, key and value."""
    return _backward(query, key, value, lengths, out, lse, dout, dlse, problem, tiles_for(target_gpu(), problem))
