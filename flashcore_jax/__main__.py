"""`python -m flashcore_jax`: what is here, which implementation each kind of call takes, is it right, how fast is it.

About a minute; some seconds with `--quick`. The exit code is 0 iff every number was within its gate.
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
import numpy as np

import flashcore_jax
from flashcore_jax.testing import Results, Workload, errors, errors_of, inputs, oracle
from flashcore_jax.tuning.tile_rows import origin as tile_origin

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
# A prompt per row, then tokens one by one through the cache. Both lengths of a row are those of its whole text.
DECODE_KINDS = [
    _like_base("decode"),
    _like_base("decode, float16", dtype="float16"),
    _like_base("decode, lengths", N=8, K=2, query_seq_lengths=(512, 77), key_value_seq_lengths=(512, 77)),
    _like_base("decode, window 100", local_window_size=100),
    _like_base("decode, 192/128", H=192),
]
DECODED = 3  # tokens of each row
GPU_TIMES = [
    _like_base("1 x 2048, 32/8 heads", B=1, T=2048, S=2048, N=32, K=8),
    _like_base("4 x 4096, 16/16 heads", B=4, T=4096, S=4096, N=16, K=16),
    _like_base("4 x 4096, 32/8 heads", B=4, T=4096, S=4096, N=32, K=8),
]
CPU_TIMES = [
    _like_base("1 x 256, 4/4 heads, float32", B=1, T=256, S=256, dtype="float32"),
    _like_base("1 x 1024, 8/2 heads, float32", B=1, T=1024, S=1024, N=8, K=2, dtype="float32"),
]
GPU_DECODE_TIMES = [
    _like_base("decode, 64 x 4096, 32/8", B=64, T=1, S=4096, N=32, K=8),
    _like_base("decode, 8 x 8192, 32/8", B=8, T=1, S=8192, N=32, K=8),
]
CPU_DECODE_TIMES = [_like_base("decode, 4 x 1024, 8/2, float32", B=4, T=1, S=1024, N=8, K=2, dtype="float32")]


def environment() -> None:
    devices = jax.devices()
    print(f"device       {len(devices)} x {devices[0].device_kind} ({devices[0].platform})")
    if on_gpu():
        print(f"driver       {cuda_driver()}; {' '.join(devices[0].client.platform_version.split())}")
    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    print(f"versions     flashcore_jax {flashcore_jax.__version__}, {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(f"tiles        {tile_origin()}")


def choices(kinds) -> None:
    """Which implementation each call would take, and why not the others."""
    row = table("Which implementation a call takes", {"call": 18, "takes; the others": 0})
    for workload in kinds:
        row(workload.name, str(explain(workload)).removeprefix("takes "))


def correctness(kinds, decode_kinds) -> bool:
    """Against float64: every kind of call as it runs here, and the first three (of decode the first) on each of the others.

    Without a GPU the Triton kernels run interpreted, on very short sequences.
    """
    row = table(
        "Errors against float64, as fractions of their gates: right where <= 1",
        {"call": 18, "runs on": 20} | dict.fromkeys(Results._fields, 8) | {"": 0},
    )
    right = True
    for workload in (*kinds, *decode_kinds):
        is_decode = workload in decode_kinds
        explanation = explain(workload)
        for name, reason in explanation.reasons.items():
            interpreted = name == "triton" and not on_gpu()
            is_other = name != explanation.implementation
            if (reason is not None and not interpreted) or (is_other and workload not in (*kinds[:3], *decode_kinds[:1])):
                continue
            runs_on = f"{name}{', interpreted' * interpreted}"
            try:
                found = (errors_of_decode if is_decode else errors_of)(
                    shortened(workload, 40 if interpreted else 512 if on_gpu() else 130), implementation=name
                )
            except Exception as error:  # whatever it is, the row says it and the other rows still come
                right = False
                row(workload.name, runs_on, *["-"] * len(Results._fields), f"FAILED: {in_one_line(error)}")
            else:
                is_right = max(found.values()) <= 1.0
                right &= is_right
                row(workload.name, runs_on, *(f"{e:.3f}" for e in found.values()), "" if is_right else "WRONG")
    return right


def errors_of_decode(workload: Workload, implementation: str) -> dict[str, float]:
    """As `errors_of`, for the whole text of each row through `attention_with_kv_cache`: all but its last tokens, then one by one."""
    w = workload
    arrays = inputs(w)
    lengths = jnp.asarray(w.query_seq_lengths or (w.T,) * w.B)
    options = {name: option for name, option in w.options.items() if not name.endswith("_seq_lengths")}
    call = functools.partial(flashcore_jax.attention_with_kv_cache, implementation=implementation, return_lse=True, **options)

    @jax.jit
    def run(*arrays):
        def one_token(results, i):
            *results, cache = results
            at = jnp.arange(w.B), cache.length
            *new, cache = call(*(x[at][:, None] for x in arrays), cache)
            return (*(x.at[at].set(y[:, 0]) for x, y in zip(results, new, strict=True)), cache), None

        cache = flashcore_jax.KVCache.create(w.B, w.S, w.K, w.H, value_head_dim=w.Hv, dtype=w.dtype)
        prompt = call(*arrays, cache, query_seq_lengths=lengths - DECODED)
        return jax.lax.scan(one_token, prompt, None, length=DECODED)[0][:2]

    exact = oracle(arrays, **w.options)
    no_gradients = (jnp.asarray(gradient, w.dtype) for gradient in exact.exact[2:])
    found = errors(Results(*run(*arrays[:3]), *no_gradients), exact)
    return {"out": found["out"], "lse": found["lse"]}


def equality(dtypes) -> bool:
    """Tells how far a decode step's output is from that of the same token in a prefill, at lengths around blocks and splits.

    False where the bits must be equal and are not.
    """
    split_size = 2048 if on_gpu() else 128
    n = 2 * split_size + 44
    ends = np.array([1, 2, 63, 64, 65, split_size - 1, split_size, split_size + 1, 2 * split_size, 2 * split_size + 1, n])
    call = functools.partial(flashcore_jax.attention_with_kv_cache, split_size=split_size)

    @jax.jit
    def both(*arrays):
        _, _, K, H = arrays[1].shape
        prefill, cache = call(*arrays, flashcore_jax.KVCache.create(1, n, K, H, dtype=arrays[1].dtype))

        def decode(end):
            token = (jax.lax.dynamic_slice_in_dim(x, end - 1, 1, axis=1) for x in arrays)
            return call(*token, cache.truncate(end - 1))[0][0, 0]

        return jax.lax.map(decode, ends), prefill[0, ends - 1]

    right = True
    print()
    for dtype in dtypes:
        workload = _like_base("prefill == decode", B=1, T=n, S=n, N=8, K=2, dtype=dtype)
        try:
            decoded, prefill = (np.asarray(x, np.float64) for x in both(*inputs(workload)[:3]))
        except Exception as error:
            right = False
            verdict = f"FAILED: {in_one_line(error)}"
        else:
            exact = np.array_equal(decoded, prefill)
            must_be = promises_bits(workload)
            right &= exact or not must_be
            beside = "WRONG" if must_be else "equal bits are for GPUs, in 16 bits"
            verdict = "bit for bit" if exact else f"within {ulps_apart(decoded, prefill, dtype):.2g} ulps ({beside})"
        print(f"prefill == decode, {dtype}: {verdict}; {len(ends)} lengths from 1 to {n}, split_size {split_size}", flush=True)
    return right


def promises_bits(workload: Workload) -> bool:
    """docs/numerics.md: the kernels do, compiled for a GPU, for 16-bit inputs."""
    return on_gpu() and explain(workload).implementation != "xla" and workload.dtype != "float32"


def ulps_apart(x, y, dtype) -> float:
    """The largest difference, in ulps of the largest number of its row."""
    largest = np.max(np.abs(y), axis=-1, keepdims=True)
    return float(np.max(np.abs(x - y) / np.exp2(np.floor(np.log2(largest)) - jnp.finfo(dtype).nmant)))


def times(workloads, decode_workloads) -> bool:
    """Median times beside jax.nn's, on the same inputs. Whether ours ran: a contender may decline."""
    how = "kernel time on the GPU" if on_gpu() else "wall time"
    row = table(f"Milliseconds, causal; of decode, one step ({how})", {"B x T, heads": 30, "runs on": 16, "fwd": 9, "fwd+bwd": 9, "": 0})
    ours_ran = True
    for workload in workloads:
        w = workload
        *arrays, cotangent = random_arrays(workload)
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
    for workload in decode_workloads:
        ours_ran &= decode_times(workload, row)
    return ours_ran


