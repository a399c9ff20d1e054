"""Find the fastest tiles for this machine's GPU, and write them as rows that the package takes from then on.

    python -m benchmarks.tune                                                 # 16 bits: head dims 64, 128, 256, every kernel
    python -m benchmarks.tune --head-dim 128 --budget 190 --all FILE.jsonl    # stop in time; keep every measurement
    python -m benchmarks.tune --head-dim 128 --kernel decode --out FILE.json  # not into the user's own file
    python -m benchmarks.tune --head-dim 128 --block-k 128                    # another order of additions: other bits
    python -m benchmarks.tune --quick --out FILE.json                         # tiny, on a CPU too; its times mean nothing

For each bucket of `tiles_for` (GPU, 16 or 32 bits, head dim up to 64, 128 or 256) and each kernel, candidates are
    pruned     compiled in other processes: what fails, aborts the compiler or spills heavily is never launched
    verified   on a ragged causal problem: against float64; forward and decode also bit for bit against the tile in force
    timed      in turns: all on the first of a few board cells, then on all cells the best few, the tile in force, and the best
               one with its programs in the other order. The geometric mean decides; the tile in force stays unless beaten by 1 %

Forward, closing and decode share one `block_k`, and only `--block-k` changes it: for all three of a bucket, or for none.
A kernel's row is in the file as soon as it is found, so a run that is stopped leaves what it had. The exit code is 1 where a
candidate computed something wrong; such a tile is never written.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import pathlib
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import aot, run, timing, workloads
from benchmarks.kernels import GIVES, Job, facts_of, gpu_here, name_of, operands_of, random_inputs
from benchmarks.peers import reason_of
from benchmarks.timing import say
from flashcore_jax import testing
from flashcore_jax.problem import DEFAULT_SPLIT_SIZE, DTYPES
from flashcore_jax.testing import Results, Workload
from flashcore_jax.tuning.candidates import candidates
from flashcore_jax.tuning.gpus import Gpu, gpu_of, listed_kind, target_gpu
from flashcore_jax.tuning.tile_rows import HEAD_DIMS, KERNELS, ON_THE_KEY_GRID, Tile, Tiles, place_of, rows_of, user_file
from flashcore_jax.tuning.tiles import bucket_tiles

# Cells of the board, at head dim 128, that a kernel is timed on; the first one sorts the candidates. The forward kernel that
# closes nothing runs where the keys fit one split and, as on P2, where the caller asked for none.
CELLS = {"forward": ("P1", "P9", "P2"), "closing": ("P2", "P4", "P3"), "decode": ("D1", "D5", "D2")}
CELLS |= dict.fromkeys(("dkdv", "dq"), ("P2", "P4", "P1"))
SPILLED = 2 * 4 * 255  # bytes: every register of a thread stored and loaded once. What spills more does so inside the loop
SPILLED_BY_PARTS = 4 * SPILLED  # of float32 on Hopper the fastest tiles do (docs/tuning.md)
FIRST_SAMPLES, FINALISTS = 8, 4
WORTH = 1.01  # less is noise, and rows would come and go


@dataclasses.dataclass(frozen=True)
class Bucket:
    gpu: Gpu
    dtype: str
    head_dim: int
    tiles: Tiles  # in force, with the block_k that was asked for
    quick: bool

    @property
    def bits(self) -> int:
        return 32 if self.dtype == "float32" else 16

    @property
    def by_parts(self) -> bool:
        return self.bits == 32 and self.gpu.has_wgmma

    @property
    def most_spilled(self) -> int:
        return SPILLED_BY_PARTS if self.by_parts else SPILLED

    def __str__(self) -> str:
        return f"{self.bits} bits, head dim {self.head_dim}"

    def in_force(self, kernel: str) -> Tile:
        return dataclasses.replace(getattr(self.tiles, kernel), reason="", spills="")

    def candidates(self, kernel: str) -> list[Tile]:
        grid = candidates(self.gpu, self.bits, self.head_dim, kernel, self.tiles.forward.block_k)
        return list(dict.fromkeys([self.in_force(kernel), *grid]))[: 2 if self.quick else None]

    def cells(self, kernel: str) -> list[Workload]:
        """What a kernel is timed on: heads in the number that keeps their width together, so that P2 becomes P5 or P6."""
        if self.quick:
            return [self.ragged(kernel)]
        found, board = [], {cell.name: cell for cell in workloads.PREFILL + workloads.DECODE}
        for c in (board[name] for name in CELLS[kernel]):
            heads = (n * 128 // self.head_dim for n in (c.N, c.K))
            lengths = {"query_seq_lengths": (c.T,) * c.B, "key_value_seq_lengths": tuple(map(int, c.lengths))} if c.cached else {}
            split_size = None if kernel == "forward" else DEFAULT_SPLIT_SIZE
            name = (
                c.name
                + f" at {self.head_dim}" * (self.head_dim != 128)
                + " unsplit" * (kernel == "forward" and c.keys > DEFAULT_SPLIT_SIZE)
            )
            shape = c.B, c.T, c.keys, *heads, self.head_dim, self.head_dim, self.dtype
            found.append(Workload(name, *shape, is_causal=c.is_causal, split_size=split_size, **lengths))
        return found

    def ragged(self, kernel: str) -> Workload:
        """What it is verified on: several tiles of queries, blocks and splits of keys, each with an end that is none of theirs."""
        T, S, split_size, N = (70, 150, 128, 2) if self.quick else (300, 700, 256, 4)
        T = 5 if kernel == "decode" else T
        lengths = {"query_seq_lengths": (T, T // 2), "key_value_seq_lengths": (S, 2 * S // 3)}
        shape = 2, T, S, N, N // 2, self.head_dim, self.head_dim, self.dtype
        return Workload("ragged", *shape, is_causal=True, split_size=None if kernel == "forward" else split_size, **lengths)


def fields_of(tile: Tile) -> dict:
    fields = {name: getattr(tile, name) for name in ("block_q", "block_k", "num_warps", "num_stages")}
    return fields if tile.heads_fastest else fields | {"heads_fastest": False}


# ---- pruned, verified, timed


def prune(bucket: Bucket, jobs: list[Job], workers: int) -> dict[Job, dict]:
    """{job: its `facts_of`, with a "reason" where it is not worth a launch}; no facts where this machine cannot tell them."""
    cannot, found, kind = aot.unavailable(), {}, listed_kind(bucket.gpu)
    if target_gpu() is None:
        cannot = "interpreted kernels have no compiler"
    elif kind is None:
        cannot = "no GPU of this compute capability is listed in flashcore_jax/tuning/gpus.py"
    if cannot is None:
        for job, facts in aot.in_processes(functools.partial(facts_of, kind), jobs, workers):
            found[job] = facts or {"reason": aot.ABORTED}
            if found[job].get("spills", 0) > bucket.most_spilled and job.tile != bucket.in_force(job.kernel):
                found[job]["reason"] = f"spills {facts['spills']} bytes"
            if len(found) % 20 == 0 or len(found) == len(jobs):
                say(f"{bucket}: compiled {len(found)} of {len(jobs)} candidates, {sum('reason' in f for f in found.values())} pruned")
        if any("registers" in facts for facts in found.values()):
            return {job: found[job] for job in jobs}
        cannot = found[jobs[0]]["reason"]  # of all of them: that is no tile's fault
    say(f"{bucket}: nothing is pruned: {cannot}")
    return {job: {} for job in jobs}


class Verifier:
    """Holds a kernel's tiles to float64 and, where bits are promised (docs/numerics.md), to those of the tile in force."""

    def __init__(self, bucket: Bucket, kernel: str):
        w = bucket.ragged(kernel)
        inputs = testing.inputs(w)
        self.names, self.operands = GIVES[kernel], operands_of(kernel, w, bucket.tiles, inputs)
        self.oracle = testing.oracle(inputs, **w.options)
        exact = self.oracle.exact
        self.right = Results(*(jnp.asarray(x, w.dtype) for x in exact))._replace(lse=jnp.asarray(exact.lse, jnp.float32))
        self.reference = None
        promised = bucket.bits == 16 or bucket.by_parts
        if kernel in ON_THE_KEY_GRID and promised and jax.default_backend() == "gpu":
            name = "forward" if kernel == "forward" else "closing"  # decode has the bits of prefill
            self.reference = Job(name, w, bucket.in_force(name)).compile()(*self.operands)

    def fault(self, program) -> str:
        """What is wrong with the results of a compiled job; "" nothing."""
        results = program(*self.operands)
        named = {name: x.swapaxes(1, 2) if name == "lse" else x for name, x in zip(self.names, results, strict=True)}
        errors = testing.errors(self.right._replace(**named), self.oracle)
        faults = [f"{name} at {errors[name]:.3g} of its gate" for name in named if not errors[name] <= 1]
        if self.reference is not None and not all(map(np.array_equal, results, self.reference)):
            faults.append("not the bits of the tile in force")
        return ", ".join(faults)


