"""Measure a board on this machine: every contender, checked against float64 first, then timed in turns.

    python -m benchmarks.run --board prefill lengths padded decode loops latency float32 --memory --out benchmarks/results/NAME.jsonl
    python -m benchmarks.run --board decode --cells D1,D5 --peers flashcore,cudnn --out x.jsonl
    python -m benchmarks.run --quick --memory --out x.jsonl          # tiny cells, also on a CPU

One JSON object per line, appended and flushed as it is found, so that a run that is stopped leaves what it had:
    run      device, versions, date: the other lines name it by `run`
    ceiling  what this GPU reaches on a large matrix product, on a copy and on a sum
    time     one contender, cell and direction of a `board`: status ok, declined (it does not compute this), wrong or failed, with
             the reason. time_us: kernel time of one call. wall_us: from Python, until its result is there. ratio: the baseline's
             time over this one's. tflops; on a cache also gbps, its valid keys and values over the time. On the board "loops",
             whose contenders are the forms of a loop: turn_us, and of its program temp_bytes, alias_bytes and copies, {opcode: how
             many} of the instructions that make an array as large as one layer's keys
    memory   temporary bytes that XLA reserves for one call
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import warnings

# Room for the XLA contender's T×S logits; still leaves some of the GPU to libraries that allocate by themselves.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.85")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import exact, loops, peers, timing, workloads
from benchmarks.peers import reason_of
from benchmarks.timing import say
from benchmarks.workloads import Cell
from flashcore_jax.tuning.tile_rows import origin

CELLS_PER_BATCH = 5  # compiled together; what a crash in a compiler can take with it
_lowering = threading.Lock()  # tracing holds the interpreter's lock anyway, and not every library's tracing is thread-safe


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)


def describe_run(quick: bool, argv) -> dict:
    device = jax.devices()[0]
    versions = {
        name: _version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "nvidia-cudnn-cu13", "tokamax")
    }
    here = pathlib.Path(__file__).parent
    commit = os.environ.get("FLASHCORE_COMMIT", "")  # for a copy of the sources that is no checkout of them
    with contextlib.suppress(OSError):
        commit = (
            commit or subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip()
        )
    now = datetime.datetime.now(datetime.UTC)
    return {
        "kind": "run", "run": now.strftime("%Y-%m-%dT%H:%M:%SZ"), "date": now.date().isoformat(), "quick": quick, "commit": commit,
        "device": device.device_kind, "platform": device.platform, "tiles": origin(),
        "versions": {"python": platform.python_version()} | {k: v for k, v in versions.items() if v},
        "command": " ".join(["python -m benchmarks.run", *(pathlib.Path(a).name if "/" in a else a for a in argv)]),
    }  # fmt: skip


# Compiling


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile: a contender on a cell, or (peer None) the cell's exact answer."""

    cell: Cell
    direction: str
    peer: str | None

    def __str__(self) -> str:
        return f"{self.cell.name} {self.direction} {self.peer or 'exact'}"

    def compile(self):
        with _lowering:
            inputs = jax.eval_shape(functools.partial(random_inputs, self.cell), jax.random.key(0))
        with jax.enable_x64(self.peer is None):
            with _lowering:
                if self.peer is None:
                    program = functools.partial(exact.attention, self.cell)
                else:
                    peer = peers.PEERS[self.peer]
                    program = peer.program(self.cell, self.direction)
                    inputs = taken(self.cell, self.direction, jax.eval_shape(functools.partial(_prepare, peer, self.cell), *inputs))
                lowered = jax.jit(program).lower(*inputs)
            return lowered.compile()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prepare(peer, cell, q, k, v, *more):
    return (*(peer.prepare(cell, q, k, v) if peer.prepare else (q, k, v)), *more)


def taken(cell: Cell, direction: str, inputs):
    """Those of a cell's inputs that a contender takes: `d_out` in the backward only."""
    return inputs if cell.cached or direction != "fwd" else (*inputs[:3], *inputs[4:])


