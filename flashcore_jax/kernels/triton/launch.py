"""The seam to Pallas's Triton route: every kernel of this folder is launched, and touches memory, through these functions.

Upstream deprecated the route in JAX 0.11.0 (no removal date), so what depends on its API stands here and nowhere else.
Loads and stores are masked wherever they can leave the array: an unmasked one touches foreign memory. The refs' own
extents are rounded up to whole blocks for the same reason in the interpreter, which clamps a slice that leaves its ref.
"""

import struct
import warnings

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flashcore_jax import online_softmax
from flashcore_jax.tuning.gpus import target_gpu

_DOT_PRECISION = {
    "native": (lax.Precision.DEFAULT, lax.Precision.DEFAULT),
    "tf32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "float32": lax.DotAlgorithmPreset.F32_F32_F32,
}


def launch(kernel, *operands, name: str, grid: tuple[int, ...], in_specs, out_specs, out_shape, tile):
    """Runs `kernel` on `operands`: compiled for the GPU in sight, interpreted where there is none."""
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[_varying_like(operands[0], *s) for s in out_shape],
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=target_gpu() is None,
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


def store(ref, value, rows=None, columns=None):
    """Stores `value` where the masks over its rows and columns say yes, rounded to the ref's dtype."""
    plgpu.store(ref, value.astype(ref.dtype), mask=_mask(value.shape, rows, columns))


def dot(a, b, precision: str, *, contract=(1, 0)):
    """The product of two matrices of one dtype over the named axis of each, accumulated in float32."""
    how = _DOT_PRECISION[precision]
    if target_gpu() is None and precision != "native":
        how = (lax.Precision.HIGHEST, lax.Precision.HIGHEST)  # the CPU has no TF32
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=how, preferred_element_type=jnp.float32)


def scaled_exp2(scores, log2_scale: float, shift):
    """`online_softmax.scaled_exp2` in two instructions instead of six.

    The Triton lowering neither contracts the multiply and the subtraction nor leaves out exp2's scaling of subnormal
    results; both cost more than the exponential itself. Here 2^x below 2^-126 is 0.
    """
    if target_gpu() is None:
        return online_softmax.scaled_exp2(scores, log2_scale, shift)
    scale = struct.pack(">f", log2_scale).hex()
    asm = f"{{ .reg .f32 x; neg.f32 x, $2; fma.rn.f32 x, $1, 0f{scale}, x; ex2.approx.ftz.f32 $0, x; }}"
    result = jax.ShapeDtypeStruct(scores.shape, jnp.float32)
    (p,) = plgpu.elementwise_inline_asm(
        asm, args=[scores, jnp.broadcast_to(shift, scores.shape)], constraints="=r,r,r", pack=1, result_shape_dtypes=[result]
    )
    return p


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
