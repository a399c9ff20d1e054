"""`Problem`: the frozen static facts of one attention call. It is the key for support, tiles, tests and benchmarks."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp

from flashcore_jax.errors import DtypeError, OptionError, ShapeError, check
from flashcore_jax.masks import Band

DTYPES = ("float16", "bfloat16", "float32")
DEFAULT_SPLIT_SIZE = 2048
# Every key block of every implementation divides it, so a split always closes at the end of a block.
SPLIT_UNIT = 128
# What the backward keeps of the forward beside its inputs, as jax.ad_checkpoint.checkpoint_name names it: a remat policy
# that saves these two never runs the forward a second time.
RESIDUAL_NAMES = ("flashcore_out", "flashcore_lse")

_LEAST, _MOST = 1e-30, 1e30  # of a scale or a cap: its products with log2(e) and their quotients stay normal float32 numbers

_PRECISIONS = {
    jax.lax.Precision.DEFAULT: "tf32",
    jax.lax.Precision.HIGH: "high",
    jax.lax.Precision.HIGHEST: "float32",
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32: "tf32",
    jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3: "high",
    jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6: "high",
    jax.lax.DotAlgorithmPreset.F32_F32_F32: "float32",
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Shapes by axis letter, the element type, and every option that is not an array."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    Hv: int
    dtype: str
    band: Band
    scale: float
    logits_soft_cap: float | None
    split_size: int | None
    precision: str  # "native" for 16-bit inputs; "tf32", "high" or "float32" for float32 inputs
    query_lengths: bool  # the rows have query lengths of their own
    key_lengths: bool
    cached: bool = False  # key and value are a `KVCache`'s, whose rows may have overflowed
    L: int | None = None  # layers of a stacked cache: key and value are [L, B, S, K, H], and one layer of them is attended to

    @property
    def G(self) -> int:
        return self.N // self.K

    def of_part(self, query, key) -> "Problem":
        """The same of some of the rows and heads, those of these arrays."""
        return dataclasses.replace(self, B=query.shape[0], N=query.shape[2], K=key.shape[-2])


def problem_of(
    query,
    key,
    value,
    *,
    is_causal=False,
    scale=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    logits_soft_cap=None,
    precision=None,
    split_size=DEFAULT_SPLIT_SIZE,
    cached=False,
) -> Problem:
    """Checks the arguments of a call of `attention` and gathers its static facts. Raises `ArgumentError`.

    cached: key and value are a `KVCache`'s; of several layers, they have a leading axis for these, [L, B, S, K, H].
    """
    arrays = {"query": query, "key": key, "value": value}
    layout = {"query": "[B, T, N, H]", "key": "[B, S, K, H]", "value": "[B, S, K, Hv]"}
    check(
        (hasattr(a, "shape") and hasattr(a, "dtype"), DtypeError, f"{name} to be an array", type(a).__name__, "pass a jax or numpy array")
        for name, a in arrays.items()
    )
    L = None
    if cached and len(key.shape) == 5:
        L = key.shape[0]
        key, value = (jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in (key, value))
        arrays |= {"key": key, "value": value}
    check(
        (
            len(a.shape) == 4,
            ShapeError,
            f"{name} of shape {layout[name]}",
            tuple(a.shape),
            "add the missing axis, or use jax.vmap for more batch axes",
        )
        for name, a in arrays.items()
    )
    B, T, N, H = query.shape
    _, S, K, Hv = value.shape
    check([
        (not cached or (key.shape[0], key.shape[3]) == (B, H), ShapeError, f"query of the cache's batch and head dim, [B, T, N, H] = ({key.shape[0]}, T, N, {key.shape[3]})", tuple(query.shape), "create a cache for this batch and head dim"),
        (tuple(key.shape) == (B, S, K, H), ShapeError, f"key of shape [B, S, K, H] = {(B, S, K, H)}, from query and value", tuple(key.shape), "query and key share B and H, key and value share B, S and K"),
        (value.shape[0] == B, ShapeError, f"value with batch {B}, as query", value.shape[0], "query, key and value share B"),
        (min(B, T, S, N, K) >= 1, ShapeError, "no axis of size 0", f"query {tuple(query.shape)}, key {tuple(key.shape)}", "give every row one slot, and lengths of 0"),
        (N % max(K, 1) == 0, ShapeError, f"query heads N to be a multiple of key/value heads K = {K}", f"N = {N}", "every key/value head serves N // K query heads in a row"),
    ])  # fmt: skip
    check_head_dims({"the head dim of query and key": H, "the head dim of value": Hv})
    dtype = str(query.dtype)
    check([
        (dtype in DTYPES, DtypeError, f"query of dtype {', '.join(DTYPES)}", dtype, "cast it"),
        (not cached or key.dtype == query.dtype, DtypeError, f"query of the cache's dtype {key.dtype}", dtype, "cast it, or create the cache with this dtype"),
        (key.dtype == query.dtype and value.dtype == query.dtype, DtypeError, f"key and value of query's dtype {dtype}", f"{key.dtype} and {value.dtype}", "cast them to one dtype"),
    ])  # fmt: skip
    lengths = {"query_seq_lengths": query_seq_lengths, "key_value_seq_lengths": key_value_seq_lengths}
    check(
        row
        for name, a in lengths.items()
        if a is not None
        for row in (
            (hasattr(a, "shape") and jnp.issubdtype(a.dtype, jnp.integer), DtypeError, f"{name} to be an int32 array", getattr(a, "dtype", type(a).__name__), "pass jnp.asarray(lengths, jnp.int32)"),
            (getattr(a, "shape", None) == (B,), ShapeError, f"{name} of shape [B] = ({B},)", getattr(a, "shape", None), "give one length per row of the batch"),
        )
    )  # fmt: skip
    window = local_window_size
    sides = (window, window) if is_int(window) else tuple(window) if isinstance(window, (tuple, list)) else None
    check([
        (isinstance(is_causal, bool), OptionError, "is_causal to be True or False", is_causal, "it is static: jit with static_argnames, or close over it"),
        (window is None or (sides is not None and len(sides) == 2 and all(is_int(s) and s >= 0 for s in sides)), OptionError, "local_window_size to be None, an int >= 0, or (left, right) of such", window, "left and right count keys beside the query's own position"),
        (scale is None or (_is_real(scale) and (scale == 0 or _LEAST <= abs(scale) <= _MOST)), OptionError, f"scale to be None, 0, or a Python number from {_LEAST} to {_MOST} in size", scale, "multiply query by a traced scale, and pass scale=1.0"),
        (logits_soft_cap is None or (_is_real(logits_soft_cap) and _LEAST <= logits_soft_cap <= _MOST), OptionError, f"logits_soft_cap to be None or a number from {_LEAST} to {_MOST}", logits_soft_cap, "None turns it off"),
        (split_size is None or (is_int(split_size) and split_size > 0 and split_size % SPLIT_UNIT == 0), OptionError, f"split_size to be None or a positive multiple of {SPLIT_UNIT}", split_size, f"the default is {DEFAULT_SPLIT_SIZE}; None lets each implementation choose"),
    ])  # fmt: skip
    if sides is not None:  # a side that no pair of this call reaches is no bound, and may not fit 32 bits
        sides = tuple(None if side >= T + S else int(side) for side in sides)
    return Problem(
        B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, dtype=dtype,
        band=Band.of(is_causal, sides),
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        logits_soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        split_size=None if split_size is None else int(split_size),
        precision=_precision(precision, dtype),
        query_lengths=query_seq_lengths is not None,
        key_lengths=cached or key_value_seq_lengths is not None,
        cached=cached,
        L=L,
    )  # fmt: skip


def check_head_dims(sizes: dict) -> None:
    remedy = "pad it with zeros, and pass scale=1/sqrt(unpadded head dim)"
    check(
        (is_int(size) and 8 <= size <= 256 and size % 8 == 0, ShapeError, f"{name} to be a multiple of 8 from 8 to 256", size, remedy)
        for name, size in sizes.items()
    )


def _precision(precision, dtype: str) -> str:
    try:
        canonical = jax.lax.Precision(precision) if isinstance(precision, str) else precision
        name = "high" if precision is None else _PRECISIONS[canonical]
    except (KeyError, ValueError, TypeError):
        known = "None, a jax.lax.Precision or its name, or a float32 jax.lax.DotAlgorithmPreset"
        raise OptionError(f"expected precision to be {known}; got {precision!r}; None keeps float32 accuracy for float32 inputs") from None
    return name if dtype == "float32" else "native"


def is_int(x) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_real(x) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool)
