"""Compile the shipped kernels for NVIDIA GPUs on a machine without one, and hold each tile to the GPU's limits.

    python -m benchmarks.aot                          # every GPU, every kind of call that gets a tile of its own
    python -m benchmarks.aot --quick                  # each tile at least once per architecture: what CI runs
    python -m benchmarks.aot --gpu "NVIDIA A100"      # one GPU
    python -m benchmarks.aot --out report.json        # also as data

A tile fails when it does not compile, needs more shared memory than a block may use, or spills registers though its row
does not say why (`Tile.spills`). A Mosaic GPU kernel, for Hopper alone, fails when it does not compile, spills more than
`MOSAIC_SPILLS` allows, or when ptxas says that it loses performance. The exit code says whether any did.

    kernel_report(fn, *args, gpu="NVIDIA H200")       # the same facts for the kernels in any function

Needs what the extra `aot` installs: the GPU back end of jax (it compiles without a driver) and CUDA's ptxas. Lowering alone
proves nothing: tiles too large for the GPU lower, then fail here. Some of the compiler's failures abort the process, so
compiles run in worker processes.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from flashcore_jax.attention import attention
from flashcore_jax.kernels.mosaic_gpu.launch import is_recent_enough
from flashcore_jax.kernels.triton.decode import cut_for
from flashcore_jax.problem import problem_of
from flashcore_jax.testing import Inputs, Workload, evaluate
from flashcore_jax.tuning.gpus import gpu_of
from flashcore_jax.tuning.tiles import Tile, tiles_for

# The kernels' names, and whose tile in `Tiles` each has. Through Mosaic GPU they end in `_MOSAIC`, and have no tile.
KERNELS = {
    "flashcore_forward": "forward",
    "flashcore_forward_closing": "closing",
    "flashcore_dkdv": "dkdv",
    "flashcore_dq": "dq",
    "flashcore_decode": "decode",
    "flashcore_decode_scores": "decode",
}
_MOSAIC = "_mosaic_gpu"


# ---- compiling for a GPU that is not there


@dataclasses.dataclass(frozen=True)
class Target:
    """What the compiler asks about a device, beside what `gpu_of` knows. From the vendor's tables."""

    multiprocessors: int
    threads: int  # per multiprocessor
    memory: int  # GiB
    bandwidth: int  # GB/s
    l2: int  # MiB
    clock: float  # GHz


TARGETS = {
    "NVIDIA A100": Target(108, 2048, 80, 2039, 40, 1.41),
    "NVIDIA L4": Target(58, 1536, 24, 300, 48, 2.04),
    "NVIDIA H100": Target(132, 2048, 80, 3350, 50, 1.98),
    "NVIDIA H200": Target(132, 2048, 141, 4800, 50, 1.98),
    "NVIDIA B200": Target(148, 2048, 180, 8000, 126, 1.965),
}

_UNLISTED = Target(64, 1536, 16, 500, 32, 1.5)  # small: nothing in a kernel of ours depends on it

_TARGET_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {block}  shared_memory_per_core: {core}
  threads_per_core_limit: {t.threads}  core_count: {t.multiprocessors}  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  memory_bandwidth: {t.bandwidth}000000000  l2_cache_size: {l2}  clock_rate_ghz: {t.clock}  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major}  minor: {minor}  feature_extension: {features} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation"  name: "{name}"
  driver_version: "13.0.0"  runtime_version: "13.0.0"  compile_time_toolkit_version: "13.0.0"  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


@functools.cache
def mesh_for(gpu: str, devices: int = 1):
    """A mesh of devices of the named kind on one axis, "x"."""
    target, known = TARGETS.get(gpu, _UNLISTED), gpu_of(gpu)
    major, minor = known.capability
    config = _TARGET_CONFIG.format(
        t=target, name=gpu, major=major, minor=minor, memory=target.memory << 30, l2=target.l2 << 20,
        features="ACCELERATED_FEATURES" if major >= 9 else "NONE",
        block=known.shared_memory, core=known.shared_memory + 1024,  # the driver keeps 1 KiB of each multiprocessor's
    )  # fmt: skip
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{devices}")
    return topologies.make_mesh(topo=topology, mesh_shape=(devices,), axis_names=("x",))


