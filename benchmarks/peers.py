"""The contenders. An adapter computes exactly what the cell says, or declines with the reason; it never runs something else.

`Peer.forward(cell)` gives a jittable `f(query, key, value) -> out`, for a padded cell `f(query, key, value, lengths)`; `Peer.cached(cell)`, for the cells with a cache, a jittable
`f(query, key, value, query_lengths, key_lengths) -> out`, both lengths int32[B]. Where a library needs its inputs in another
form, `Peer.prepare` makes it once, outside the timed call, and `Peer.note` says so beside the numbers.
"""

import dataclasses
import functools
import inspect
import logging
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.workloads import Cell


class Declined(Exception):
    """This contender does not compute this cell; the text says why."""


def reason_of(error: Exception) -> str:
    if isinstance(error, Declined):
        return str(error)
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    label: str
    forward: Callable[[Cell], Callable] | None
    cached: Callable[[Cell], Callable] | None = None
    pallas: bool = False  # somebody else's kernels written in Pallas
    gpu_only: bool = True
    no_backward: str | None = None
    prepare: Callable | None = None  # (cell, query, key, value) -> query, key, value
    note: str = ""

    def program(self, cell: Cell, direction: str) -> Callable:
        """fwd: f(q, k, v) -> out, with a cache f(q, k, v, query_lengths, key_lengths) -> out. fwd+bwd: f(q, k, v, d_out)
        -> (out, dq, dk, dv), to be jitted as one function. Padded, both take the rows' lengths as well, at the end."""
        if self.gpu_only and jax.default_backend() != "gpu":
            raise Declined("needs an NVIDIA GPU")
        if direction != "fwd" and self.no_backward:
            raise Declined(self.no_backward)
        adapter = self.cached if cell.cached else self.forward
        if adapter is None:
            raise Declined("no lengths of rows" if cell.cached else "for a cache only")
        forward = adapter(cell)
        if direction == "fwd":
            return forward

        def forward_and_backward(query, key, value, d_out, *lengths):
            out, pullback = jax.vjp(lambda *arrays: forward(*arrays, *lengths), query, key, value)
            return out, *pullback(d_out)

        return forward_and_backward


def _flashcore(cell, **choice):
    import flashcore_jax

    return _padded(cell, functools.partial(flashcore_jax.attention, **cell.options, **choice))


def _padded(cell, attend):
    """With the lengths of a padded cell's rows, of queries and keys."""
    if not cell.padded:
        return attend
    return lambda query, key, value, lengths: attend(query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths)


def _decline_padded(cell):
    if cell.padded:
        raise Declined("no lengths of rows")


def _flashcore_cached(cell, **choice):
    import flashcore_jax

    def attend(query, key, value, query_lengths, key_lengths):
        lengths = {"query_seq_lengths": query_lengths, "key_value_seq_lengths": key_lengths}
        return flashcore_jax.attention(query, key, value, is_causal=cell.is_causal, **lengths, **choice)

    return attend


def _ours(**choice) -> dict:
    """Both adapters of one of our own variants."""
    return {"forward": functools.partial(_flashcore, **choice), "cached": functools.partial(_flashcore_cached, **choice), "gpu_only": False}


def _causal_mask(cell, key_lengths):
    """bool[B, 1, T, S]: the last query stands on the last valid key. jax.nn and tokamax align the first query with the first key."""
    position = key_lengths[:, None, None, None] - cell.T + jnp.arange(cell.T)[:, None]
    return jnp.arange(cell.S) <= position


def _jax_nn(cell, implementation):
    if implementation == "xla":
        _decline_large_logits(cell)
    return _padded(cell, functools.partial(jax.nn.dot_product_attention, **cell.options, implementation=implementation))


def _jax_nn_cached(cell, implementation):
    if implementation == "xla":
        _decline_large_logits(cell)
    attend = functools.partial(jax.nn.dot_product_attention, implementation=implementation)

    def of_one_query(query, key, value, query_lengths, key_lengths):
        return attend(query, key, value, query_seq_lengths=query_lengths, key_value_seq_lengths=key_lengths)

    def of_a_chunk(query, key, value, query_lengths, key_lengths):
        return attend(query, key, value, mask=_causal_mask(cell, key_lengths))

    return of_one_query if cell.T == 1 else of_a_chunk


def _decline_large_logits(cell):
    logits = 4 * cell.B * cell.N * cell.T * cell.keys
    if logits > 30e9:
        raise Declined(f"its T-by-S logits alone would take {logits / 1e9:.0f} GB")


def _pallas_ops_triton(cell):
    _decline_padded(cell)
    if cell.N != cell.K:
        raise Declined("grouped heads: reads the wrong K/V heads without saying so")
    if cell.window is not None:
        raise Declined("no local window")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention
    # Its own default scale is 1.
    return lambda q, k, v: attention.mha(q, k, v, segment_ids=None, sm_scale=cell.scale, causal=cell.is_causal)


