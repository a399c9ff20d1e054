"""`python -m flashcore_jax`: what is here, which implementation each kind of call takes, is it right, how fast is it.

About a minute; a few seconds with `--quick`. The exit code is 0 iff every number was within its gate.
"""

import argparse
import dataclasses
import functools
import platform
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import jaxlib

import flashcore_jax
from flashcore_jax.testing import Results, Workload, errors_of

BASE = Workload("bfloat16, causal", B=2, T=512, S=512, N=4, K=4, H=128, Hv=128, dtype="bfloat16", is_causal=True)


def _like_base(name: str, **changes) -> Workload:
    return dataclasses.replace(BASE, name=name, **changes)


KINDS = [
    BASE,
    _like_base("float16, causal", dtype="float16"),
    _like_base("float32, causal", dtype="float32"),
    _like_base("not causal", is_causal=False),
    _like_base("8 heads over 2", N=8, K=2),
    _like_base("one query", T=1),
    _like_base("lengths", query_seq_lengths=(512, 3), key_value_seq_lengths=(500, 77)),
    _like_base("window 100", local_window_size=100),
    _like_base("soft cap 10", logits_soft_cap=10.0),
    _like_base("head dim 64", H=64, Hv=64),
    _like_base("head dim 80", H=80, Hv=80),
    _like_base("head dim 192/128", H=192),
    _like_base("head dim 256", H=256, Hv=256),
]
GPU_TIMES = [
    _like_base("1 x 2048, 32/8 heads", B=1, T=2048, S=2048, N=32, K=8),
    _like_base("4 x 4096, 16/16 heads", B=4, T=4096, S=4096, N=16, K=16),
    _like_base("4 x 4096, 32/8 heads", B=4, T=4096, S=4096, N=32, K=8),
]
CPU_TIMES = [
    _like_base("1 x 256, 4/4 heads, float32", B=1, T=256, S=256, dtype="float32"),
    _like_base("1 x 1024, 8/2 heads, float32", B=1, T=1024, S=1024, N=8, K=2, dtype="float32"),
]


def environment() -> None:
    devices = jax.devices()
    print(f"device       {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    if on_gpu():
        print(f"driver       {cuda_driver()}; {' '.join(devices[0].client.platform_version.split())}")
    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    print(f"versions     flashcore_jax {flashcore_jax.__version__}, {', '.join(f'{name} {version}' for name, version in versions.items())}")


def choices(kinds) -> None:
    """Which implementation each call would take, and why not the others."""
    row = table("Which implementation a call takes", {"call": 18, "takes; the others": 0})
    for workload in kinds:
        row(workload.name, str(explain(workload)).removeprefix("takes "))


def correctness(kinds) -> bool:
    """Against float64: every kind of call as it runs here, and the first three on each of the other implementations.

    Without a GPU the Triton kernels run interpreted, on very short sequences.
    """
    row = table(
        "Errors against float64, as fractions of their gates: right where <= 1",
        {"call": 18, "runs on": 20} | dict.fromkeys(Results._fields, 8) | {"": 0},
    )
    right = True
    for workload in kinds:
        explanation = explain(workload)
        for name, reason in explanation.reasons.items():
            interpreted = name == "triton" and not on_gpu()
            is_other = name != explanation.implementation
            if (reason is not None and not interpreted) or (is_other and workload not in kinds[:3]):
                continue
            runs_on = f"{name}{', interpreted' * interpreted}"
            try:
                found = errors_of(shortened(workload, 40 if interpreted else 512 if on_gpu() else 130), implementation=name)
            except Exception as error:  # whatever it is, the row says it and the other rows still come
                right = False
                row(workload.name, runs_on, *["-"] * len(Results._fields), f"FAILED: {in_one_line(error)}")
            else:
                is_right = max(found.values()) <= 1.0
                right &= is_right
                row(workload.name, runs_on, *(f"{e:.3f}" for e in found.values()), "" if is_right else "WRONG")
    return right


def times(workloads) -> bool:
    """Median times beside jax.nn's, on the same inputs. Whether ours ran: a contender may decline."""
    how = "kernel time on the GPU" if on_gpu() else "wall time"
    row = table(f"Milliseconds, causal ({how})", {"B x T, heads": 30, "runs on": 16, "fwd": 9, "fwd+bwd": 9, "": 0})
    ours_ran = True
    for workload in workloads:
        w = workload
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = ((w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv), (w.B, w.T, w.N, w.Hv))
        *arrays, cotangent = (jax.random.normal(key, shape, w.dtype) for key, shape in zip(keys, shapes, strict=True))
        chosen = explain(workload).implementation
        contenders = {f"flashcore {chosen}": functools.partial(flashcore_jax.attention, is_causal=True)}
        for name in ("cudnn", "xla") if on_gpu() else ("xla",):
            contenders[f"jax.nn {name}"] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=name)
        for name, attention in contenders.items():

            def forward_and_backward(cotangent, *arrays, attention=attention):
                out, vjp = jax.vjp(attention, *arrays)
                return out, vjp(cotangent)

            try:
                forward = milliseconds(jax.jit(attention), *arrays)
                both = milliseconds(jax.jit(forward_and_backward), cotangent, *arrays)
            except Exception as error:
                ours_ran &= not name.startswith("flashcore")
                row(w.name, name, "-", "-", in_one_line(error))
            else:
                row(w.name, name, f"{forward:.3f}", f"{both:.3f}")
    return ours_ran


def milliseconds(f, *arrays, repeats: int = 10) -> float:
    """Median time of a jitted function: of its kernels where CUPTI can be asked, else on the wall clock."""
    jax.block_until_ready(f(*arrays))
    if on_gpu():
        try:
            from jax.experimental.mosaic.gpu import profiler

            return statistics.median(profiler.measure(f, iterations=repeats)(*arrays)[1])
        except (ImportError, RuntimeError) as error:
            print(f"(no kernel times: {error}; wall time follows)", file=sys.stderr)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(f(*arrays))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def explain(workload: Workload):
    w = workload
    query, key, value = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(w.dtype)) for shape in ((w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv))
    )
    return flashcore_jax.explain(query, key, value, **w.options)


def shortened(workload: Workload, length: int) -> Workload:
    """The same kind of call with lengths of at most `length`."""

    def cut(lengths):
        return None if lengths is None else tuple(min(x, length) for x in lengths)

    w = workload
    return dataclasses.replace(
        w,
        T=min(w.T, length),
        S=min(w.S, length),
        query_seq_lengths=cut(w.query_seq_lengths),
        key_value_seq_lengths=cut(w.key_value_seq_lengths),
    )


def table(title: str, columns: dict[str, int]):
    """Prints the head of a table, and returns what prints a row of it: at once, so that the rows are the progress too."""

    def row(*cells):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, columns.values(), strict=False)).rstrip(), flush=True)

    print(f"\n{title}\n")
    row(*columns)
    row(*("-" * max(width, len(name)) for name, width in columns.items()))
    return row


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def cuda_driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().split("Kernel Module")[-1].split("  ")[1].strip()
    except (OSError, IndexError):
        return "unknown"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashcore_jax", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one kind of call, one size")
    quick = parser.parse_args(arguments).quick
    start = time.perf_counter()

    environment()
    choices(KINDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", flashcore_jax.InterpretWarning)
        right = correctness(KINDS[:1] if quick else KINDS)
    right &= times((GPU_TIMES if on_gpu() else CPU_TIMES)[: 1 if quick else None])
    print(f"\n{'Everything was right.' if right else 'SOMETHING WAS WRONG: see the tables.'} {time.perf_counter() - start:.0f} s")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
