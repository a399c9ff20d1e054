"""Compiling for a GPU that is not here: the report's facts, its verdicts, and that a compiler that dies is a finding."""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import flashcore_jax
from benchmarks import aot, hlo
from flashcore_jax.tuning.gpus import gpu_of

pytestmark = pytest.mark.host

GPUS = list(aot.TARGETS)
CAUSAL = next(w for w in aot.WORKLOADS if w.name == "bfloat16 64/64 causal")


EVERYTHING = next(w for w in aot.WORKLOADS if w.name == "bfloat16 80/80 everything")


class Aborting(aot.Job):
    def report(self):
        os.abort()


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("bfloat16 64/64 causal", ["closing", "dkdv", "dq"]),
        ("bfloat16 64/64 decode", ["decode"]),
        ("float32 64/64 causal", ["closing", "dkdv", "dq"]),
    ],
)
@pytest.mark.parametrize("gpu", ["NVIDIA A100", "NVIDIA H200"])
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_kernels_compile(gpu, kind, kernels):
    workload = next(w for w in aot.WORKLOADS if w.name == kind)
    (rows,) = aot.compile_all([aot.Job(gpu, workload)], workers=1)
    assert [row["kernel"] for row in rows] == kernels
    for row in rows:
        assert not row["fault"], row
        assert 0 < row["registers"] <= 255
        assert 0 < row["shared_memory"] <= row["limit"]
        assert row["threads"] % 128 == 0
        assert row["tensor_core"] == ("wgmma.mma_async" if gpu == "NVIDIA H200" else "mma.sync")


@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
@pytest.mark.mosaic
def test_mosaic_kernels_compile():
    job = next(job for job in aot.mosaic_jobs_for(["NVIDIA H200"], quick=True) if job.workload.name == "bfloat16 64 causal")
    (rows,) = aot.compile_all([job], workers=1)
    assert [row["kernel"] for row in rows] == ["closing", "dkdv", "dq"]
    for row in rows:
        assert not row["fault"], row
        assert 0 < row["registers"] < row["computing"] <= 255
        assert 0 < row["shared_memory"] <= row["limit"]
        assert row["threads"] % 128 == 0
        assert row["tensor_core"] == "wgmma.mma_async"
        assert not row["losses"]


@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_masks_of_whole_tiles_cost_nothing():
    """Without any bound the compiler must see that every row of every tile exists: then two programs of dQ share a multiprocessor's
    65,536 registers, not one (P7's backward took 14 % longer while it was one)."""
    full = next(w for w in aot.WORKLOADS if w.name == "bfloat16 128/128 full")
    (rows,) = aot.compile_all([aot.Job("NVIDIA H200", full)], workers=1)
    facts = next(row for row in rows if row["kernel"] == "dq")
    assert 2 * facts["threads"] * -(-facts["registers"] // 8) * 8 <= 65536


def program_for_two_gpus(spec, implementation, by) -> str:
    mesh = aot.mesh_for("NVIDIA H200", devices=2)

    def gradients(*arrays):
        out_of = functools.partial(flashcore_jax.attention, is_causal=True, implementation=implementation)
        return jax.vjp(out_of, *arrays)[1](arrays[0])

    if by == "shard_map":
        gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec,) * 3)
    else:
        mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(jax.sharding.AxisType[by],))
    shapes = ((2, 1024, heads, 64) for heads in (8, 2, 2))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape in shapes]
    with jax.set_mesh(mesh) if by == "Explicit" else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(gradients).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("by", ["shard_map", "Explicit", "Auto"])
@pytest.mark.parametrize(("implementation", "kernel"), [("triton", "__gpu$xla.gpu.triton"), ("mosaic_gpu", "mosaic_gpu_v2")])
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")], ids=["batch", "heads"])
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_two_gpus_exchange_nothing(spec, implementation, kernel, by):
    """Forward and backward for two H200s, with shard_map's checks on; test_transforms.py has the numbers, on four CPUs."""
    # In a process of its own: here JAX has already looked for GPUs, and a machine without one then has no compiler for them.
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), aot.leave_the_gpu_alone) as pool:
        program = pool.submit(program_for_two_gpus, spec, implementation, by).result()
    assert program.count(kernel) >= 3
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))


