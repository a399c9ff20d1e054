"""Decode on Hopper of a few rows, where a program for every split leaves most of the GPU idle: clusters of programs share a split.

Each program of a cluster computes the scores of a part of the split's keys. When all know all maxima it turns them into weights, which it
writes to the shared memory of all others; and then each adds up its own columns of value. So the chain of a split's blocks, which nothing
can shorten while its additions keep their order, is one of small products alone. The additions are those of kernels/triton/decode.py,
to the bit.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023); clusters that share a split are this package's (docs/tuning.md).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax.kernels.mosaic_gpu import fragments, registers
from flashcore_jax.kernels.mosaic_gpu.forward import finish
from flashcore_jax.kernels.mosaic_gpu.launch import launch, shared
from flashcore_jax.kernels.mosaic_gpu.registers import as_row, as_tile, over_columns
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS
from flashcore_jax.kernels.mosaic_gpu.splits import number_of
from flashcore_jax.kernels.triton.decode import merge
from flashcore_jax.kernels.triton.forward import part_of
from flashcore_jax.logits import log2_scale_of, scores_of
from flashcore_jax.masks import quotient, remainder, visible_blocks
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of, told
from flashcore_jax.tuning.gpus import Gpu

_GROUP = 4  # blocks of values that are fetched together: the copy engine takes 256 rows at a time
_SHORTEST = 1024  # keys
_MULTIPLE = 16  # blocks of a split: four maxima for each lane of a quad
_NARROWEST = 16  # columns of value: a program's
_MOST_STAGES = 8
_SHARED = 228 * 1024  # bytes of a multiprocessor's memory, 1 KiB of each program's for the driver
_BARRIERS = 2048  # bytes for them, and for alignment


@dataclasses.dataclass(frozen=True)
class Plan:
    computing: int  # warpgroups; one more fetches
    programs: int  # of a cluster
    per_split: int  # key blocks of a split
    splits: int
    rows: int  # real ones
    columns: int  # of value, a program's
    stages: int  # places in shared memory, for a block of keys or a group of values
    at_once: int  # programs that a multiprocessor must hold

    @property
    def blocks(self) -> int:
        """Whose scores a program computes."""
        return self.per_split // self.programs


def plan_for(problem: Problem, gpu: Gpu) -> Plan | None:
    """How a call is shared out, or None where it is not for this kernel."""
    p = problem
    rows = p.T * p.G
    if p.split_size is None or rows > fragments.REAL_ROWS or p.S < _SHORTEST or p.S % 8:  # the copy engine takes 8 keys at a time
        return None
    splits, blocks = pl.cdiv(p.S, p.split_size), pl.cdiv(min(p.split_size, p.S), BLOCK)
    # All clusters at once, or not at all. A cluster lies within a part of the GPU, of 16 or 18 multiprocessors: an H100 of 132 holds 15
    # clusters of 8 programs and 30 of 4 where a program fills a multiprocessor, twice as many where it fills half of one.
    for programs, at_once, computing in ((8, 1, 4), (4, 1, 4), (4, 2, 1)):
        per_split = pl.cdiv(blocks, _MULTIPLE) * _MULTIPLE
        columns = p.Hv // programs
        if (splits > 1 and per_split != blocks) or columns < _NARROWEST:
            continue
        if p.B * p.K * splits * programs * 10 > gpu.multiprocessors * at_once * 9:
            continue
        others = (
            ROWS * (p.H * 2 + 8)
            + fragments.REAL_ROWS * columns * 4
            + per_split * (fragments.size_of_weights(rows) + fragments.size_of_scores(rows) // programs) * 4
        )
        others += rows * (per_split + fragments.PAD) * 4 + _BARRIERS
        stages = min((_SHARED // at_once - 1024 - others) // _place(p, columns), _MOST_STAGES)
        if stages >= 2:
            return Plan(computing, programs, per_split, splits, rows, columns, stages, at_once)
    return None


def _place(problem: Problem, columns: int) -> int:
    """The bytes of a stage."""
    return max(BLOCK * problem.H, _GROUP * BLOCK * columns) * 2


def _kernel(q_ref, k_ref, v_ref, *refs, problem: Problem, plan: Plan):
    p, stages = problem, plan.stages
    number_of_outputs = 2 if plan.splits == 1 else 3
    row_refs, refs = refs[: sum(told(p))], refs[sum(told(p)) :]
    out_refs, refs = refs[:number_of_outputs], refs[number_of_outputs:]
    q_smem, (k_smem, v_smem), scores_smem, highest_smem, weights_smem, out_smem, *statistics_smem, q_full, full, free = refs
    program, member, warpgroup = (lax.axis_index(name) for name in ("program", "member", "warpgroup"))
    head, split = quotient(program, plan.splits), remainder(program, plan.splits)
    b, kv_head = quotient(head, p.K), remainder(head, p.K)
    first, own_first = split * plan.per_split, member * plan.blocks
    of_keys, of_values = pl.ds(0, BLOCK), pl.ds(0, _GROUP * BLOCK)  # of a place that has room for either
    before = row_of(row_refs, p).before  # the layer, if there are any

    def fetch_keys(block, slot):
        """A block of the program's own."""
        at = pl.ds((first + own_first + block) * BLOCK, BLOCK)
        plgpu.copy_gmem_to_smem(k_ref.at[(*before, b, at, kv_head)], k_smem.at[slot, of_keys], full.at[slot])

    at_first = min(plan.blocks, stages) if plan.splits == 1 else 0

    @pl.when(warpgroup == plan.computing)
    def _():
        # Before the row's length is known. (What a short row loses by it has not been measured: docs/tuning.md.)
        for block in range(at_first):
            fetch_keys(block, block)

    row = row_of(row_refs, p, b, number_of)
    lengths = tuple(map(jnp.int32, row.lengths))
    start, stop = part_of(visible_blocks(jnp.int32(0), p.T, *lengths, p.band, BLOCK), split, plan.per_split)
    # From here on blocks are counted from the split's first.
    start, stop = start - first, jnp.maximum(stop, start) - first
    own_start, own_stop = (jnp.clip(at - own_first, 0, plan.blocks) for at in (start, stop))
    first_group = quotient(start, _GROUP)
    groups = jnp.where(start < stop, quotient(stop + (_GROUP - 1), _GROUP) - first_group, 0)
    # What a program fetches, in this order: its blocks of keys, then all groups of values.
    fetch_start, fetch_stop = (jnp.int32(0), jnp.int32(plan.blocks)) if plan.splits == 1 else (own_start, own_stop)
    keys = fetch_stop - fetch_start
    both = keys + groups
    # Of arrays as many rows too, though they may have fewer: the copy engine knows where one ends. (As a number jax 0.12 would not take it.)
    real, in_array = pl.ds(0, fragments.REAL_ROWS), pl.ds(0 * member, fragments.REAL_ROWS)

    def leave(number):
        """Frees a place, if it is wanted."""

        @pl.when(number + stages < both)
        def _():
            plgpu.barrier_arrive(free.at[remainder(number, stages)])

    @pl.when(warpgroup == plan.computing)
    def _():
        def fetch(number, _):
            slot = remainder(number, stages)

            @pl.when(number >= stages)
            def _():
                plgpu.barrier_wait(free.at[slot])

            @pl.when(number < keys)
            def _():
                fetch_keys(fetch_start + number, slot)

            @pl.when(number >= keys)
            def _():
                at = pl.ds((first + (first_group + number - keys) * _GROUP) * BLOCK, _GROUP * BLOCK)
                columns = pl.ds(member * plan.columns, plan.columns)
                plgpu.copy_gmem_to_smem(v_ref.at[(*before, b, at, kv_head, columns)], v_smem.at[slot, of_values], full.at[slot])

        plgpu.copy_gmem_to_smem(q_ref.at[b, kv_head, in_array], q_smem.at[real], q_full)
        at_once = jnp.minimum(keys + stages, both)  # the others need a place that values leave, after all have met
        lax.fori_loop(jnp.int32(at_first), at_once, fetch, None)
        fragments.meet()
        fragments.meet()
        lax.fori_loop(at_once, both, fetch, None)

    @pl.when(warpgroup < plan.computing)
    def _():
        plgpu.barrier_wait(q_full)

        def look_at(number, _):
            slot = remainder(number, stages)
            plgpu.barrier_wait(full.at[slot])

            own = fetch_start + number

            @pl.when((remainder(number, plan.computing) == warpgroup) & (own >= own_start) & (own < own_stop))
            def _():
                products = registers.finished(registers.inner_products(q_smem, k_smem.at[slot, of_keys]), wait_n=0)
                scores, log2_scale = scores_of(products, p.scale, p.logits_soft_cap, registers.tanh)
                block = own_first + own
                seen = registers.seen((ROWS, BLOCK), 0, (first + block) * BLOCK, lengths, p.band, p.G)
                scores = jnp.where(seen, scores, -jnp.inf)
                fragments.keep(scores_smem, highest_smem, scores, own, block, log2_scale, plan.rows, plan.programs)

            leave(number)

        lax.fori_loop(jnp.int32(0), keys, look_at, None)
        fragments.meet()
        fragments.weigh(
            scores_smem, highest_smem, weights_smem, warpgroup, plan.computing, member, start, stop,
            log2_scale_of(p.scale, p.logits_soft_cap), p.dtype, plan.rows, plan.programs,
        )  # fmt: skip
        fragments.meet()

        @pl.when(warpgroup > 0)
        def _():
            def skip(number, _):
                plgpu.barrier_wait(full.at[remainder(number, stages)])
                leave(number)

            lax.fori_loop(keys, jnp.maximum(keys, both - stages), skip, None)

        @pl.when(warpgroup == 0)
        def _():
            def add_group(number, sums):
                slot, group = remainder(number, stages), first_group + number - keys
                plgpu.barrier_wait(full.at[slot])
                values = v_smem.at[slot, of_values]
                if p.key_lengths:  # 0 times what lies beyond the length would be NaN, if that is
                    for i in range(_GROUP):
                        block = values.at[pl.ds(i * BLOCK, BLOCK)]
                        registers.clear((block,), (first + group * _GROUP + i) * BLOCK, (0, lengths[1]))
                begin, end = jnp.maximum(start, group * _GROUP), jnp.minimum(stop, (group + 1) * _GROUP)

                def add(count: int, block, sums):
                    of_blocks = pl.ds((block - group * _GROUP) * BLOCK, count * BLOCK)
                    return fragments.add(*sums, weights_smem, values.at[of_blocks], block, p.dtype, plan.rows)

                whole = jnp.where(end - begin == _GROUP, 1, 0)
                sums = lax.fori_loop(jnp.int32(0), whole, lambda _, sums: add(_GROUP, begin, sums), sums)
                sums = lax.fori_loop(begin + whole * _GROUP, end, functools.partial(add, 1), sums)
                leave(number)
                return sums

            no_acc = as_tile(jnp.zeros((ROWS, fragments.columns_of_a_warp(plan.columns)), jnp.float32))
            acc, row_sum = lax.fori_loop(keys, both, add_group, (no_acc, as_row(jnp.zeros((ROWS,), jnp.float32))))
            running_max = fragments.highest(highest_smem, start, stop, plan.rows)
            row_sum = registers.quad_sum(row_sum)
            if plan.splits == 1:
                queries = quotient(remainder(registers.row_iota(), ROWS // 4), p.G)  # of each warp's rows
                factor, empty, nothing, lse = finish(running_max, row_sum, queries, lengths, row.overflowed)
                width = acc.shape[1]
                acc = jnp.where(over_columns(empty, width), jnp.full(acc.shape, nothing), acc * over_columns(factor, width))
                statistics, at = (lse,), (b, kv_head)
            else:
                statistics, at = (row_sum, running_max), (b, kv_head, split)
            fragments.put(out_smem, acc, plan.rows)
            for smem, x in zip(statistics_smem, statistics, strict=True):
                smem[...] = x
            plgpu.commit_smem()
            columns = pl.ds(member * plan.columns, plan.columns)
            plgpu.copy_smem_to_gmem(out_smem, out_refs[0].at[(*at, in_array, columns)])

            @pl.when(member == 0)
            def _():
                for smem, ref in zip(statistics_smem, out_refs[1:], strict=True):
                    plgpu.copy_smem_to_gmem(smem.at[real], ref.at[at])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def decode(query, key, value, rows: Rows, problem: Problem, plan: Plan):
    """As `forward.forward`: the output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p, real = problem, fragments.REAL_ROWS
    query = query.reshape(p.B, p.T, p.K, p.G, p.H).swapaxes(1, 2).reshape(p.B, p.K, plan.rows, p.H)
    place = _place(p, plan.columns) // 2
    splits = () if plan.splits == 1 else (plan.splits,)
    out = jax.ShapeDtypeStruct((p.B, p.K, *splits, plan.rows, p.Hv), jnp.float32 if splits else query.dtype)
    # Vectors are copied without regard to where an array ends.
    statistics = [jax.ShapeDtypeStruct((p.B, p.K, *splits, real), jnp.float32)] * (2 if splits else 1)
    found = launch(
        functools.partial(_kernel, problem=p, plan=plan),
        *(query, key, value, *rows.arrays),
        name="flashcore_decode",
        programs=p.B * p.K * plan.splits,
        cluster=plan.programs,
        warpgroups=plan.computing + 1,
        out_type=(out, *statistics),
        scratch=[
            shared((ROWS, p.H), p.dtype),
            plgpu.RefUnion(*(shared((plan.stages, place // columns, columns), p.dtype) for columns in (p.H, plan.columns))),
            plgpu.SMEM((plan.blocks * fragments.size_of_scores(plan.rows),), jnp.float32),
            plgpu.SMEM((plan.rows, plan.per_split + fragments.PAD), jnp.float32),
            plgpu.SMEM((plan.per_split * fragments.size_of_weights(plan.rows),), jnp.float32),
            plgpu.SMEM((real, plan.columns), out.dtype),
            *[plgpu.SMEM((ROWS,), jnp.float32)] * len(statistics),
            plgpu.Barrier(),
            plgpu.Barrier(num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.computing, num_barriers=plan.stages),
        ],
    )
    if splits:
        return merge(found, rows, p, BLOCK, plan.per_split, plan.splits)
    out, lse = found
    out = out.reshape(p.B, p.K, p.T, p.G, p.Hv).swapaxes(1, 2).reshape(p.B, p.T, p.N, p.Hv)
    return out, lse[:, :, : plan.rows].reshape(p.B, p.K, p.T, p.G).swapaxes(2, 3).reshape(p.B, p.N, p.T)