def compile_for(fn, *args, gpu: str, dump: str | None = None, donate_argnums=()) -> jax.stages.Compiled:
    """`fn`, compiled for arguments of these shapes and dtypes on the named GPU. `dump`: a folder for the compiler's files."""
    mesh = mesh_for(gpu)
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), args)
    options = {"xla_backend_optimization_level": 3}  # whatever XLA_FLAGS says: the tests' are for a CPU
    options |= {"xla_dump_to": dump, "xla_dump_emitter_re": "ptx"} if dump else {}
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The Pallas Triton backend", category=DeprecationWarning)
        return jax.jit(fn, donate_argnums=donate_argnums).lower(*args).compile(compiler_options=options)


def kernel_report(fn, *args, gpu: str) -> dict[str, dict]:
    """For each Pallas kernel in `fn`: grid, threads, shared_memory (bytes of a block), registers (of a thread), spills (bytes
    stored and loaded), losses (ptxas's warnings of lost performance), and tensor_core, the instruction family that its products
    became ("" for none). Of a Mosaic GPU kernel registers are those at its start, and computing those that it then asks for."""
    with tempfile.TemporaryDirectory() as folder:
        printed = pathlib.Path(folder, "mosaic.txt")
        with _mosaic_prints_to(printed):
            compile_for(fn, *args, gpu=gpu, dump=folder)
        report = collections.defaultdict(dict, _mosaic_facts(printed.read_text()))
        for path in pathlib.Path(folder).glob("*thunk_sequence.txt"):
            launched = r"kCustomKernel.*?(\S+) grid: \[(.*?)\] threads: \[(\d+).*?\]\s+shared_memory: (\d+)"
            for name, grid, threads, shared_memory in re.findall(launched, path.read_text()):
                report[name] |= {"grid": grid, "threads": int(threads), "shared_memory": int(shared_memory)}
        for path in pathlib.Path(folder).glob("*.ptx"):
            for name, facts in _assemble(path).items():
                if name in report:
                    report[name] |= facts
        return dict(report)


def _assemble(ptx: pathlib.Path) -> dict[str, dict]:
    text = ptx.read_text()
    target = re.search(r"^\.target (\w+)", text, re.M)[1]
    run = subprocess.run([find_ptxas(), "-v", f"-arch={target}", ptx, "-o", os.devnull], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"ptxas refused {ptx.name}: {run.stderr[:500]}")
    return ptxas_facts(run.stderr, text)


def ptxas_facts(said: str, ptx: str) -> dict[str, dict]:
    """What ptxas's one run on `ptx` tells about its kernels."""
    families = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    tensor_core = next((family for family in families if f"{family}." in ptx), "")
    losses = sorted(set(re.findall(r"(\(C\d+\) Potential Performance Loss: .*)", said)))
    used = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    return {
        name: {"registers": int(registers), "spills": int(stored) + int(loaded), "losses": losses, "tensor_core": tensor_core}
        for name, stored, loaded, registers in re.findall(used, said, re.S)
    }


@contextlib.contextmanager
def _mosaic_prints_to(path: pathlib.Path):
    """What Mosaic GPU says of the kernels that it compiles meanwhile goes to a file. Its dump into a folder
    (MOSAIC_GPU_DUMP_TO) would name the kernels' files, but holds 100 MB for each and doubles the time."""
    names = [f"MOSAIC_GPU_DUMP_{what}" for what in ("PTX", "PTXAS", "HOST_LLVM")]
    # It prints from C++, past sys.stdout.
    sys.stdout.flush()
    stdout = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name)
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def _mosaic_facts(printed: str) -> dict[str, dict]:
    """Of each kernel Mosaic prints its PTX, then what ptxas said of it, then the host's code that launches it."""
    report = {}
    for text in printed.split("\n.visible .entry ")[1:]:
        ((name, facts),) = ptxas_facts(text, text).items()
        # jax 0.11 launches, 0.12 says how to; the numbers are the same.
        launched = re.search(r"call (?:i32 @mosaic_gpu_launch_kernel|void @mosaic_gpu_build_kernel_spec)\((.*)\)", text)[1]
        numbers = re.findall(r"i32 (\d+)", launched)  # of grid, cluster and block three each, then the bytes of shared memory
        computing = re.search(r"setmaxnreg\.inc\.sync\.aligned\.u32 (\d+)", text)
        report[name.removesuffix("_kernel")] = facts | {
            "grid": ", ".join(numbers[:3]),
            "threads": int(numbers[6]),
            "shared_memory": int(numbers[9]),
            "computing": int(computing[1]) if computing else facts["registers"],
        }
    return report