# --- the cache is never copied

BATCH, SLOTS, KV_HEADS, SIZE, LAYERS = 4, 1024, 2, 64, 6


def append_and_attend(cache, query, key, value):
    return flashcore_jax.attention_with_kv_cache(query, key, value, cache)


def scan_over_steps(cache, *token):
    return jax.lax.scan(lambda cache, _: append_and_attend(cache, *token)[::-1], cache, None, length=5)


def while_loop(cache, query, key, value):
    def step(carry):
        i, cache, query = carry
        query, cache = append_and_attend(cache, query, key, value)
        return i + 1, cache, query

    return jax.lax.while_loop(lambda carry: (carry[0] < 7) & ~jnp.all(carry[1].overflowed), step, (0, cache, query))


def scan_over_layers(cache, query, key, value):
    def layer(carry, i):
        cache, query = carry
        query, cache = flashcore_jax.attention_with_kv_cache(query, key, value, cache, layer=i)
        return (cache, query), None

    return jax.lax.scan(layer, (cache, query), jnp.arange(LAYERS))[0]


def scan_over_layers_in_while_loop(cache, query, key, value):
    def step(carry):
        i, cache, query = carry
        return i + 1, *scan_over_layers(cache, query, key, value)

    return jax.lax.while_loop(lambda carry: carry[0] < 7, step, (0, cache, query))


def a_slice_per_layer(cache, query, key, value):
    """What must be found: each layer taken out of the stack."""

    def layer(query, i):
        out = flashcore_jax.attention(query, cache.key[i], cache.value[i], key_value_seq_lengths=cache.length[i])
        return out, None

    return cache, jax.lax.scan(layer, query, jnp.arange(LAYERS))[0]


CALLS = {
    "decode": (append_and_attend, None, 1),
    "prefill": (append_and_attend, None, 100),
    "scan over steps": (scan_over_steps, None, 1),
    "while_loop": (while_loop, None, 1),
    "scan over layers": (scan_over_layers, LAYERS, 1),
    "scan over layers, prefill": (scan_over_layers, LAYERS, 100),
    "scan over layers in while_loop": (scan_over_layers_in_while_loop, LAYERS, 1),
    "a slice per layer": (a_slice_per_layer, LAYERS, 1),
}


def a_cache_and_tokens(layers, T):
    cache = jax.eval_shape(lambda: flashcore_jax.KVCache.create(BATCH, SLOTS, KV_HEADS, SIZE, layers=layers))
    return cache, *(jax.ShapeDtypeStruct((BATCH, T, heads, SIZE), jnp.bfloat16) for heads in (8, KV_HEADS, KV_HEADS))


def copies_and_memory(name: str) -> tuple[dict, int, int]:
    """The operations of the optimized program that make an array as large as a layer's keys, and the bytes of temporary and
    of aliased memory. The cache is donated."""
    f, layers, T = CALLS[name]
    cache, *token = a_cache_and_tokens(layers, T)
    program = aot.compile_for(f, cache, *token, gpu="NVIDIA H200", donate_argnums=0)
    memory = program.memory_analysis()
    copies = hlo.copies(program.as_text(), BATCH * SLOTS * KV_HEADS * SIZE)
    return copies, memory.temp_size_in_bytes, memory.alias_size_in_bytes