def measure(bucket: Bucket, programs: dict, samples: int, on_error) -> dict[Job, float]:
    """{job: median microseconds}, of jobs of one kernel on one problem with their programs."""
    job = next(iter(programs))
    one_set = sum(math.prod(x.shape) * x.dtype.itemsize for x in job.operands)
    keys = jax.random.split(jax.random.key(0), timing.copies_needed(one_set))
    sets = [operands_of(job.kernel, job.workload, bucket.tiles, random_inputs(job.workload, key)) for key in keys]
    found = timing.interleaved({job: timing.Rotating(program, sets) for job, program in programs.items()}, samples, on_error)
    return {job: statistics.median(times) for job, (_, times) in found.items()}


class Contest:
    """The candidates of one kernel, and what becomes of each: {tile: record}."""

    def __init__(self, bucket: Bucket, kernel: str, facts: dict[Tile, dict], threads: int):
        self.bucket, self.kernel, self.threads = bucket, kernel, threads
        self.cells, self.mine = bucket.cells(kernel), bucket.in_force(kernel)
        self.verifier, self.programs = Verifier(bucket, kernel), {}
        self.records = {tile: {"status": "pruned" if "reason" in found else "new", **found, "us": {}} for tile, found in facts.items()}

    def job(self, tile: Tile, workload: Workload | None = None) -> Job:
        return Job(self.kernel, workload or self.bucket.ragged(self.kernel), tile)

    def stop(self, job: Job, error, status="failed"):
        self.records[job.tile] |= {"status": status, "reason": error if isinstance(error, str) else reason_of(error)}
        say(f"{'!!! WRONG ' if status == 'wrong' else ''}{self.bucket}: {job}: {self.records[job.tile]['reason']}")

    def compare(self, tiles: list[Tile], cells: list[Workload], samples: int):
        """Verifies the tiles that are new, and times all that are right."""
        new = [tile for tile in tiles if self.records[tile]["status"] == "new"]
        jobs = [self.job(tile) for tile in new] + [self.job(tile, w) for tile in tiles for w in cells]
        self.programs |= run.compile_all(list(dict.fromkeys(job for job in jobs if job not in self.programs)), self.threads)
        for job in map(self.job, new):
            try:
                fault = self.verifier.fault(run.loaded(self.programs[job]))
            except Exception as error:
                self.stop(job, error)
            else:
                self.records[job.tile]["status"] = "ok"
                if fault:
                    self.stop(job, fault, "wrong")
        for w in cells:
            right = {}
            for job in (self.job(tile, w) for tile in tiles if self.records[tile]["status"] == "ok"):
                try:
                    right[job] = run.loaded(self.programs[job])
                except Exception as error:
                    self.stop(job, error)
            found = measure(self.bucket, right, samples, self.stop) if right else {}
            for job, us in found.items():
                self.records[job.tile]["us"][w.name] = us
            best = min(found, key=found.get, default=None)
            say(
                f"{self.bucket}: {self.kernel} {w}: {len(found)} of {len(tiles)} timed"
                + (f", {name_of(best.tile)} {found[best]:.1f} µs" if best else "")
            )

    def ranked(self, cells: list[Workload]) -> dict[Tile, float]:
        """{tile: geometric mean of its times}, the fastest first, of those timed in all of the cells."""
        times = {tile: [r["us"].get(w.name) for w in cells] for tile, r in self.records.items() if r["status"] == "ok"}
        return dict(sorted(((t, statistics.geometric_mean(us)) for t, us in times.items() if all(us)), key=lambda item: item[1]))

    def best(self, samples: int) -> dict | None:
        """The row of the best tile; None where none ran."""
        self.compare([tile for tile, r in self.records.items() if r["status"] == "new"], self.cells[:1], min(FIRST_SAMPLES, samples))
        first = list(self.ranked(self.cells[:1]))
        finalists = dict.fromkeys([*first[:FINALISTS], *(tile for tile in first if tile == self.mine)])
        if first and self.kernel != "decode":  # whose programs have one order
            flipped = dataclasses.replace(first[0], heads_fastest=not first[0].heads_fastest)
            # The order changes nothing that a tile is pruned for.
            self.records.setdefault(flipped, self.records[first[0]] | {"status": "new", "us": {}})
            finalists |= {flipped: None}
        self.compare(list(finalists), self.cells, samples)
        scores = {tile: score for tile, score in self.ranked(self.cells).items() if tile in finalists}
        if not scores:
            return None
        best = next(iter(scores))
        self.winner = best = self.mine if scores.get(self.mine, math.inf) <= WORTH * scores[best] else best
        others = [f"{name_of(tile)} {score / scores[best] - 1:+.1%}" for tile, score in scores.items() if tile != best]
        times = ", ".join(f"{name} {us:.4g} us" for name, us in self.records[best]["us"].items())
        ran = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {time.strftime('%Y-%m-%d', time.gmtime())}"
        row = self.about | fields_of(best) | {"reason": f"{times}; {', '.join(others[:3]) or 'nothing else ran'}; {ran}"}
        if spilled := self.records[best].get("spills"):
            row["spills"] = f"{spilled} bytes in {self.cells[0]}; the fastest all the same"
        return row

    @property
    def about(self) -> dict:
        gpu = {"gpu": self.bucket.gpu.kind, "capability": "{}.{}".format(*self.bucket.gpu.capability)}
        return gpu | {"bits": self.bucket.bits, "head_dim": self.bucket.head_dim, "kernel": self.kernel}


