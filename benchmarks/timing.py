"""Kernel time by CUPTI: the sum over all kernels of one call, without the launch gaps. Wall time where there is no CUPTI."""

import itertools
import math
import statistics
import sys
import time

import jax
import numpy as np

ROTATE_BELOW = 100_000_000  # bytes: inputs smaller than this could stay in the L2 from one call to the next
_ROTATED_BYTES = 400_000_000
_start = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _start:6.1f} s] {text}", file=sys.stderr, flush=True)


class Rotating:
    """A compiled function that takes the next of its input sets at every call, so that no call finds its inputs in the L2.

    `profiler.measure` jits what does not look like a jitted function, hence `trace` and `lower`.
    """

    def __init__(self, compiled, input_sets):
        self._compiled = compiled
        self._inputs = itertools.cycle(input_sets)

    def __call__(self):
        return self._compiled(*next(self._inputs))

    def trace(self):
        raise NotImplementedError

    lower = trace


class Carrying(Rotating):
    """A function `step(state) -> (out, state)` that consumes its state, as a donated cache: each call takes what the last one
    left, and returns `out` alone, for the state is gone when the next call comes."""

    def __init__(self, step, state):
        self._step = step
        self._state = state

    def __call__(self):
        out, self._state = self._step(self._state)
        return out


def copies_needed(input_bytes: int) -> int:
    """How many input sets to rotate through."""
    if jax.default_backend() != "gpu":
        return 1
    return 1 if input_bytes >= ROTATE_BELOW else min(64, math.ceil(_ROTATED_BYTES / input_bytes))


def wall_us(f, samples: int) -> list[float]:
    """Microseconds on the host's clock from the call to the result, one call at a time."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        jax.block_until_ready(f())
        times.append((time.perf_counter() - start) * 1e6)
    return times


def kernel_us(f: Rotating, samples: int) -> list[float]:
    """Kernel time of `samples` calls in microseconds, after one more to warm up. `RuntimeError` where CUPTI sees nothing."""
    from jax.experimental.mosaic.gpu import profiler

    def measure(iterations):
        _, ms = profiler.Cupti(finalize=False).measure(f, iterations=iterations)()
        if ms is None:
            raise RuntimeError("CUPTI saw no kernels")
        return [1e3 * t for t in (ms if iterations > 1 else [ms])]

    try:
        return measure(samples)
    except RuntimeError as e:
        if type(e) is not RuntimeError:  # JAX's own, out of memory and the like
            raise
        # The calls did not launch the same kernels each, so their times cannot be told apart: one by one.
        return [t for _ in range(samples) for t in measure(1)]


def choose_clock(f: Rotating) -> str:
    if jax.default_backend() != "gpu":
        return "wall"
    try:
        kernel_us(f, 1)
    except RuntimeError as e:
        if type(e) is not RuntimeError:
            raise
        return "wall"
    return "cupti"


def interleaved(contenders: dict, samples: int, on_error, per_visit: int = 4) -> dict[str, tuple[str, list[float]]]:
    """{name: (clock, times in µs)} of `Rotating` functions, taken in turns so that a drifting GPU clock hits all alike.

    What raises is told to `on_error(name, exception)` and left out; it never stops the others.
    """
    clocks, times = {}, {name: [] for name in contenders}
    for visit in range(math.ceil(samples / per_visit)):
        names = list(times)
        turn = visit % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            f = contenders[name]
            try:
                clock = clocks.get(name) or clocks.setdefault(name, choose_clock(f))
                times[name] += (kernel_us if clock == "cupti" else wall_us)(f, per_visit)
            except Exception as e:
                on_error(name, e)
                del times[name]
    return {name: (clocks[name], samples) for name, samples in times.items()}


def summary(f: Rotating, clock: str, times: list[float]) -> dict:
    """What a record says of these times, with the host's time of a few more calls."""
    median = statistics.median(times)
    low, high = np.percentile(times, [10, 90])
    return {
        "status": "ok", "clock": clock, "samples": len(times),
        "time_us": {"median": median, "min": min(times), "spread": float(high - low) / median},
        "wall_us": statistics.median(wall_us(f, 5)),
    }  # fmt: skip
