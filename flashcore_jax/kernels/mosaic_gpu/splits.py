"""Decode on Hopper where there are splits enough to fill the GPU: a program for each, of one warpgroup, which fetches what it adds up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax.kernels.mosaic_gpu import registers
from flashcore_jax.kernels.mosaic_gpu.forward import finish, nothing_yet, sum_of_blocks
from flashcore_jax.kernels.mosaic_gpu.launch import launch, shared
from flashcore_jax.kernels.mosaic_gpu.registers import over_columns
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS
from flashcore_jax.kernels.triton.decode import merge
from flashcore_jax.kernels.triton.forward import part_of
from flashcore_jax.masks import quotient, remainder, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of, told


MODE, ZEROS, HALF, SORT, AHEAD, AT_ONCE = "late", False, True, True, 0, 264


@dataclasses.dataclass(frozen=True)
class Plan:
    per_split: int  # key blocks of a split
    splits: int
    stages: int
    sorts: bool = False
    addresses_stay: bool = True

    @property
    def computing(self):
        return 1


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, plan: Plan):
    p, stages = problem, plan.stages
    number_of_outputs = 2 if plan.splits == 1 else 3
    row_refs, refs = refs[: sum(told(p))], refs[sum(told(p)) :]
    out_refs, refs = refs[:number_of_outputs], refs[number_of_outputs:]
    (q_smem, statistics_smem, order_smem), (k_smem, out_smem), v_smem, q_full, q_free, k_full, k_free, v_full, v_free = refs
    program = lax.axis_index("program")
    def job_of(program):
        kv_head, rest = remainder(program, p.K), quotient(program, p.K)
        return kv_head, remainder(rest, p.B), remainder(quotient(rest, p.B) + 1, plan.splits)

    kv_head, b, split = job_of(program)
    programs = p.K * p.B * plan.splits
    next_head, next_b, next_split = job_of(jnp.minimum(program + AT_ONCE, programs - 1))
    if SORT and plan.sorts:
        from flashcore_jax.rows import layer_within
        layer = () if p.L is None else (layer_within(row_refs[-1][0], p.L),)
        lengths_ref = row_refs[int(p.query_lengths)]
        lengths_ref = lengths_ref.at[layer] if layer else lengths_ref
        sb, sn = lax.cond((split == 0) | (next_split == 0), lambda: registers.by_length(lengths_ref, order_smem, (b, next_b)), lambda: (b, next_b))
        b, next_b = jnp.where(split == 0, sb, b), jnp.where(next_split == 0, sn, next_b)
        plgpu.commit_smem()
    row = row_of(row_refs, p, b)
    lengths = tuple(map(jnp.int32, row.lengths))
    every = visible_blocks(jnp.int32(0), p.T, *lengths, p.band, BLOCK)
    start, stop = (every.start, every.stop) if plan.splits == 1 else part_of(every, split, plan.per_split)
    count = registers.uniform(jnp.maximum(stop - start, 0))
    rows = -(-p.T * p.G // 8) * 8
    in_array = pl.ds(0 * program, rows)
    rings = ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free))

    def fetch(number, ring, wait=True):
        ref, smem, full, free = ring

        @pl.when((number < count) & (number >= (stages if wait else 0)))
        def _():
            slot = remainder(number, stages)
            if wait:
                plgpu.barrier_wait(free.at[slot])
            at = (*row.before, b, pl.ds((start + number) * BLOCK, BLOCK), kv_head)
            plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], full.at[slot])

    def leave(ring):
        def run(block):
            *_, free = ring
            plgpu.barrier_arrive(free.at[remainder(block, stages)])
            if MODE == "late":
                fetch(block - 1 + stages, ring)
        return run

    def refill(block):
        if MODE == "mid":
            fetch(block + stages, rings[0])
            fetch(block - 2 + stages, rings[1])
        if MODE == "mid2":
            fetch(block - 1 + stages, rings[0])
            fetch(block - 2 + stages, rings[1])
        if AHEAD:
            @pl.when((block == jnp.maximum(count - stages, 0)) & (program + AT_ONCE < programs))
            def _():
                row = row_of(row_refs, p, next_b)
                lengths = tuple(map(jnp.int32, row.lengths))
                every = visible_blocks(jnp.int32(0), p.T, *lengths, p.band, BLOCK)
                start, stop = part_of(every, next_split, plan.per_split)
                @pl.when((start < stop) & ((start + AHEAD) * BLOCK <= p.S))
                def _():
                    for ref in (k_ref, v_ref):
                        registers.prefetch(ref.at[(*row.before, next_b, pl.ds(start * BLOCK, AHEAD * BLOCK), next_head)])

    if ZEROS:
        plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head, pl.ds(0 * program, ROWS)], q_smem.at[0], q_full)
    else:
        plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head, in_array], q_smem.at[0, pl.ds(0, rows)], q_full)
    for number in range(stages):
        for ring in rings:
            fetch(jnp.int32(number), ring, wait=False)

    def put(acc, statistics, at):
        out_smem[...] = acc.astype(out_smem.dtype)
        for i, x in enumerate(statistics):
            statistics_smem[i] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_refs[0].at[(*at, in_array)])
        for i, ref in enumerate(out_refs[1:]):
            plgpu.copy_smem_to_gmem(statistics_smem.at[i, pl.ds(0, ref.shape[-1])], ref.at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def run():
        first_max = None
        if ZEROS:
            first_max = jnp.where(registers.row_iota() < p.T * p.G, jnp.full((ROWS,), -1e30), jnp.full((ROWS,), 1e30))
        offset = registers.uniform(-start)
        blocks = registers.uniform_range(dataclasses.replace(every, start=start, stop=stop), offset)
        return sum_of_blocks(
            place=jnp.int32(0), q_smem=q_smem, q_free=q_free, k_smem=k_smem, v_smem=v_smem, barriers=(k_full, k_free, v_full, v_free), plan=plan, offset=offset,
            first_query=0, lengths=lengths, blocks=blocks, total=None, problem=p, group=p.G, leave=(*map(leave, rings), refill), first_max=first_max, real_rows=p.T * p.G if HALF else ROWS,
        )  # fmt: skip

    plgpu.barrier_wait(q_full)
    if plan.splits == 1:
        acc, running_max, row_sum = lax.fori_loop(jnp.int32(0), jnp.minimum(count, 1), lambda *_: run(), nothing_yet(p))
        queries = quotient(registers.row_iota(), p.G)
        factor, empty, nothing, lse = finish(running_max, row_sum, queries, lengths, row.overflowed)
        acc = jnp.where(over_columns(empty, p.Hv), jnp.full(acc.shape, nothing), acc * over_columns(factor, p.Hv))
        put(acc, (lse,), (b, kv_head))
    else:

        @pl.when(count > 0)
        def _():
            acc, running_max, row_sum = run()
            put(acc, (row_sum, running_max), (b, kv_head, split))


def decode(query, key, value, rows: Rows, problem: Problem, plan: Plan):
    """As `forward.forward`: the output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p = problem
    real = p.T * p.G
    query = query.reshape(p.B, p.T, p.K, p.G, p.H).swapaxes(1, 2).reshape(p.B, p.K, real, p.H)
    splits = () if plan.splits == 1 else (plan.splits,)
    out = jax.ShapeDtypeStruct((p.B, p.K, *splits, real, p.Hv), jnp.float32 if splits else query.dtype)
    padded = -(-real // 4) * 4
    statistics = [jax.ShapeDtypeStruct((p.B, p.K, *splits, padded), jnp.float32)] * (2 if splits else 1)
    found = launch(
        functools.partial(_kernel, problem=p, plan=plan),
        *(query, key, value, *rows.arrays),
        name="flashcore_decode",
        programs=p.B * p.K * plan.splits,
        warpgroups=1,
        out_type=(out, *statistics),
        scratch=[
            plgpu.RefUnion(shared((1, ROWS, p.H), p.dtype), plgpu.SMEM((len(statistics), ROWS), jnp.float32), plgpu.SMEM((registers.THREADS + 4,), jnp.int32)),
            plgpu.RefUnion(shared((plan.stages, BLOCK, p.H), p.dtype), shared((ROWS, p.Hv), out.dtype)),
            shared((plan.stages, BLOCK, p.Hv), p.dtype),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=1),
            *[plgpu.Barrier(num_barriers=plan.stages)] * 4,
        ],
    )
    if splits:
        return merge(found, rows, p, BLOCK, plan.per_split, plan.splits)
    out, lse = found
    out = out.reshape(p.B, p.K, p.T, p.G, p.Hv).swapaxes(1, 2).reshape(p.B, p.T, p.N, p.Hv)
    return out, lse[:, :, :real].reshape(p.B, p.K, p.T, p.G).swapaxes(2, 3).reshape(p.B, p.N, p.T)