# ---- the run


def merge(file: pathlib.Path, rows: list[dict]):
    """Puts rows into a file in the place of those of the same GPU, bucket and kernel, and gives what the package finds in it then.
    Nothing that the package would refuse is written, and who reads meanwhile finds the file as it was or as it is."""
    old = file.read_text(encoding="utf-8") if file.exists() else "[]"
    rows_of(old, str(file))
    merged = {place_of(row): row for row in (*json.loads(old), *rows)}
    text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in merged.values()) + "\n]\n"
    found = rows_of(text, str(file))
    for row in rows:
        bucket_tiles(gpu_of(row["gpu"], row.get("capability")), row["bits"], row["head_dim"], found)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    new.replace(file)
    return found


class Budget:
    """Of time, for steps that may each take as long as the longest so far."""

    def __init__(self, seconds: float):
        self.seconds, self.start, self.longest = seconds, time.perf_counter(), 0.0
        self.last = self.start

    def allows(self, step: str) -> bool:
        """Whether to begin a step; ends the one before."""
        now = time.perf_counter()
        self.longest, self.last = max(self.longest, now - self.last), now
        if now - self.start + self.longest <= self.seconds:
            return True
        say(f"{step}: left out, for the budget of {self.seconds:g} s")
        return False


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=["bfloat16"], help="one for 16 bits and one for 32 (default: bfloat16)"
    )
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--block-k", type=int, choices=(16, 32, 64, 128), help="of forward, closing and decode (default: as it is)")
    parser.add_argument("--samples", type=int, help="timed calls of a finalist in each cell (default 12)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds; no kernel is begun that may not end in time")
    parser.add_argument(
        "--threads", type=int, default=min(16, os.cpu_count() or 1), help="that compile (default: one per core, at most 16)"
    )
    parser.add_argument("--out", type=pathlib.Path, help="the rows (default: the user's file, which the package takes)")
    parser.add_argument("--all", type=pathlib.Path, help="a .jsonl file to append every measurement to")
    parser.add_argument("--quick", action="store_true", help="two tiles a kernel on one tiny problem")
    args = parser.parse_args(argv)
    args.samples = args.samples or (2 if args.quick else 12)
    if args.quick and args.out is None:
        parser.error("--quick measures nothing that a call should run with: name a file with --out")
    if target_gpu() is None and not args.quick:
        parser.error("no NVIDIA GPU here; --quick runs interpreted")
    if args.out is None and user_file() is None:
        parser.error("FLASHCORE_TILES is empty: name a file with --out")
    args.out = args.out or pathlib.Path(user_file())
    args.buckets = {(32 if dtype == "float32" else 16, head_dim): dtype for dtype in args.dtype for head_dim in args.head_dim}
    return args