def loaded(program):
    """A compiled program, or raises what stopped its compilation."""
    if isinstance(program, Exception):
        raise program
    return program


def compile_all(jobs, threads: int) -> dict[Job, object]:
    """{job: the compiled program, or the exception that stopped it}, in parallel threads."""

    def guarded(job):
        try:
            return job.compile()
        except Exception as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        pending = {pool.submit(guarded, job): job for job in jobs}
        for count, future in enumerate(concurrent.futures.as_completed(pending), 1):
            if count == len(jobs) or count % 10 == 0:
                say(f"compiled {count} of {len(jobs)}; last: {pending[future]}")
        return {job: future.result() for future, job in pending.items()}


# The board


@functools.partial(jax.jit, static_argnums=0)
def random_inputs(cell: Cell, key):
    """(query, key, value, d_out), padded also lengths; on a cache (query, key, value, query_lengths, key_lengths)."""
    shapes = cell.query_shape, cell.key_shape, cell.key_shape, cell.query_shape
    arrays = (jax.random.normal(k, shape).astype(cell.dtype) for k, shape in zip(jax.random.split(key, 4), shapes, strict=True))
    if cell.padded:
        *arrays, d_out = arrays
        is_valid = jnp.arange(cell.T) < cell.lengths[:, None]
        return *arrays, jnp.where(is_valid[:, :, None, None], d_out, 0), jnp.asarray(cell.lengths)
    if not cell.cached:
        return tuple(arrays)
    return *itertools.islice(arrays, 3), jnp.full(cell.B, cell.T, jnp.int32), jnp.asarray(cell.lengths)


@jax.jit
def _largest_differences(a, b):
    return [jnp.max(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32))) for x, y in zip(a, b, strict=True)]


def measure_board(board: str, cells, args):
    """Yields the records of one board."""
    if board == "loops":
        for cell in cells:
            yield from _guarded(cell, loops.measure(cell, args.rounds))
        return
    names = args.peers or (peers.QUICK if args.quick else peers.DEFAULT[board])
    directions = [direction for direction in args.directions if direction in workloads.directions(board)]
    for first in range(0, len(cells), CELLS_PER_BATCH):
        batch = cells[first : first + CELLS_PER_BATCH]
        jobs = [Job(cell, direction, name) for cell in batch for direction in directions for name in names]
        jobs += [Job(cell, "fwd+bwd", None) for cell in batch if not cell.cached]
        compiled = compile_all(jobs, args.threads)
        for cell in batch:
            yield from _guarded(cell, measure_cell(cell, compiled, names, directions, args.rounds))


def _guarded(cell, records):
    try:
        yield from records
    except Exception as e:  # out of memory for the inputs, say: the next cell may still fit
        say(f"{cell.name}: {reason_of(e)}")


def measure_cell(cell: Cell, compiled: dict, names, directions, samples: int):
    """Yields the cell's records."""
    itemsize = jnp.dtype(cell.dtype).itemsize
    one_set = sum(itemsize * int(np.prod(s)) for s in (cell.query_shape, cell.key_shape, cell.key_shape))
    input_sets = [random_inputs(cell, key) for key in jax.random.split(jax.random.key(0), timing.copies_needed(one_set))]
    try:
        if cell.cached:
            truth = exact.cached(cell, *input_sets[0][:3])
        else:
            truth = [np.asarray(x) for x in loaded(compiled[Job(cell, "fwd+bwd", None)])(*input_sets[0])]
    except Exception as e:  # the times are still worth having; their records hold no errors
        say(f"{cell.name}: no exact answer: {reason_of(e)}")
        truth = None
    for direction in directions:
        programs = {name: compiled[Job(cell, direction, name)] for name in names}
        yield from measure(cell, direction, programs, input_sets, truth, samples)


