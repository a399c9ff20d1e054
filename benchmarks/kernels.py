"""One of the package's kernels alone, with a tile of one's choice: what it takes, what it gives, what its compiler says of it."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp

from benchmarks import aot
from benchmarks.peers import reason_of
from flashcore_jax.kernels.triton.backward import dkdv, dq
from flashcore_jax.kernels.triton.decode import decode
from flashcore_jax.kernels.triton.forward import forward
from flashcore_jax.problem import problem_of
from flashcore_jax.rows import Rows
from flashcore_jax.testing import Inputs, Workload
from flashcore_jax.tuning.gpus import Gpu, gpu_of, target_gpu
from flashcore_jax.tuning.tile_rows import KERNELS, ON_THE_KEY_GRID, Tile, Tiles

# The results of each, as fields of `testing.Results` (but lse as [B, N, T]).
GIVES = dict.fromkeys(ON_THE_KEY_GRID, ("out", "lse")) | {"dkdv": ("dkey", "dvalue"), "dq": ("dquery",)}
_lowering = threading.Lock()  # tracing holds the interpreter's lock anyway


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel with one tile on one problem."""

    kernel: str
    workload: Workload
    tile: Tile

    def __str__(self) -> str:
        return f"{self.kernel} {self.workload} {name_of(self.tile)}"

    @property
    def operands(self) -> tuple:
        """Their shapes; `operands_of` gives the arrays."""
        w, on_key_grid = self.workload, self.kernel in ON_THE_KEY_GRID
        statistic = jax.ShapeDtypeStruct((w.B, w.N, w.T), jnp.float32)
        rows = [jax.ShapeDtypeStruct((w.B,), jnp.int32) for lengths in w.lengths.values() if lengths is not None]
        return (*shapes_of(w)[: 3 if on_key_grid else 4], *[statistic] * (0 if on_key_grid else 2), *rows)

    def call(self, *operands) -> tuple:
        """What the kernel `GIVES`, and nothing else is computed."""
        problem, tiles = problem_for(self.workload), Tiles(**dict.fromkeys(KERNELS, self.tile))
        if self.kernel == "dkdv":
            return tuple(dkdv(operands, problem, self.tile))
        if self.kernel == "dq":
            return (dq(operands, problem, self.tile),)
        arrays, rows = operands[:3], Rows(*operands[3:])
        if self.kernel == "decode":
            return tuple(decode(*arrays, rows, problem, tiles, multiprocessors=1))  # with more, few rows get other tiles
        return tuple(forward(*arrays, rows, problem, tiles))

    def compile(self):
        with _lowering:
            lowered = jax.jit(self.call).lower(*self.operands)
        return lowered.compile()


def gpu_here() -> Gpu:
    return target_gpu() or gpu_of("NVIDIA H200")  # as the kernels have it


def name_of(tile: Tile) -> str:
    return f"{tile.block_q}x{tile.block_k} {tile.num_warps} warps {tile.num_stages} stages" + (
        "" if tile.heads_fastest else ", tiles fastest"
    )


def shapes_of(w: Workload) -> list[jax.ShapeDtypeStruct]:
    """Of query, key, value and the output's cotangent."""
    shapes = (w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv), (w.B, w.T, w.N, w.Hv)
    return [jax.ShapeDtypeStruct(shape, w.dtype) for shape in shapes]


def problem_for(w: Workload):
    return problem_of(*shapes_of(w)[:3], **w.options, split_size=w.split_size)


def random_inputs(w: Workload, key) -> Inputs:
    arrays = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(jax.random.split(key, 4), shapes_of(w), strict=True)]
    return Inputs(*arrays, jnp.zeros((w.B, w.T, w.N)))


def operands_of(kernel: str, w: Workload, tiles: Tiles, inputs: Inputs) -> tuple:
    """What a kernel takes. The backward's statistics come from the forward with `tiles`."""
    rows = Rows(*(None if lengths is None else jnp.asarray(lengths) for lengths in w.lengths.values()))
    statistics = () if kernel in ON_THE_KEY_GRID else _statistics(w, tiles, inputs, rows)
    return (*inputs[: 4 if statistics else 3], *statistics, *rows.arrays)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _statistics(w: Workload, tiles: Tiles, inputs: Inputs, rows: Rows):
    """lse and delta, float32[B, N, T]."""
    out, lse = forward(*inputs[:3], rows, problem_for(w), tiles)
    delta = jnp.sum(inputs.out_cotangent.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - inputs.lse_cotangent
    return lse, delta.swapaxes(1, 2)


def facts_of(kind: str, job: Job) -> dict:
    """What the compiler says of a job's kernel on a kind of GPU; or under "reason" why there is no such kernel."""
    try:
        report = aot.kernel_report(job.call, *job.operands, gpu=kind)
        return next(facts for name, facts in report.items() if aot.KERNELS.get(name) == job.kernel)
    except Exception as error:
        return {"reason": reason_of(error)}