def main(argv=None) -> int:
    args, wrong = parse(argv), []
    budget = Budget(args.budget)
    warnings.simplefilter("ignore")  # the deprecation of Pallas's Triton route, and interpret mode's
    gpu, in_file = gpu_here(), merge(args.out, [])  # before anything is measured: can it be read, and written?
    about = run.describe_run(args.quick, sys.argv[1:] if argv is None else argv)
    about["command"] = about["command"].replace("benchmarks.run", "benchmarks.tune")

    def record(lines):
        if args.all:
            args.all.parent.mkdir(parents=True, exist_ok=True)
            with args.all.open("a") as file:
                file.writelines(json.dumps({"run": about["run"]} | line) + "\n" for line in lines)

    record([about])
    for (bits, head_dim), dtype in args.buckets.items():
        tiles, kernels, rows = bucket_tiles(gpu, bits, head_dim, in_file), args.kernel, []
        changed = args.block_k not in (None, tiles.forward.block_k)
        if changed:
            kernels = [kernel for kernel in KERNELS if kernel in args.kernel or kernel in ON_THE_KEY_GRID]
            # Their bits are what the others' are compared with; and one stage fits wherever any tile of this block_k does.
            new = {name: dataclasses.replace(getattr(tiles, name), block_k=args.block_k, num_stages=1) for name in ON_THE_KEY_GRID}
            tiles = dataclasses.replace(tiles, **new)
        bucket = Bucket(gpu, dtype, head_dim, tiles, args.quick)
        if not budget.allows(str(bucket)):
            break
        jobs = [Job(kernel, bucket.cells(kernel)[0], tile) for kernel in kernels for tile in bucket.candidates(kernel)]
        facts = prune(bucket, jobs, args.threads)
        for kernel in kernels:
            if not budget.allows(f"{bucket}: {kernel}"):
                continue
            try:
                contest = Contest(bucket, kernel, {job.tile: found for job, found in facts.items() if job.kernel == kernel}, args.threads)
                row = contest.best(args.samples)
            except Exception as error:  # out of memory for a cell, say: another kernel's may fit
                say(f"{bucket}: {kernel}: {reason_of(error)}")
                continue
            record({"kind": "tile", **contest.about, **fields_of(tile), **found} for tile, found in contest.records.items())
            wrong += [contest.job(tile) for tile, found in contest.records.items() if found["status"] == "wrong"]
            if row:
                say(f"{bucket}: {kernel}: {name_of(contest.winner)}: {row['reason']}")
                rows.append(row)
            whole = {row["kernel"] for row in rows} >= set(ON_THE_KEY_GRID)
            merge(args.out, [row for row in rows if whole or not changed or row["kernel"] not in ON_THE_KEY_GRID])
    say(f"wrote {args.out}")
    for job in wrong:
        say(f"!!! WRONG, and not written: {job}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