def decode_times(workload: Workload, row, steps: int = 16) -> bool:
    """A decode step on a full cache: append a token, attend to all. The mean over the steps of a loop that carries the cache."""
    w = workload
    query, key, value, _ = random_arrays(workload)
    last = jnp.full(w.B, w.S, jnp.int32)

    def ours(query, key, value):
        cache = flashcore_jax.KVCache(key, value, last, jnp.zeros(w.B, bool))

        def step(_, carry):
            query, cache = carry
            return flashcore_jax.attention_with_kv_cache(query, *(query[:, :, : w.K],) * 2, cache.truncate(w.S - 1))

        return jax.lax.fori_loop(0, steps, step, (query, cache))[0]

    def theirs(query, key, value, implementation):
        def step(_, carry):
            query, *cache = carry
            key, value = (jax.lax.dynamic_update_slice_in_dim(x, query[:, :, : w.K], w.S - 1, axis=1) for x in cache)
            out = jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=last, implementation=implementation)
            return out, key, value

        return jax.lax.fori_loop(0, steps, step, (query, key, value))[0]

    contenders = {f"flashcore {explain(workload).implementation}": ours}
    for name in ("cudnn", "xla") if on_gpu() else ("xla",):
        contenders[f"jax.nn {name}"] = functools.partial(theirs, implementation=name)
    for name, loop in contenders.items():
        try:
            row(w.name, name, f"{milliseconds(jax.jit(loop), query, key, value) / steps:.3f}", "-")
        except Exception as error:
            row(w.name, name, "-", "-", in_one_line(error))
            if name.startswith("flashcore"):
                return False
    return True


def random_arrays(workload: Workload):
    """Query, key, value and the output's cotangent, made where they are used."""
    w = workload
    shapes = ((w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv), (w.B, w.T, w.N, w.Hv))
    return [jax.random.normal(jax.random.key(i), shape, w.dtype) for i, shape in enumerate(shapes)]


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
        right = correctness(*(kinds[: 1 if quick else None] for kinds in (KINDS, DECODE_KINDS)))
    right &= equality(("bfloat16", "float16")[: 1 if quick else None])
    shapes = (GPU_TIMES, GPU_DECODE_TIMES) if on_gpu() else (CPU_TIMES, CPU_DECODE_TIMES)
    right &= times(*(some[: 1 if quick else None] for some in shapes))
    print(f"\n{'Everything was right.' if right else 'SOMETHING WAS WRONG: see the tables.'} {time.perf_counter() - start:.0f} s")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
