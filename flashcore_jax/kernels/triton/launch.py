"""The seam to Pallas's Triton route: every kernel of this folder is launched, and touches memory, through these functions.

Upstream deprecated the route in JAX 0.11.0 (no removal date), so what depends on its API stands here and nowhere else.
Loads and stores are masked wherever they can leave the array: an unmasked one touches foreign memory. The refs' own
extents are rounded up to whole blocks for the same reason in the interpreter, which clamps a slice that leaves its ref.
"""

import functools
import struct
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flashcore_jax import online_softmax
from flashcore_jax.logits import takes_rough_tanh
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import target_gpu

_DOT_PRECISION = {
    "native": (lax.Precision.DEFAULT, lax.Precision.DEFAULT),
    "tf32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "high": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "float32": lax.DotAlgorithmPreset.F32_F32_F32,
}


def launch(kernel, *operands, name: str, grid: tuple[int, ...], in_specs, out_specs, out_shape, tile, aliases=None):
    """Runs `kernel` on `operands`: compiled for the GPU in sight, interpreted where there is none.

    `aliases` maps an operand's number to that of the output which takes over its memory."""
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[_varying_like(operands[0], *s) for s in out_shape],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=target_gpu() is None,
        input_output_aliases=aliases or {},
        name=name,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
        return call(*operands)


def load(ref, index=..., rows=None, columns=None, fill=0.0):
    """ref[index], one- or two-dimensional, with `fill` where the masks over its rows or columns (None: all) say no."""
    ref = ref.at[index]
    mask = _mask(ref.shape, rows, columns)
    return plgpu.load(ref, mask=mask, other=None if mask is None else jnp.asarray(fill, ref.dtype))


def load_chunks(ref, chunks, index=(), rows=None):
    """The rows of ref[index] in chunks of their columns; `index` ends with the rows, or is () for all of them."""
    index = index or (slice(None),)
    return tuple(load(ref, (*index, c.at), rows, c.exist) for c in chunks)


def store(ref, value, index=..., rows=None, columns=None):
    """Stores `value`, rounded to the ref's dtype, where the masks over its rows and columns say yes."""
    if isinstance(index, tuple):
        index = tuple(_int32_start(i, size) for i, size in zip(index, ref.shape, strict=False))
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=_mask(value.shape, rows, columns))


def _int32_start(index, size: int):
    """A slice that starts at an int32: under x64 the interpreter takes a Python int for an int64, beside others that are int32."""
    if isinstance(index, slice) and index == slice(None):
        index = pl.ds(0, size)
    return pl.ds(jnp.int32(index.start), index.size) if isinstance(index, pl.Slice) and isinstance(index.start, int) else index


def store_chunks(ref, chunks, values, rows=None):
    """Stores an array that is held in chunks of its columns into all of ref."""
    for c, value in zip(chunks, values, strict=True):
        store(ref, value, (slice(None), c.at), rows, c.exist)


def barrier():
    """Waits for the program's other threads. (The interpreter has one.)"""
    if target_gpu() is not None:
        plgpu.debug_barrier()


def by_parts(precision: str) -> bool:
    """Whether float32 matrices are multiplied in parts of 16 bits. Hopper's tensor cores take TF32 operands from shared memory in one
    orientation only, and what turns the others round costs more than the products."""
    gpu = target_gpu()
    return precision == "high" and gpu is not None and gpu.has_wgmma


def dot(a, b, precision: str, *, contract=(1, 0)):
    """The product of two matrices of one dtype over the named axis of each, accumulated in float32."""
    if by_parts(precision):
        return product_of_parts(a, b, functools.partial(dot, precision="native", contract=contract))
    how = _DOT_PRECISION[precision]
    if target_gpu() is None and precision != "native":
        how = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)  # the CPU has no TF32
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=how, preferred_element_type=jnp.float32)