def measure(cell: Cell, direction: str, programs: dict, input_sets, truth, samples: int):
    """Checks every contender, times those that are right in turns, and yields one record each."""
    records = {name: {"kind": "time", "cell": dataclasses.asdict(cell), "direction": direction, "contender": name} for name in programs}
    contenders, ours = {}, None

    def stop(name, error, status=None):
        status = status or ("declined" if isinstance(error, peers.Declined) else "failed")
        records[name] |= {"status": status, "reason": reason_of(error)}
        say(f"{cell.name} {direction:7} {name:18} {status}: {reason_of(error)}")

    for name in sorted(programs, key=lambda n: n != peers.OURS):  # ours first: the others are compared with it
        try:
            program, peer = loaded(programs[name]), peers.PEERS[name]
            sets = [_prepare(peer, cell, *arrays) if peer.prepare else arrays for arrays in input_sets]
            sets = [taken(cell, direction, arrays) for arrays in sets]
            results = program(*sets[0])
            results = results if direction == "fwd+bwd" else (results,)
            ours = results if name == peers.OURS else ours
            if ours is not None:
                records[name]["max_diff"] = dict(
                    zip(("out", "dq", "dk", "dv"), map(float, _largest_differences(results, ours)), strict=False)
                )
            found = {} if truth is None else exact.errors(cell, results, truth)
            records[name]["errors"] = found
            if truth is not None and not cell.cached:
                records[name]["relative"] = exact.relative(cell, results, truth)
            del results
        except Exception as e:
            stop(name, e)
            continue
        if all(error <= exact.WRONG for error in found.values()):  # False for NaN too
            contenders[name] = timing.Rotating(program, sets)
        else:
            stop(name, peers.Declined("errors in units of their gates: " + ", ".join(f"{k} {e:.3g}" for k, e in found.items())), "wrong")
    del ours

    for name, (clock, times) in timing.interleaved(contenders, samples, stop).items():
        found = timing.summary(contenders[name], clock, times)
        median = found["time_us"]["median"]
        records[name] |= found | {"tflops": cell.flops(direction) / median * 1e-6}
        records[name] |= {"gbps": cell.kv_bytes / median * 1e-3} if cell.cached else {}
    baseline = records.get(peers.BASELINE, {}).get("time_us", {}).get("median")
    for name, record in records.items():
        if record["status"] == "ok":
            record["ratio"] = baseline / record["time_us"]["median"] if baseline else None
            versus = f"{record['ratio']:.3f} of {peers.BASELINE}" if baseline else ""
            errors = ", ".join(f"{k} {e:.2f}" for k, e in record["errors"].items())
            speed = f"{record['gbps']:7.1f} GB/s" if cell.cached and cell.T == 1 else f"{record['tflops']:7.1f} TFLOP/s"
            say(
                f"{cell.name} {direction:7} {name:18} {record['time_us']['median']:9.1f} µs ({record['clock']}) {speed}  {versus}  errors/gate: {errors}"
            )
        yield record


# Ceilings and memory


def measure_ceilings(quick: bool, samples: int):
    size, length = (256, 1 << 16) if quick else (8192, 1 << 29)
    a, b = (jax.random.normal(key, (size, size)).astype(jnp.bfloat16) for key in jax.random.split(jax.random.key(1)))
    x = jnp.ones((length,), jnp.float32)
    # x + 1, because XLA makes a plain copy a memcpy, which CUPTI's kernel times do not hold.
    roofs = {
        "matmul": ("TFLOP/s", 2 * size**3 * 1e-6, timing.Rotating(jax.jit(jnp.matmul), [(a, b)]), f"bf16, {size} cubed"),
        "copy": ("GB/s", 8 * length * 1e-3, timing.Rotating(jax.jit(lambda x: x + 1), [(x,)]), f"{4 * length >> 10} KiB, read and written"),
        "read": (
            "GB/s",
            4 * length * 1e-3,
            timing.Rotating(jax.jit(lambda x: x.sum(1)), [(x.reshape(-1, 4096),)]),
            f"{4 * length >> 10} KiB, read and summed",
        ),
    }
    times = timing.interleaved({name: f for name, (_, _, f, _) in roofs.items()}, samples, lambda name, e: say(f"{name}: {reason_of(e)}"))
    for name, (clock, us) in times.items():
        unit, work, _, what = roofs[name]
        value = work / statistics.median(us)
        say(f"ceiling {name}: {value:.0f} {unit}")
        yield {"kind": "ceiling", "name": name, "value": value, "unit": unit, "what": what, "clock": clock}


