"""The contenders. An adapter computes exactly what the cell says, or declines with the reason; it never runs something else.

`Peer.forward(cell)` gives a jittable `f(query, key, value) -> out`. Where a library needs its inputs in another form,
`Peer.prepare` makes it once, outside the timed call, and `Peer.note` says so beside the numbers.
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


@dataclasses.dataclass(frozen=True)
class Peer:
    name: str
    label: str
    forward: Callable[[Cell], Callable]
    triton: bool = False  # one of the kernels that JAX lowers through Triton
    gpu_only: bool = True
    no_backward: str | None = None
    prepare: Callable | None = None  # (cell, query, key, value) -> query, key, value
    note: str = ""

    def program(self, cell: Cell, direction: str) -> Callable:
        """fwd: f(q, k, v) -> out. fwd+bwd: f(q, k, v, d_out) -> (out, dq, dk, dv), to be jitted as one function."""
        if self.gpu_only and jax.default_backend() != "gpu":
            raise Declined("needs an NVIDIA GPU")
        if direction != "fwd" and self.no_backward:
            raise Declined(self.no_backward)
        forward = self.forward(cell)
        if direction == "fwd":
            return forward

        def forward_and_backward(query, key, value, d_out):
            out, pullback = jax.vjp(forward, query, key, value)
            return out, *pullback(d_out)

        return forward_and_backward


def _flashcore(cell, **choice):
    import flashcore_jax

    return functools.partial(flashcore_jax.attention, **cell.options, **choice)


def _jax_nn(cell, implementation):
    logits = 4 * cell.B * cell.N * cell.T**2
    if implementation == "xla" and logits > 30e9:
        raise Declined(f"its T-by-S logits alone would take {logits / 1e9:.0f} GB")
    return functools.partial(jax.nn.dot_product_attention, **cell.options, implementation=implementation)


def _pallas_ops_triton(cell):
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
    if cell.window is not None:
        raise Declined("no local window")
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

    config = mgpu.TuningConfig(block_q=64, block_kv=64 if cell.H > 128 else 128, max_concurrent_steps=2, causal=cell.is_causal)
    return lambda q, k, v: mgpu.attention(q, k, v, config)


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
    return functools.partial(_tokamax().dot_product_attention, **cell.options, implementation=implementation)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("flashcore", "flashcore", functools.partial(_flashcore, implementation="triton"), triton=True, gpu_only=False),
        Peer(
            "flashcore_nosplit", "flashcore, split_size=None",
            functools.partial(_flashcore, implementation="triton", split_size=None), triton=True, gpu_only=False,
        ),
        Peer("flashcore_xla", "flashcore, xla", functools.partial(_flashcore, implementation="xla"), gpu_only=False),
        Peer("cudnn", "cuDNN (jax.nn)", functools.partial(_jax_nn, implementation="cudnn")),
        Peer("xla", "XLA (jax.nn)", functools.partial(_jax_nn, implementation="xla"), gpu_only=False),
        Peer("pallas_triton", "pallas.ops Triton", _pallas_ops_triton, triton=True),
        Peer(
            "pallas_mosaic", "pallas.ops Mosaic GPU, fp16", _pallas_ops_mosaic, prepare=_scaled_float16,
            no_backward="no causal backward, and no scale",
            note="takes float16 only and has no scale: given the same values in float16, query scaled beforehand",
        ),
        Peer("tokamax_triton", "tokamax Triton", functools.partial(_tokamax_attention, implementation="triton"), triton=True,
             note="with two renamed JAX functions put back (benchmarks/peers.py)"),
        Peer("tokamax_mosaic", "tokamax Mosaic GPU", functools.partial(_tokamax_attention, implementation="mosaic_gpu"),
             note="with two renamed JAX functions put back (benchmarks/peers.py)"),
    )
}  # fmt: skip
DEFAULT = tuple(name for name in PEERS if name != "flashcore_xla")
QUICK = ("flashcore", "flashcore_nosplit", "flashcore_xla", "xla", "cudnn")
OURS, NO_SPLIT, BASELINE = "flashcore", "flashcore_nosplit", "cudnn"