# Of parts 0, 1 and 2, whose sizes are 1, 2^-8 and 2^-16 of the number's: all products down to 2^-16, the smallest first.
_PAIRS_OF_PARTS = ((1, 1), (0, 2), (2, 0), (0, 1), (1, 0), (0, 0))


def product_of_parts(a, b, dot):
    """The product of two float32 matrices, good to 2^-21: the sum of six of their parts."""
    a, b = _parts(a), _parts(b)
    return functools.reduce(lambda x, y: x + y, (dot(a[i], b[j]) for i, j in _PAIRS_OF_PARTS))


def _parts(x):
    """Three bfloat16 numbers that add up to a float32, exactly. (Infinity, which no difference can follow, gives NaN.)"""

    def cut(x):  # and not rounded: no number becomes infinite
        return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16)), jnp.float32)

    first = cut(x)
    rest = x - first
    second = cut(rest)
    return [part.astype(jnp.bfloat16) for part in (first, second, rest - second)]


def dot_chunks(a, b, precision: str):
    """a @ b^T, for two matrices that are held in chunks of their columns."""
    return functools.reduce(lambda x, y: x + y, (dot(x, y, precision, contract=(1, 1)) for x, y in zip(a, b, strict=True)))


def scaled_exp2(scores, log2_scale: float, shift):
    """`online_softmax.scaled_exp2` in two instructions instead of six.

    The Triton lowering neither contracts the multiply and the subtraction nor leaves out exp2's scaling of subnormal
    results; both cost more than the exponential itself. Here 2^x below 2^-126 is 0.
    """
    if target_gpu() is None:
        return online_softmax.scaled_exp2(scores, log2_scale, shift)
    return _asm(f"neg.f32 x, $2; fma.rn.f32 x, $1, {_literal(log2_scale)}, x; ex2.approx.ftz.f32 $0, x;", scores, shift)


def tanh_for(problem: Problem):
    """tanh of float32, good enough for the problem's scores.

    The libdevice function branches and takes registers. 1 - 2 / (2^(2 log2(e) x) + 1) is within `ROUGH_TANH`, by the
    instructions' own bounds (half of exp2's 2^-22, twice the reciprocal's 2^-23, two roundings).
    """
    if target_gpu() is None or not takes_rough_tanh(problem.dtype, problem.logits_soft_cap):
        return jnp.tanh
    two_log2_e = _literal(2.0 * online_softmax.LOG2_E)
    return functools.partial(
        _asm,
        f"mul.f32 x, $1, {two_log2_e}; ex2.approx.ftz.f32 x, x; add.f32 x, x, {_literal(1.0)}; "
        f"rcp.approx.ftz.f32 x, x; fma.rn.f32 $0, x, {_literal(-2.0)}, {_literal(1.0)};",
    )


def _asm(instructions: str, *args):
    """PTX on each element of float32 arrays that broadcast to the first: $0 is the result, $1 ... the arguments, x a register."""
    shape = args[0].shape
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 x; {instructions} }}",
        args=[jnp.broadcast_to(a, shape) for a in args],
        constraints=",".join(["=r", *["r"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return result


def _literal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex()


def _mask(shape, rows, columns):
    parts = [] if rows is None else [rows.reshape(-1, *[1] * (len(shape) - 1))]
    parts += [] if columns is None else [columns.reshape(1, -1)]
    return jnp.broadcast_to(parts[0] if len(parts) == 1 else parts[0] & parts[1], shape) if parts else None


def _varying_like(operand, shape, dtype):
    """An output that varies over the mesh axes that the operand varies over: what shard_map's checks ask for."""
    aval = jax.typeof(operand)
    for name, attribute in (("manual_axis_type", "mat"), ("vma", "vma")):  # jax >= 0.11, jax 0.10
        if hasattr(aval, attribute):
            return jax.ShapeDtypeStruct(shape, dtype, **{name: getattr(aval, attribute)})
    return jax.ShapeDtypeStruct(shape, dtype)
