"""The seam to Pallas's Mosaic GPU route: what depends on its API, young and still moving, stands here, in registers.py, lanes.py and fragments.py."""

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax.sharding import varying_together

_SWIZZLE = 128  # bytes: the widest pattern, for rows of at least so many


def is_recent_enough() -> bool:
    """The route's API in jax 0.10 has the same names and other arguments."""
    return jax.__version_info__ >= (0, 11)


def launch(kernel, *operands, name: str, programs: int, warpgroups: int, out_type, scratch, cluster: int | None = None):
    """Runs `kernel` in so many programs of so many warpgroups; `lax.axis_index` gives the number of "program" and "warpgroup".

    cluster: so many members instead of one program, each with its number "member", which reach each other's shared memory."""
    results = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(programs,),
        grid_names=("program",),
        cluster=() if cluster is None else (cluster,),
        cluster_names=() if cluster is None else ("member",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=scratch,
        # No thread reads shared memory that another thread of its warpgroup writes, but behind a `commit_smem`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
    )(*operands)
    return varying_together((operands, tuple(results)))[1]  # what shard_map's checks ask for, and Pallas forgets


def shared(shape: tuple[int, ...], dtype):
    """A tile in shared memory, laid out as tensor cores and the copy engine like it."""
    size = jax.numpy.dtype(dtype).itemsize
    swizzle = min(_SWIZZLE, shape[-1] * size)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)))