@pytest.fixture(scope="module")
def programs():
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), aot.leave_the_gpu_alone) as pool:
        yield lambda name: pool.submit(copies_and_memory, name).result()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_the_cache_is_not_copied(programs, name):
    """Neither it nor a layer of it: no operation makes an array of that size, and the program keeps less than 1/3 of a layer
    beside its arguments (out and the partial sums)."""
    copies, temporary, aliased = programs(name)
    layer = 2 * BATCH * SLOTS * KV_HEADS * SIZE * 2
    if name == "a slice per layer":
        assert copies
    else:
        assert not copies
        assert temporary < layer / 3
        assert aliased >= layer * (CALLS[name][1] or 1)


def decode_for_two_gpus(axes) -> tuple[str, dict, int]:
    """The loop over a stacked cache, whose batch or heads two GPUs share, on automatic axes; copies of a GPU's part of a layer's keys,
    and the bytes of aliased memory."""
    mesh = aot.mesh_for("NVIDIA H200", devices=2)
    rows, tokens = P(None, axes[0]), P(axes[0], None, axes[1])
    specs = (P(None, *tokens), P(None, *tokens), rows, rows, *[tokens] * 3)
    shapes, tree = jax.tree.flatten(a_cache_and_tokens(LAYERS, 1))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x, spec in zip(shapes, specs, strict=True))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(scan_over_layers_in_while_loop, donate_argnums=0).lower(*tree.unflatten(shapes)).compile()
    copies = hlo.copies(program.as_text(), BATCH * SLOTS * KV_HEADS * SIZE // 2)
    return program.as_text(), copies, program.memory_analysis().alias_size_in_bytes


@pytest.mark.parametrize("axes", [("x", None), (None, "x")], ids=["batch", "heads"])
@pytest.mark.skipif(aot.unavailable() is not None, reason=str(aot.unavailable()))
def test_two_gpus_decode_in_place(axes):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), aot.leave_the_gpu_alone) as pool:
        program, copies, aliased = pool.submit(decode_for_two_gpus, axes).result()
    assert "flashcore_decode" in program
    assert not any(name in program for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert not copies
    assert aliased >= LAYERS * BATCH * SLOTS * KV_HEADS * SIZE * 2  # half of the keys and values, two bytes each


@pytest.mark.parametrize(("gpu", "x64"), [*((gpu, False) for gpu in GPUS), ("NVIDIA H200", True)])
def test_kernels_lower(gpu, x64):
    """No proof of a tile, but it needs no compiler: this is what the oldest and the newest jax are held to."""
    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    job = aot.Job(gpu, EVERYTHING)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)), jax.enable_x64(x64):
        text = jax.jit(job.call).trace(job.inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") >= 3
    assert all(name in text for name in ("flashcore_forward_closing", "flashcore_dkdv", "flashcore_dq"))


@pytest.mark.parametrize("gpu", GPUS)
def test_what_none_takes_lowers(gpu):
    """Prefill with its backward, and a chunk of a stacked cache: whatever this jax is, the default must not be what it cannot trace."""
    arrays = [jax.ShapeDtypeStruct((2, 512, heads, 128), jnp.bfloat16) for heads in (4, 2, 2)]
    cache = jax.eval_shape(lambda: flashcore_jax.KVCache.create(2, 1024, 2, 128, layers=2))

    def gradients(*arrays):
        return jax.vjp(functools.partial(flashcore_jax.attention, is_causal=True), *arrays)[1](arrays[0])

    device = jax.sharding.AbstractDevice(device_kind=gpu, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        backward = jax.jit(gradients).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        cached = functools.partial(flashcore_jax.attention_with_kv_cache, layer=1)
        chunk = jax.jit(cached).trace(*arrays, cache).lower(lowering_platforms=("cuda",)).as_text()
    of_hopper = gpu_of(gpu).has_wgmma and jax.__version_info__ >= (0, 11)
    kernel, others = ("mosaic_gpu_v2", 0) if of_hopper else ("__gpu$xla.gpu.triton", 1)
    assert (backward.count(kernel), chunk.count(kernel)) == (3, 1 + others)


@pytest.mark.parametrize(("H", "B"), [(64, 1), (80, 3), (128, 1), (128, 8), (256, 5)])
def test_decode_lowers_whatever_the_capacity(H, B):
    """The number of splits shapes the merge: what it holds at once must be powers of two, which no interpreter asks for."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    for splits, split_size in [(1, 2048), (3, 2048), (5, 2048), (9, 2048), (10, 2048), (17, 2048), (40, 2048), (9, None), (4, None)]:
        shapes = (B, 1, 8, H), *[(B, 2048 * splits - 5, 2, H)] * 2
        call = functools.partial(flashcore_jax.attention, implementation="triton", split_size=split_size)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
            text = (
                jax.jit(call).trace(*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes)).lower(lowering_platforms=("cuda",)).as_text()
            )
        assert "flashcore_decode" in text


def test_an_aborting_compiler_costs_one_job():
    jobs = [Aborting("NVIDIA H200", CAUSAL), Aborting("NVIDIA A100", CAUSAL)]
    rows = [row for rows in aot.compile_all(jobs, workers=1) for row in rows]
    assert sorted((row["gpu"], row["fault"]) for row in rows) == [
        ("NVIDIA A100", "the compiler aborted the process"),
        ("NVIDIA H200", "the compiler aborted the process"),
    ]


def test_verdicts():
    job = aot.Job("NVIDIA L4", CAUSAL)
    fine = {"registers": 128, "spills": 0, "losses": [], "shared_memory": 65536, "threads": 128, "tensor_core": "mma.sync"}
    report = {"flashcore_forward_closing": fine, "flashcore_dkdv": fine, "flashcore_dq": fine}
    assert [row["fault"] for row in job.judge(report)] == ["", "", ""]
    with pytest.raises(RuntimeError, match=r"got flashcore_forward_closing$"):
        job.judge({"flashcore_forward_closing": fine})

    tile = dataclasses.replace(job.tiles["flashcore_dq"], spills="")
    assert aot.fault_of(tile, fine | {"shared_memory": 200_000}, limit=101376).startswith("more shared memory")
    assert aot.fault_of(tile, fine | {"spills": 8}, limit=101376).startswith("spills registers")
    assert aot.fault_of(dataclasses.replace(tile, spills="because"), fine | {"spills": 8}, limit=101376) == ""


PTXAS = """
ptxas info    : (C7519) warpgroup.arrive is injected in around line 13 by compiler to allow use of registers in GMMA in function 'f'
ptxas info    : Compiling entry function 'f' for 'sm_90a'
ptxas info    : Function properties for f
    64 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 128 registers, used 16 barriers, 64 bytes cumulative stack size, 1 bytes smem
"""
SERIALISED = "(C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to an overlap in function 'f'"


def test_mosaic_verdicts():
    facts = aot.ptxas_facts(PTXAS, "")["f"]
    assert (facts["registers"], facts["spills"], facts["losses"]) == (128, 132, [])
    assert aot.mosaic_fault_of(facts, allowed_spills=132) == ""
    assert aot.mosaic_fault_of(facts, allowed_spills=131).startswith("spills more than the 131 B")
    facts = aot.ptxas_facts(f"ptxas info    : {SERIALISED}\n{PTXAS}", "")["f"]
    assert aot.mosaic_fault_of(facts, allowed_spills=200) == SERIALISED


def test_mosaic_is_compiled_for_hopper_alone():
    def gpus(quick):
        return {job.gpu for job in aot.mosaic_jobs_for(GPUS, quick)}

    assert gpus(quick=False) == {"NVIDIA H100", "NVIDIA H200"}
    assert gpus(quick=True) == {"NVIDIA H200"}


def test_quick_compiles_every_tile():
    def tiles(quick):
        jobs = aot.jobs_for(GPUS, quick)
        return {(gpu_of(job.gpu).capability, name, aot.shape_of(tile)) for job in jobs for name, tile in job.tiles.items()}

    assert tiles(quick=True) == tiles(quick=False)