def measure_memory(cells, names, threads: int):
    jobs = [Job(cell, direction, name) for cell in cells for direction in workloads.DIRECTIONS for name in names]
    compiled = compile_all(jobs, threads)
    for job, program in compiled.items():
        record = {"kind": "memory", "cell": dataclasses.asdict(job.cell), "direction": job.direction, "contender": job.peer}
        if isinstance(program, Exception):
            say(f"memory {job}: {reason_of(program)}")
            yield record | {"status": "failed", "reason": reason_of(program)}
            continue
        found = program.memory_analysis()
        yield record | {
            "status": "ok", "temp_bytes": found.temp_size_in_bytes,
            "argument_bytes": found.argument_size_in_bytes, "output_bytes": found.output_size_in_bytes,
        }  # fmt: skip


def parse(argv):
    def names(text):
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--board", choices=[*workloads.BOARDS, "none"], nargs="+", action="extend", help="one or more; default prefill")
    parser.add_argument("--cells", type=names, help="only these, as in P1,D5")
    parser.add_argument("--peers", type=names, help=f"of {', '.join(peers.PEERS)}")
    parser.add_argument(
        "--directions", type=names, default=list(workloads.DIRECTIONS), help="of boards that have both: fwd, fwd+bwd or both (default)"
    )
    parser.add_argument("--rounds", type=int, help="timed calls per contender (default 20)")
    parser.add_argument(
        "--threads", type=int, default=min(16, os.cpu_count() or 1), help="that compile (default: one per core, at most 16)"
    )
    parser.add_argument("--memory", action="store_true", help="temporary bytes against T, too")
    parser.add_argument("--quick", action="store_true", help="tiny cells and few rounds")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a .jsonl file to append to")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (4 if args.quick else 20)
    cells = workloads.QUICK_BOARDS if args.quick else workloads.BOARDS
    args.boards = {board: cells[board] for board in dict.fromkeys(args.board or ["prefill"]) if board != "none"}
    for given, known in (
        (args.peers or (), peers.PEERS),
        (args.directions, workloads.DIRECTIONS),
        (args.cells or (), [cell.name for board in args.boards.values() for cell in board]),
    ):
        if unknown := set(given) - set(known):
            parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if args.cells is not None:
        args.boards = {board: [cell for cell in cells if cell.name in args.cells] for board, cells in args.boards.items()}
    return args


def main(argv=None) -> None:
    args = parse(argv)
    warnings.simplefilter("ignore")  # the contenders' deprecations, and interpret mode's
    run = describe_run(args.quick, sys.argv[1:] if argv is None else argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    say(
        f"{run['device']}, jax {run['versions']['jax']}; cells: "
        + ", ".join(f"{len(cells)} {board}" for board, cells in args.boards.items())
    )
    count = collections.Counter()
    with args.out.open("a") as file:

        def write(records):
            for record in records:
                count[record.get("status", record["kind"])] += 1
                file.write(json.dumps({"run": run["run"]} | record) + "\n")
                file.flush()

        write([run])
        if any(args.boards.values()):
            write(measure_ceilings(args.quick, args.rounds))
        for board, cells in args.boards.items():
            write({"board": board} | record for record in measure_board(board, cells, args))
        if args.memory:
            cells = workloads.QUICK_MEMORY if args.quick else workloads.MEMORY
            names = [
                name for name in (peers.OURS, "cudnn", "xla", "flashcore_xla") if not args.quick or name in (args.peers or peers.QUICK)
            ]
            write(measure_memory(cells, names, args.threads))
    say(f"wrote {args.out}: " + ", ".join(f"{n} {what}" for what, n in count.items()))


if __name__ == "__main__":
    main()