@functools.cache
def find_ptxas() -> str:
    """CUDA's assembler: the wheel's, so that every machine measures with the same one, else the machine's own."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [pathlib.Path(root, "cu13/bin/ptxas") for root in (spec.submodule_search_locations if spec else [])]
    found = next((str(path) for path in wheels if path.exists()), None) or shutil.which("ptxas")
    if found is None:
        raise FileNotFoundError("ptxas not found: pip install '.[aot]', or put CUDA's bin folder on the PATH")
    return found


def unavailable() -> str | None:
    """Why this machine cannot compile for a GPU, or None."""
    try:
        plugin = importlib.metadata.version("jax-cuda13-plugin")
    except importlib.metadata.PackageNotFoundError:
        return "jax-cuda13-plugin is not installed: pip install '.[aot]' (Python 3.12 or newer)"
    if plugin != jax.__version__:
        return f"jax-cuda13-plugin {plugin} does not fit jax {jax.__version__}: pip install '.[aot]'"
    return None


# ---- what is compiled

DTYPES = ("bfloat16", "float32", "float16")
HEAD_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128))
ODD_HEAD_DIMS = ((40, 40), (80, 80), (160, 160), (192, 80))  # padded, to the same sizes
KINDS = {
    "causal": dict(T=4096, S=4096, is_causal=True),
    "full": dict(T=1024, S=1024),
    "decode": dict(B=64, T=1, S=5000, is_causal=True, query_seq_lengths=(1,) * 64, key_value_seq_lengths=(5000,) * 64),
    # Shared out among more programs, each with other work.
    "decode of one row": dict(B=1, T=1, S=5000, is_causal=True, query_seq_lengths=(1,), key_value_seq_lengths=(5000,)),
    # All that adds code and registers, at once.
    "everything": dict(
        T=1000, S=5000, is_causal=True, local_window_size=(700, 0), logits_soft_cap=30.0,
        query_seq_lengths=(1000, 900), key_value_seq_lengths=(5000, 4000),
    ),
}  # fmt: skip
WORKLOADS = tuple(
    Workload(f"{dtype} {H}/{Hv} {kind}", N=8, K=2, H=H, Hv=Hv, dtype=dtype, **{"B": 2} | facts)
    for kind, facts in KINDS.items()
    for dtype in DTYPES
    for H, Hv in (ODD_HEAD_DIMS if kind == "everything" else HEAD_DIMS)
)
# Sizes in multiples of 8, or the call goes to Triton; those of "full" in none of the blocks of 64.
_PADDED = dict(query_seq_lengths=(4096, 1000), key_value_seq_lengths=(4096, 1000))
MOSAIC_KINDS = {
    "causal": KINDS["causal"],
    "full": dict(T=1000, S=4040),
    "padded": KINDS["causal"] | _PADDED,
    "everything": KINDS["everything"],
    # Of a cluster's programs each fills a multiprocessor, or half of one.
    "decode": KINDS["decode of one row"] | dict(S=5000),
    "decode of some rows": KINDS["decode"] | dict(B=8, query_seq_lengths=(1,) * 8, key_value_seq_lengths=(5000,) * 8),
    "decode of many rows": KINDS["decode"],  # a program for each split
    "decode of many rows, everything": KINDS["decode"] | dict(local_window_size=(3000, 0), logits_soft_cap=30.0),
}
# The bytes that a Mosaic GPU kernel of a head dim may spill, stored and loaded, by the kind of call. Behind them what ptxas
# 13.5.37 makes of it today, with jax 0.11.2: the limit is that, rounded up to a hundred.
MOSAIC_SPILLS = {
    ("forward", 64): dict(causal=0, full=0, padded=0, everything=0),  # 0, 0, 0, 0
    ("forward", 128): dict(causal=0, full=0, padded=0, everything=0),  # 0, 0, 0, 0
    ("forward", 256): dict(causal=0, full=0, padded=0, everything=0),  # 0, 0, 0, 0
    ("closing", 64): dict(causal=0, full=0, padded=0, everything=0),  # 0, 0, 0, 0
    ("closing", 128): dict(causal=100, full=100, padded=200, everything=200),  # 76, 76, 168, 152
    ("closing", 256): dict(causal=600, full=500, padded=600, everything=500),  # 524, 480, 524, 500
    ("dkdv", 64): dict(causal=0, full=0, padded=100, everything=100),  # 0, 0, 32, 60
    ("dkdv", 128): dict(causal=100, full=100, padded=100, everything=200),  # 48, 64, 48, 128
    ("dkdv", 256): dict(causal=100, full=100, padded=300, everything=400),  # 92, 84, 272, 348
    ("dq", 64): dict(causal=0, full=0, padded=0, everything=100),  # 0, 0, 0, 40
    ("dq", 128): dict(causal=0, full=100, padded=0, everything=100),  # 0, 8, 0, 28
    ("dq", 256): dict(causal=200, full=200, padded=200, everything=300),  # 108, 108, 112, 288
    # What is missing here is for the Triton kernels.
    ("decode", 64): {"decode": 0, "decode of some rows": 0},
    ("decode", 128): {"decode": 0, "decode of some rows": 0, "decode of many rows": 0, "decode of many rows, everything": 0},
    ("decode", 256): {"decode": 0},
}
MOSAIC_HEAD_DIMS = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of `attention` on one GPU: forward and backward, and of decode the forward."""

    gpu: str
    workload: Workload

    implementation = "triton"

    @property
    def inputs(self) -> Inputs:
        w = self.workload
        shapes = (w.B, w.T, w.N, w.H), (w.B, w.S, w.K, w.H), (w.B, w.S, w.K, w.Hv), (w.B, w.T, w.N, w.Hv), (w.B, w.T, w.N)
        return Inputs(*map(jax.ShapeDtypeStruct, shapes, (w.dtype,) * 4 + ("float32",)))

    @property
    def tiles(self) -> dict[str, Tile]:
        """The tile of each kernel that the call launches, by the kernel's name."""
        problem = problem_of(*self.inputs[:3], **self.workload.options, split_size=self.workload.split_size)
        gpu = gpu_of(self.gpu)
        tiles, closes = tiles_for(gpu, problem), problem.S > (problem.split_size or problem.S)
        if self.is_decode:
            cut = cut_for(problem, tiles.decode, gpu.multiprocessors)
            return {"flashcore_decode": cut.tile} | ({"flashcore_decode_scores": tiles.decode} if cut.scores_first else {})
        fields = "closing" if closes else "forward", "dkdv", "dq"
        return {name: getattr(tiles, field) for name, field in KERNELS.items() if field in fields}

    @property
    def is_decode(self) -> bool:
        return self.workload.T == 1

    @property
    def backward(self) -> bool:
        return not self.is_decode

    def call(self, inputs: Inputs):
        w = self.workload
        attend = functools.partial(attention, implementation=self.implementation, split_size=w.split_size)
        if self.backward:
            return evaluate(attend, inputs, **w.options)
        lengths = {name: None if x is None else jnp.asarray(x) for name, x in w.lengths.items()}
        return attend(*inputs[:3], **w.options | lengths)

    def report(self) -> dict[str, dict]:
        return kernel_report(self.call, self.inputs, gpu=self.gpu)

    def judge(self, report: dict[str, dict]) -> list[dict]:
        """One row per kernel of the compiled call."""
        launched = {name: tile for name, tile in self.tiles.items() if name in report}
        check_kernels({name.split("_")[1] for name in launched}, {"forward", "dkdv", "dq"} if self.backward else {"decode"}, report)
        limit = gpu_of(self.gpu).shared_memory
        rows = []
        for name, tile in launched.items():
            shape = f"{tile.block_q}x{tile.block_k} {tile.num_warps}w {tile.num_stages}s"
            row = {"gpu": self.gpu, "workload": self.workload.name, "kernel": KERNELS[name], "tile": shape, "limit": limit}
            rows.append(row | report[name] | {"fault": fault_of(tile, report[name], limit)})
        return rows


