"""Attention through Pallas's Mosaic GPU route, for Hopper: long calls, forward and backward, and decode of a token; of a few if rows are few.

Everything else (other decode, short calls, sizes that are no multiple of 8, append) is the Triton kernels', whose bits the forward has.
What needs the route is imported when it is known to be there.
"""

import functools

from flashcore_jax.kernels import triton
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK
from flashcore_jax.kernels.triton import append
from flashcore_jax.kernels.triton.decode import suits as _suits_decode
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows
from flashcore_jax.tuning.gpus import target_gpu
from flashcore_jax.tuning.tiles import tiles_for

__all__ = ["append", "backward", "forward", "handed_on", "unsupported"]

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


def handed_on(problem: Problem) -> dict[str, str]:
    """The steps of a call, "forward" and "backward", that the Triton kernels compute, and why."""
    from flashcore_jax.kernels.mosaic_gpu.backward import unsupported

    p = problem
    size = f"of T = {p.T} and S = {p.S} " + ("(a cache's S is its capacity) " if p.cached else "")
    both = None
    if min(p.T, p.S) < _SHORTEST:
        both = f"{size}one is below {_SHORTEST}"
    elif p.T % _ROWS or p.S % _ROWS:
        both = f"{size}one is no multiple of {_ROWS}"
    forward = None if _decode_for(p) else "few queries on many keys" if _suits_decode(p) else both
    if forward is None and not _has_its_blocks(p):
        forward = f"the tiles in force add up keys in other blocks than {BLOCK}"
    steps = {"forward": forward, "backward": both or unsupported(p)}
    return {step: why for step, why in steps.items() if why}


def _decode_for(problem: Problem):
    """The decode of this route that suits the call, or None where it is for another kernel."""
    from flashcore_jax.kernels.mosaic_gpu import clusters, splits

    if not _suits_decode(problem):
        return None
    gpu = target_gpu()
    if plan := clusters.plan_for(problem, gpu):
        return functools.partial(clusters.decode, plan=plan)
    if cut := splits.plan_for(problem, tiles_for(gpu, problem).decode, gpu):
        return functools.partial(splits.decode, cut=cut)
    return None


def _has_its_blocks(problem: Problem) -> bool:
    """Whether the Triton kernels, decode among them, add up keys in this kernel's blocks: tiles of the user's own may have others."""
    tiles = tiles_for(target_gpu(), problem)
    return {tiles.forward.block_k, tiles.closing.block_k, tiles.decode.block_k} == {BLOCK}


def forward(query, key, value, rows: Rows, problem: Problem):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    if "forward" in handed_on(problem):
        return triton.forward(query, key, value, rows, problem)
    if decode := _decode_for(problem):
        return decode(query, key, value, rows, problem)
    from flashcore_jax.kernels.mosaic_gpu.forward import forward

    return forward(query, key, value, rows, problem, target_gpu())


def backward(query, key, value, rows: Rows, out, lse, dout, dlse, problem: Problem):
    """The gradients of query, key and value."""
    if "backward" in handed_on(problem):
        return triton.backward(query, key, value, rows, out, lse, dout, dlse, problem)
    from flashcore_jax.kernels.mosaic_gpu.backward import backward

    return backward(query, key, value, rows, out, lse, dout, dlse, problem, target_gpu())
