"""Attention through Pallas's Mosaic GPU route, for Hopper: long calls forward, and backward where every query sees a key.

Everything else (decode, short calls, sizes that are no multiple of 8, append) is the Triton kernels', whose bits the forward has.
What needs the route is imported when it is known to be there.
"""

from flashcore_jax.kernels import triton
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK
from flashcore_jax.kernels.triton import append
from flashcore_jax.kernels.triton.decode import suits as _suits_decode
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows
from flashcore_jax.tuning.gpus import target_gpu
from flashcore_jax.tuning.tiles import tiles_for

__all__ = ["append", "backward", "forward", "unsupported"]

_SHORTEST = 128  # queries or keys: a program's tile has 192 queries
_ROWS = 8  # the copy engine takes so many at a time, and finds them in arrays that hold a multiple of it


def unsupported(problem: Problem | None) -> str | None:
    """Why this implementation cannot run the call on the GPU in sight, or None."""
    gpu = target_gpu()
    if gpu is None:
        return "it needs an NVIDIA Hopper GPU, and none is in sight (Pallas's interpreter does not know its instructions)"
    if not gpu.has_wgmma:
        return f"it needs an NVIDIA Hopper GPU (compute capability 9.0), and {gpu.kind} has {'.'.join(map(str, gpu.capability))}"
    from flashcore_jax.kernels.mosaic_gpu.launch import is_recent_enough

    if not is_recent_enough():
        return "it needs jax 0.11 or newer"
    from flashcore_jax.kernels.mosaic_gpu.forward import unsupported

    return None if problem is None else unsupported(problem)


def _is_addressable(problem: Problem) -> bool:
    p = problem
    return min(p.T, p.S) >= _SHORTEST and p.T % _ROWS == p.S % _ROWS == 0


def _has_its_blocks(problem: Problem) -> bool:
    """Whether the Triton kernels, decode among them, add up keys in this kernel's blocks: tiles of the user's own may have others."""
    tiles = tiles_for(target_gpu(), problem)
    return {tiles.forward.block_k, tiles.closing.block_k, tiles.decode.block_k} == {BLOCK}


def forward(query, key, value, rows: Rows, problem: Problem):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    if _suits_decode(problem) or not _is_addressable(problem) or not _has_its_blocks(problem):
        return triton.forward(query, key, value, rows, problem)
    from flashcore_jax.kernels.mosaic_gpu.forward import forward

    return forward(query, key, value, rows, problem, target_gpu())


def backward(query, key, value, rows: Rows, out, lse, dout, dlse, problem: Problem):
    """The gradients of query, key and value."""
    from flashcore_jax.kernels.mosaic_gpu.backward import backward, unsupported

    if unsupported(problem) is not None or not _is_addressable(problem):
        return triton.backward(query, key, value, rows, out, lse, dout, dlse, problem)
    return backward(query, key, value, out, lse, dout, dlse, problem, target_gpu())