@dataclasses.dataclass(frozen=True)
class MosaicJob(Job):
    """One call on one Hopper GPU through Mosaic GPU."""

    kind: str

    implementation = "mosaic_gpu"

    @property
    def closes(self) -> bool:
        return self.workload.S > (self.workload.split_size or self.workload.S)

    @property
    def backward(self) -> bool:
        """Once: its kernels are the same whether the forward closes."""
        return self.closes and not self.is_decode

    def judge(self, report: dict[str, dict]) -> list[dict]:
        launched = {kernel: report[name + _MOSAIC] for name, kernel in KERNELS.items() if name + _MOSAIC in report}
        forward = {"decode" if self.is_decode else "closing" if self.closes else "forward"}
        check_kernels(set(launched), forward | {"dkdv", "dq"} if self.backward else forward, report)
        rows = []
        for kernel, facts in launched.items():
            allowed = MOSAIC_SPILLS[kernel, self.workload.H][self.kind]
            row = {"gpu": self.gpu, "workload": self.workload.name, "kernel": kernel, "tile": "Mosaic GPU"}
            row |= {"limit": gpu_of(self.gpu).shared_memory, "allowed_spills": allowed}
            rows.append(row | facts | {"fault": mosaic_fault_of(facts, allowed) or self.crowding(facts)})
        return rows

    def crowding(self, facts: dict) -> str:
        """Whether a multiprocessor holds the decode kernel's programs that its plan counts on; "" it does."""
        if not self.is_decode:
            return ""
        from flashcore_jax.kernels.mosaic_gpu import clusters, splits

        problem, gpu = problem_of(*self.inputs[:3], **self.workload.options, split_size=self.workload.split_size), gpu_of(self.gpu)
        plan = clusters.plan_for(problem, gpu)
        at_once = plan.at_once if plan else splits.AT_ONCE
        registers = -(-facts["registers"] // 8) * 8 * facts["threads"]  # which are given in eights
        fits = at_once * registers <= 65536 and at_once * (facts["shared_memory"] + 1024) <= gpu.shared_memory + 1024
        return "" if fits else f"a multiprocessor does not hold {at_once} programs"


def check_kernels(found: set[str], expected: set[str], report: dict[str, dict]):
    if found != expected:
        raise RuntimeError(f"expected {', '.join(sorted(expected))} among the compiled kernels; got {', '.join(report)}")


def jobs_for(gpus, quick: bool) -> list[Job]:
    """Every workload on every GPU. `quick`: those that bring a tile, or code, of their own. GPUs of one architecture get the same
    code but for their names, the 16-bit dtypes but for types, causal and full but for a bound; and float32, which compiles twice as
    long, is held to its tiles in the plain case."""
    jobs, seen = [], set()
    for job in (Job(gpu, workload) for workload in WORKLOADS for gpu in gpus):
        known, w = gpu_of(job.gpu), job.workload
        size, everything = jnp.dtype(w.dtype).itemsize, w.logits_soft_cap is not None
        code = known.capability, known.shared_memory, size, _power_of_two(w.H), _power_of_two(w.Hv), everything and size == 2
        new = {(*code, name, shape_of(tile)) for name, tile in job.tiles.items()} - seen
        if new or not quick:
            jobs.append(job)
            seen |= new
    return sorted(jobs, key=lambda job: gpus.index(job.gpu))


def mosaic_jobs_for(gpus, quick: bool) -> list[MosaicJob]:
    """Every kind, the forward closing and not, and backward, on every Hopper GPU; float16, the same but for types, once. `quick`: on
    one of those GPUs that get the same code."""
    hoppers = [gpu for gpu in gpus if gpu_of(gpu).has_wgmma]
    if quick:
        hoppers = list({dataclasses.replace(gpu_of(gpu), kind=""): gpu for gpu in hoppers}.values())
    calls = [("bfloat16", H, kind, split) for kind in MOSAIC_KINDS for H in MOSAIC_HEAD_DIMS for split in (2048, None)]
    calls = [(*_, H, kind, split) for *_, H, kind, split in calls if "decode" not in kind or (split and kind in MOSAIC_SPILLS["decode", H])]
    calls.append(("float16", 128, "causal", 2048))
    jobs = []
    for gpu in hoppers:
        for dtype, H, kind, split in calls:
            name = f"{dtype} {H} {kind}{'' if split else ' unsplit'}"
            workload = Workload(name, N=8, K=2, H=H, Hv=H, dtype=dtype, split_size=split, **{"B": 2} | MOSAIC_KINDS[kind])
            jobs.append(MosaicJob(gpu, workload, kind))
    return jobs


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def shape_of(tile: Tile) -> Tile:
    """A tile without what changes no code but the programs' numbers."""
    return dataclasses.replace(tile, heads_fastest=True, reason="", spills="")


def fault_of(tile: Tile, facts: dict, limit: int) -> str:
    """What is wrong with a tile, by its kernel's facts and the bytes of shared memory that a block may use; "" nothing."""
    if facts["shared_memory"] > limit:
        return "more shared memory than a block may use"
    if facts["spills"] and not tile.spills:
        return "spills registers, and its tile's `spills` does not say why"
    return ""


def mosaic_fault_of(facts: dict, allowed_spills: int) -> str:
    """What is wrong with a Mosaic GPU kernel; "" nothing. One that takes too much shared memory does not lower."""
    if facts["losses"]:
        return "; ".join(facts["losses"])
    if facts["spills"] > allowed_spills:
        return f"spills more than the {allowed_spills} B that MOSAIC_SPILLS allows"
    return ""


# ---- the run


def compile_job(job: Job) -> list[dict]:
    """The job's rows; one row of kernel "all" where it does not compile."""
    start = time.perf_counter()
    try:
        rows = job.judge(job.report())
    except Exception as error:
        rows = failed(job, f"{type(error).__name__}: {error}")
    return [{**row, "seconds": round(time.perf_counter() - start, 2)} for row in rows]


def failed(job: Job, why: str) -> list[dict]:
    return [{"gpu": job.gpu, "workload": job.workload.name, "kernel": "all", "tile": "", "fault": " ".join(why.split())[:1000]}]


def leave_the_gpu_alone():
    jax.config.update("jax_platforms", "cpu")


def compile_all(jobs, workers: int = 2):
    """Yields each job's rows, in the order in which they are done."""
    for job, rows in in_processes(compile_job, jobs, workers):
        yield failed(job, ABORTED) if rows is None else rows


ABORTED = "the compiler aborted the process"


def in_processes(work, jobs, workers: int):
    """Yields (job, work(job)) in the order in which they are done. A job whose compiler aborts costs its worker, not the run: None."""

    def fresh():
        # Spawned, because jax's threads do not survive a fork.
        return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), leave_the_gpu_alone)

    idle = queue.SimpleQueue()
    for _ in range(workers):
        idle.put(fresh())

    def work_on(job):
        pool = idle.get()
        try:
            return job, pool.submit(work, job).result()
        except concurrent.futures.process.BrokenProcessPool:
            pool = fresh()
            return job, None
        finally:
            idle.put(pool)

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:
        try:
            yield from (done.result() for done in concurrent.futures.as_completed([threads.submit(work_on, job) for job in jobs]))
        finally:
            threads.shutdown(cancel_futures=True)
            for _ in range(workers):
                idle.get().shutdown()