def _pallas_ops_mosaic(cell):
    _decline_padded(cell)
    if cell.window is not None:
        raise Declined("no local window")
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

    config = mgpu.TuningConfig(block_q=64, block_kv=64 if cell.H > 128 else 128, max_concurrent_steps=2, causal=cell.is_causal)
    return lambda q, k, v: mgpu.attention(q, k, v, config)


def _pallas_ops_gqa(cell):
    if cell.T != 1:
        raise Declined("one query per row only")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import decode_attention
    return lambda q, k, v, _, key_lengths: decode_attention.gqa(q[:, 0], k, v, kv_seq_len=key_lengths)[:, None]


def _scaled_float16(cell, query, key, value):
    return (query.astype(jnp.float32) * cell.scale).astype(jnp.float16), key.astype(jnp.float16), value.astype(jnp.float16)


@functools.cache
def _tokamax():
    """tokamax, made to run on newer JAX than it was written for: two names that it uses were renamed."""
    try:
        import tokamax
    except ImportError as e:
        raise Declined(f"not installed ({e})") from e
    from absl import flags
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu, triton

    logging.getLogger("absl").setLevel(logging.ERROR)  # one line for every autotuning-cache miss
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tokamax"])  # it reads flags at its first call, and would parse this program's command line for them
    if not hasattr(pl, "dot"):
        pl.dot = triton.dot
    kernel = mosaic_gpu.kernel
    if "out_shape" not in inspect.signature(kernel).parameters:

        def renamed(body, out_shape=None, scratch_shapes=None, **options):
            renames = {"out_type": out_shape, "scratch_types": scratch_shapes}
            return kernel(body, **{k: v for k, v in renames.items() if v is not None}, **options)

        mosaic_gpu.kernel = renamed
    return tokamax


def _tokamax_attention(cell, implementation):
    return _padded(cell, functools.partial(_tokamax().dot_product_attention, **cell.options, implementation=implementation))


def _tokamax_cached(cell, implementation):
    attend = functools.partial(_tokamax().dot_product_attention, implementation=implementation)
    if cell.T == 1:
        return lambda q, k, v, _, key_lengths: attend(q, k, v, key_value_seq_lengths=key_lengths)
    return lambda q, k, v, _, key_lengths: attend(q, k, v, mask=_causal_mask(cell, key_lengths))


def _both(forward, cached, implementation) -> dict:
    return {name: functools.partial(adapter, implementation=implementation) for name, adapter in (("forward", forward), ("cached", cached))}


_TOKAMAX_NOTE = "with two renamed JAX functions put back, and not autotuned here: its own choice of tiles (benchmarks/peers.py)"
PEERS = {
    peer.name: peer
    for peer in (
        Peer("flashcore", "flashcore", **_ours()),
        Peer("flashcore_nosplit", "flashcore, split_size=None", **_ours(split_size=None)),
        Peer("flashcore_triton", "flashcore, Triton", **_ours(implementation="triton")),
        Peer("flashcore_xla", "flashcore, xla", **_ours(implementation="xla")),
        Peer("cudnn", "cuDNN (jax.nn)", **_both(_jax_nn, _jax_nn_cached, "cudnn")),
        Peer("xla", "XLA (jax.nn)", **_both(_jax_nn, _jax_nn_cached, "xla"), gpu_only=False),
        Peer("pallas_triton", "pallas.ops Triton", _pallas_ops_triton, pallas=True),
        Peer(
            "pallas_gqa", "pallas.ops gqa", None, _pallas_ops_gqa, pallas=True,
            note="transposes all keys and values in every call, and NaN beyond a row's length would reach its output",
        ),
        Peer(
            "pallas_mosaic", "pallas.ops Mosaic GPU, fp16", _pallas_ops_mosaic, pallas=True, prepare=_scaled_float16,
            no_backward="no causal backward, and no scale",
            note="takes float16 only and has no scale: given the same values in float16, query scaled beforehand",
        ),
        Peer("tokamax_triton", "tokamax Triton", **_both(_tokamax_attention, _tokamax_cached, "triton"), pallas=True, note=_TOKAMAX_NOTE),
        Peer("tokamax_mosaic", "tokamax Mosaic GPU", **_both(_tokamax_attention, _tokamax_cached, "mosaic_gpu"), pallas=True, note=_TOKAMAX_NOTE),
    )
}  # fmt: skip
OURS, NO_SPLIT, BASELINE = "flashcore", "flashcore_nosplit", "cudnn"
OWN = tuple(name for name in PEERS if name.startswith(OURS))
DEFAULT = {
    "prefill": tuple(name for name in PEERS if name not in ("flashcore_xla", "pallas_gqa")),
    "decode": tuple(name for name, peer in PEERS.items() if peer.cached and name not in ("flashcore_xla", "flashcore_triton")),
    "lengths": (OURS, BASELINE, "pallas_triton", "tokamax_triton", "tokamax_mosaic"),
    "padded": (OURS, "flashcore_triton", BASELINE, "tokamax_triton", "tokamax_mosaic"),
    "latency": (OURS, BASELINE),
    "float32": (OURS, BASELINE, "xla"),
}
QUICK = ("flashcore", "flashcore_nosplit", "flashcore_xla", "xla", "cudnn")
