"""`attention`: the whole truth about what is attended, and the one place where kernels get their derivative."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from flashcore_jax import implementations
from flashcore_jax.axes import Key, Lengths, LogSumExp, Output, Query, Value
from flashcore_jax.errors import Unsupported
from flashcore_jax.problem import DEFAULT_SPLIT_SIZE, RESIDUAL_NAMES, Problem, problem_of
from flashcore_jax.rows import Rows, int32, of_layer, with_layer
from flashcore_jax.sharding import partitioned, shards_of, varying_together


def attention(
    query: Query,
    key: Key,
    value: Value,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    query_seq_lengths: Lengths | None = None,
    key_value_seq_lengths: Lengths | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    precision=None,
    split_size: int | None = DEFAULT_SPLIT_SIZE,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Output | tuple[Output, LogSumExp]:
    """Softmax attention with grouped key/value heads, causal masks, windows and lengths per row.

        out_i = sum_j softmax_j(logit_ij) value_j,   logit_ij = scale * query_i . key_j,   over the keys j that i sees

    Query i of a row with q_len valid queries and kv_len valid keys stands at position `p = kv_len - q_len + i`: the last
    query stands on the last key. It sees key j iff `j < kv_len`, and `j <= p` if causal, and `p - left <= j <= p + right`
    with a window. `jax.nn.dot_product_attention` aligns the first query with the first key instead (T = 2, S = 4):

        flashcore_jax    j 0 1 2 3         jax.nn    j 0 1 2 3
                     i 0   # # # .               i 0   # . . .
                       1   # # # #                 1   # # . .

    The two agree where T = S and no lengths are given; at T = 1 jax.nn's causal query sees key 0 only.

    Args:
      query: [B, T, N, H], float16, bfloat16 or float32.
      key: [B, S, K, H], of query's dtype; K divides N, and key/value head k serves query heads k*N//K to (k+1)*N//K - 1.
      value: [B, S, K, Hv], of query's dtype. H and Hv are multiples of 8 from 8 to 256.
      is_causal: hide keys behind the query's position.
      scale: factor of the products, a Python number; default 1/sqrt(H).
      query_seq_lengths: int32[B], the valid queries of each row, the first ones; clamped to [0, T]; default T.
      key_value_seq_lengths: int32[B], the valid keys of each row, the first ones; clamped to [0, S]; default S. What lies
        beyond the lengths, NaN and Inf included, changes nothing in the output or in any gradient.
      local_window_size: keys seen beside the query's own position: an int for both sides, or (left, right).
      logits_soft_cap: cap in `cap * tanh(logit / cap)`, applied to the scaled logits.
      precision: of float32 inputs' products: None for float32-level accuracy, or a `jax.lax.Precision` or float32
        `DotAlgorithmPreset` to trade it. 16-bit inputs are multiplied exactly and accumulated in float32 in any case.
      split_size: keys per partial sum, a multiple of 128. It fixes the order of additions, and with it the bits, whatever
        the batch, the padding and the length. None lets each implementation choose: fastest, not exact across calls.
      implementation: "mosaic_gpu" (Pallas kernels for NVIDIA Hopper GPUs, 16 bits, head dims 64, 128 and 256), "triton" (for
        NVIDIA GPUs of compute capability 8.0 or newer), "xla" (plain JAX, any platform), or None for the first of these that
        runs this call here. A named one runs or raises, and never changes the meaning. "triton" without a GPU runs in
        Pallas's interpreter: slow, with an `InterpretWarning`.
      return_lse: return the log-sum-exp too.

    Returns:
      out [B, T, N, Hv] in query's dtype, or (out, lse) with lse float32[B, T, N], the natural log of each query's sum of
      exponentials, differentiable. A query that sees no key, or lies beyond its row's length, has out 0, lse -inf, and
      gradients 0.

    Raises:
      ArgumentError: (a ValueError) shapes, dtypes or options that do not fit, when traced.
      Unsupported: (a NotImplementedError) the named implementation cannot run this call, or its derivative: "mosaic_gpu" and
        "triton" have first-order reverse mode, "xla" has every mode and order. (`jax.jit` of a `jax.jvp` through the first two
        meets JAX's own TypeError about custom_vjp instead.)

    Example:
      >>> out = attention(query, key, value, is_causal=True)
    """
    problem = problem_of(
        query, key, value, is_causal=is_causal, scale=scale, query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap,
        precision=precision, split_size=split_size,
    )  # fmt: skip
    rows = Rows(int32(query_seq_lengths), int32(key_value_seq_lengths))
    out, lse = attend(query, key, value, rows, problem, implementation)
    return (out, lse) if return_lse else out


def attend(query, key, value, rows: Rows, problem: Problem, implementation: str | None):
    """`attention` of a checked problem, out and lse. Where the problem is cached, key, value and rows hold the cache's arrays."""
    arrays = query, key, value, *rows
    if shards := shards_of((query, key, value), problem.K):
        return shards.run(_attend_here, (problem, implementation), arrays, _axes(problem), ("btnv", "btn"))
    return _attend_here(problem, implementation, *arrays)


def _attend_here(problem: Problem, implementation: str | None, *arrays):
    query, key, value, *rows = varying_together(arrays)
    problem = problem.of_part(query, key)
    name = implementations.choose(implementation, problem)
    run = getattr(implementations.module(name), "attend", None) or functools.partial(_attend_with_kernels, name)
    out, lse = run(query, key, value, Rows(*rows), problem)
    return out, lse.swapaxes(1, 2)


def _axes(problem: Problem) -> tuple[str, ...]:
    """Of query, key, value and the fields of `Rows`, in the letters of `sharding`."""
    layers = "" if problem.L is None else "l"
    return "btnh", f"{layers}bskh", f"{layers}bskv", "b", f"{layers}b", f"{layers}b", "o"


def explain(
    query,
    key,
    value,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    precision=None,
    split_size: int | None = DEFAULT_SPLIT_SIZE,
    implementation: str | None = None,
    return_lse: bool = False,
) -> implementations.Explanation:  # the signature of `attention`, for editors too; tests/test_errors.py holds the two together
    """Tells which implementation the call of `attention` with these arguments takes here, and why not the others.

    The arrays may be `jax.ShapeDtypeStruct`s; nothing is computed. Raises what `attention` raises.
    """
    problem = problem_of(
        query, key, value, is_causal=is_causal, scale=scale, query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths, local_window_size=local_window_size, logits_soft_cap=logits_soft_cap,
        precision=precision, split_size=split_size,
    )  # fmt: skip
    return implementations.explain(problem, implementation)


def _attend_with_kernels(name: str, query, key, value, rows, problem: Problem):
    try:
        return _attend(query, key, value, rows, problem, name)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise _no_such_derivative(name, "forward-mode differentiation (jax.jvp, jax.linearize, jax.jacfwd)") from error


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(query, key, value, rows, problem: Problem, name: str):
    return _forward((query, key, value, rows), problem, name)


def _attend_fwd(query, key, value, rows, problem: Problem, name: str):
    out, lse = _forward((query, key, value, rows), problem, name)
    out, lse = checkpoint_name(out, RESIDUAL_NAMES[0]), checkpoint_name(lse, RESIDUAL_NAMES[1])
    return (out, lse), (query, key, value, rows, out, lse)


def _attend_bwd(problem: Problem, name: str, residuals, cotangents):
    query, key, value, rows, out, lse = residuals
    if not problem.cached:
        return *_backward((query, key, value, rows, out, lse, *cotangents), problem, name), None
    # A layer at a time: the backward of a cache is not a loop's hot path, and may take its layer out of the stack.
    layer, row = rows.layer, rows.of_layer()
    row = row.without_overflowed(problem.T)
    arrays = (query, of_layer(key, layer), of_layer(value, layer), row, out, lse, *cotangents)
    dquery, *gradients = _backward(arrays, dataclasses.replace(problem, query_lengths=True, cached=False, L=None), name)
    return dquery, *(with_layer(jnp.zeros_like(x), layer, d) for x, d in zip((key, value), gradients, strict=True)), None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _no_such_derivative(name: str, what: str) -> Unsupported:
    return Unsupported(
        f'implementation="{name}" has no {what}: its derivative is a kernel; pass implementation="xla", which has every mode and order'
    )


def _kernel_step(step: str, results):
    """One step of a kernel implementation, jitted; differentiating the kernels themselves says what to use instead."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def on_a_part(arrays, problem, name):
        return getattr(implementations.module(name), step)(*arrays, problem.of_part(*arrays[:2]))

    def axes(arrays, problem, name):
        of_query, of_key, of_value, *of_rows = _axes(problem)
        rows = Rows(*(letters if x is not None else None for letters, x in zip(of_rows, arrays[3], strict=True)))
        return (of_query, of_key, of_value, rows, "btnv", "bnt", "btnv", "bnt")[: len(arrays)], results

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(arrays, problem, name):
        return partitioned(on_a_part, axes)(arrays, problem, name)

    @run.defjvp
    def refuse(problem, name, primals, tangents):
        raise _no_such_derivative(name, "second-order derivative")

    return run


_forward = _kernel_step("forward", ("btnv", "bnt"))
_backward = _kernel_step("backward", ("btnh", "bskh", "bskv"))