def line(row: dict) -> str:
    facts = f"{row['kernel']:8} {row['tile']:14}"
    if "registers" in row:
        facts += f"{row['threads']:4} threads {row['registers']:4} registers {row['spills']:5} B spilled "
        facts += f"{row['shared_memory']:7} of {row['limit']} B shared  {row['tensor_core']:16}"
        if "computing" in row:
            facts += f" {row['computing']} registers computing, {row['allowed_spills']} B spills allowed"
        facts += "".join(f" {loss}" for loss in row["losses"] if loss not in row["fault"])
    return f"{row['gpu']:12} {row['workload']:31} {facts}" + (f"  FAULT: {row['fault']}" if row["fault"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="append", choices=list(TARGETS), help="this GPU only (may be repeated)")
    parser.add_argument("--quick", action="store_true", help="each tile at least once per architecture")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    os.environ["FLASHCORE_TILES"] = ""  # the shipped tiles are the question, whatever this user has tuned
    if reason := unavailable():
        print(reason)
        return 2

    gpus = arguments.gpu or list(TARGETS)
    jobs, rows, start = jobs_for(gpus, arguments.quick), [], time.perf_counter()
    if is_recent_enough():
        jobs += mosaic_jobs_for(gpus, arguments.quick)
    else:
        print(f"no kernel of Mosaic GPU: it needs jax 0.11 or newer, and this is {jax.__version__}")
    for done, job_rows in enumerate(compile_all(jobs, arguments.workers), 1):
        rows += job_rows
        for row in job_rows:
            print(f"{done:3}/{len(jobs)} {time.perf_counter() - start:4.0f} s  {line(row)}", flush=True)
    faults = [row for row in rows if row["fault"]]
    mosaic = sum("computing" in row for row in rows)
    print(
        f"{len(rows)} kernels of {len(jobs)} calls, {mosaic} of them through Mosaic GPU, compiled with jax {jax.__version__} "
        f"in {time.perf_counter() - start:.0f} s: {len(faults)} faults"
    )
    for row in faults:
        print(line(row))
    if arguments.out:
        arguments.out.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
