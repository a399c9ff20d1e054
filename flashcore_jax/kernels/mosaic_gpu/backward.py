"""Attention backward on Hopper: two kernels, no atomics, as kernels/triton/backward.py, of calls in which every query sees a key.

`dkdv` holds 128 keys of a key/value head, 64 to each of two warpgroups, and walks over the queries of every head of the group;
`dq` holds 192 queries of a head, 64 to each of three, and walks over the keys. One more warpgroup fetches. Scores of `dkdv` stand
transposed, so that probabilities and their gradients are left operands as they lie in registers.

    p = exp2(scores * log2_scale - lse),   ds = p * (dout @ value - delta),   delta = rowsum(dout * out) - dlse
    dvalue = p^T @ dout,   dkey = scale * ds^T @ query,   dquery = scale * ds @ key

Source: Dao, "FlashAttention-2" (2023), algorithm 2, in two passes.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax.kernels.mosaic_gpu import registers
from flashcore_jax.kernels.mosaic_gpu.launch import launch, shared
from flashcore_jax.kernels.mosaic_gpu.registers import ROWS, as_tile
from flashcore_jax.kernels.mosaic_gpu.schedule import Schedule, schedule_of
from flashcore_jax.logits import scores_of, times_slope
from flashcore_jax.masks import BlockRange, quotient, visible_blocks
from flashcore_jax.online_softmax import LOG2_E
from flashcore_jax.problem import Problem
from flashcore_jax.tuning.gpus import Gpu

_BLOCK = 64  # keys or queries that are walked over at a time


@dataclasses.dataclass(frozen=True)
class _Plan:
    computing: int  # warpgroups
    registers: int  # of a computing thread
    fetching: int  # of a fetching one
    stages: int


_DKDV = {64: _Plan(2, 240, 24, 4), 128: _Plan(2, 240, 24, 3)}
_DQ = {64: _Plan(3, 160, 32, 4), 128: _Plan(3, 160, 32, 2)}


def unsupported(problem: Problem) -> str | None:
    p = problem
    if p.dtype not in ("float16", "bfloat16") or not {p.H, p.Hv} <= set(_DQ):
        return "16-bit inputs of head dims 64 and 128 only"
    if p.query_lengths or p.key_lengths or (p.T > p.S and p.band.right is not None):
        return "queries that see no key are for the Triton kernels"
    return None


def _range_of(first, size: int, own: int, others: int, band, inside: BlockRange | None = None) -> BlockRange:
    blocks = visible_blocks(first, size, jnp.int32(own), jnp.int32(others), band, _BLOCK)
    if inside is None:
        return blocks
    start = jnp.clip(blocks.start, inside.start, inside.stop)
    return dataclasses.replace(blocks, start=start, stop=jnp.clip(blocks.stop, start, inside.stop))


def _walk(blocks: BlockRange, visit, carry, ever_masked: bool):
    if not ever_masked:
        return lax.fori_loop(blocks.start, blocks.stop, functools.partial(visit, masked=False), carry)
    unmasked_start = jnp.clip(blocks.unmasked_start, blocks.start, blocks.stop)
    unmasked_stop = jnp.clip(blocks.unmasked_stop, unmasked_start, blocks.stop)
    carry = lax.fori_loop(blocks.start, unmasked_start, functools.partial(visit, masked=True), carry)
    carry = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), carry)
    return lax.fori_loop(unmasked_stop, blocks.stop, functools.partial(visit, masked=True), carry)


def _ds_of(products, dprobabilities, lse, delta, seen, problem: Problem):
    """(p, ds) of a block, in the inputs' dtype. lse in log2 units and delta are spread over the block."""
    p = problem
    scores, log2_scale = scores_of(products, p.scale, p.logits_soft_cap, registers.tanh)
    probabilities = registers.scaled_exp2(scores, lse, log2_scale)
    if seen is not None:
        probabilities = jnp.where(seen, probabilities, jnp.zeros_like(probabilities))
    ds = times_slope(probabilities * (dprobabilities() - delta), scores, p.logits_soft_cap)
    return probabilities.astype(p.dtype), ds.astype(p.dtype)


def _dkdv_kernel(table_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dk_ref, dv_ref, *scratch, problem, schedule, plan):
    p, stages = problem, plan.stages
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, own_full, own_free, full, free = scratch
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    band, width = p.band.transposed, plan.computing * ROWS
    ever_masked = band.left is not None or band.right is not None or p.S % _BLOCK != 0 or p.T % _BLOCK != 0

    @pl.when(warpgroup == plan.computing)
    def _():
        plgpu.set_max_registers(plan.fetching, action="decrease")

        def fetch_tile(turn, fetched):
            b, kv_head, first_key = schedule.tile(table_ref, program, turn)
            blocks = _range_of(first_key, width, p.S, p.T, band)
            for w in range(plan.computing):

                @pl.when(turn > 0)
                def _(w=w):
                    plgpu.barrier_wait(own_free.at[w])

                keys = pl.ds(first_key + w * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, kv_head], k_smem.at[w], own_full.at[w])
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, kv_head], v_smem.at[w], own_full.at[w])

            def fetch(head, block, fetched):
                slot = lax.rem(fetched, jnp.int32(stages))

                @pl.when(fetched >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                rows = pl.ds(block * _BLOCK, _BLOCK)
                for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, head], smem.at[slot], full.at[slot])
                for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, head, rows], smem.at[slot], full.at[slot])
                return fetched + 1

            def fetch_head(g, fetched):
                return lax.fori_loop(blocks.start, blocks.stop, functools.partial(fetch, kv_head * p.G + g), fetched)

            return lax.fori_loop(jnp.int32(0), jnp.int32(p.G), fetch_head, fetched)

        schedule.for_turns(table_ref, program, fetch_tile)

    @pl.when(warpgroup < plan.computing)
    def _():
        plgpu.set_max_registers(plan.registers, action="increase")
        k, v = k_smem.at[warpgroup], v_smem.at[warpgroup]

        def compute_tile(turn, fetched):
            b, kv_head, first_key = schedule.tile(table_ref, program, turn)
            everyone = _range_of(first_key, width, p.S, p.T, band)
            first_key += warpgroup * ROWS
            blocks = _range_of(first_key, ROWS, p.S, p.T, band, everyone)
            count = everyone.stop - everyone.start

            def skip(g, block, _):
                slot = lax.rem(fetched + g * count + (block - everyone.start), jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])

            def visit(g, block, carry, masked):
                dk, dv = carry
                slot = lax.rem(fetched + g * count + (block - everyone.start), jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                of_query = [plgpu.load(smem.at[slot], layout=registers.COLUMN, optimized=False) for smem in (lse_smem, delta_smem)]
                lse, delta = (lax.broadcast_in_dim(x, (ROWS, _BLOCK), (1,)) for x in of_query)
                seen = None
                if masked:
                    seen = registers.seen((ROWS, _BLOCK), first_key, block * _BLOCK, (p.S, p.T), band)

                def scores(products_ref, dp_ref):
                    plgpu.wgmma(products_ref, k, q_smem.at[slot].T)
                    plgpu.wgmma(dp_ref, v, do_smem.at[slot].T)
                    products = plgpu.wgmma_accumulator_load(products_ref, wait_n=1)
                    return _ds_of(products, lambda: plgpu.wgmma_accumulator_load(dp_ref, wait_n=0), lse, delta, seen, p)

                tile = plgpu.ACC((ROWS, _BLOCK), jnp.float32)
                probabilities, ds = pl.run_scoped(scores, tile, tile)

                def sums(dk_acc, dv_acc):
                    dv_acc[...] = dv
                    dk_acc[...] = dk
                    plgpu.wgmma(dv_acc, probabilities, do_smem.at[slot])
                    plgpu.wgmma(dk_acc, ds, q_smem.at[slot])
                    new_dv = plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)
                    return plgpu.wgmma_accumulator_load(dk_acc, wait_n=0), new_dv

                carry = pl.run_scoped(sums, plgpu.ACC((ROWS, p.H), jnp.float32), plgpu.ACC((ROWS, p.Hv), jnp.float32))
                plgpu.barrier_arrive(free.at[slot])
                return carry

            def visit_head(g, carry):
                lax.fori_loop(everyone.start, blocks.start, functools.partial(skip, g), None)
                carry = _walk(blocks, functools.partial(visit, g), carry, ever_masked)
                lax.fori_loop(blocks.stop, everyone.stop, functools.partial(skip, g), None)
                return carry

            plgpu.barrier_wait(own_full.at[warpgroup])
            zeros = tuple(as_tile(jnp.zeros((ROWS, size), jnp.float32)) for size in (p.H, p.Hv))
            dk, dv = lax.fori_loop(jnp.int32(0), jnp.int32(p.G), visit_head, zeros)
            keys = pl.ds(first_key, ROWS)
            k[...] = (dk * p.scale).astype(p.dtype)
            v[...] = dv.astype(p.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[b, keys, kv_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[b, keys, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[warpgroup])
            return fetched + p.G * count

        schedule.for_turns(table_ref, program, compute_tile)
        plgpu.wait_smem_to_gmem(0)


def _dq_kernel(table_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, *scratch, problem, schedule, plan):
    p, stages = problem, plan.stages
    q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, own_full, own_free, full, free = scratch
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    width = plan.computing * ROWS
    ever_masked = p.band.left is not None or p.band.right is not None or p.S % _BLOCK != 0

    @pl.when(warpgroup == plan.computing)
    def _():
        plgpu.set_max_registers(plan.fetching, action="decrease")

        def fetch_tile(turn, fetched):
            b, n, first_query = schedule.tile(table_ref, program, turn)
            blocks = _range_of(first_query, width, p.T, p.S, p.band)
            for w in range(plan.computing):

                @pl.when(turn > 0)
                def _(w=w):
                    plgpu.barrier_wait(own_free.at[w])

                rows = pl.ds(first_query + w * ROWS, ROWS)
                for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[w], own_full.at[w])
                for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, n, rows], smem.at[w], own_full.at[w])

            def fetch(block, fetched):
                slot = lax.rem(fetched, jnp.int32(stages))

                @pl.when(fetched >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                    at = (b, pl.ds(block * _BLOCK, _BLOCK), quotient(n, p.G))
                    plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], full.at[slot])
                return fetched + 1

            return lax.fori_loop(blocks.start, blocks.stop, fetch, fetched)

        schedule.for_turns(table_ref, program, fetch_tile)

    @pl.when(warpgroup < plan.computing)
    def _():
        plgpu.set_max_registers(plan.registers, action="increase")
        q, do = q_smem.at[warpgroup], do_smem.at[warpgroup]

        def compute_tile(turn, fetched):
            b, n, first_query = schedule.tile(table_ref, program, turn)
            everyone = _range_of(first_query, width, p.T, p.S, p.band)
            first_query += warpgroup * ROWS
            blocks = _range_of(first_query, ROWS, p.T, p.S, p.band, everyone)

            def slot_of(block):
                return lax.rem(fetched + (block - everyone.start), jnp.int32(stages))

            def skip(block, _):
                plgpu.barrier_wait(full.at[slot_of(block)])
                plgpu.barrier_arrive(free.at[slot_of(block)])

            plgpu.barrier_wait(own_full.at[warpgroup])
            of_row = [plgpu.load(x.at[warpgroup], layout=registers.ROW, optimized=False) for x in (lse_smem, delta_smem)]

            def visit(block, dq, masked):
                slot = slot_of(block)
                plgpu.barrier_wait(full.at[slot])
                lse, delta = (registers.over_columns(x, _BLOCK) for x in of_row)
                seen = None
                if masked:
                    seen = registers.seen((ROWS, _BLOCK), first_query, block * _BLOCK, (p.T, p.S), p.band)

                def scores(products_ref, dp_ref):
                    plgpu.wgmma(products_ref, q, k_smem.at[slot].T)
                    plgpu.wgmma(dp_ref, do, v_smem.at[slot].T)
                    products = plgpu.wgmma_accumulator_load(products_ref, wait_n=1)
                    return _ds_of(products, lambda: plgpu.wgmma_accumulator_load(dp_ref, wait_n=0), lse, delta, seen, p)[1]

                tile = plgpu.ACC((ROWS, _BLOCK), jnp.float32)
                ds = pl.run_scoped(scores, tile, tile)

                def add(dq_acc):
                    dq_acc[...] = dq
                    plgpu.wgmma(dq_acc, ds, k_smem.at[slot])
                    return plgpu.wgmma_accumulator_load(dq_acc, wait_n=0)

                dq = pl.run_scoped(add, plgpu.ACC((ROWS, p.H), jnp.float32))
                plgpu.barrier_arrive(free.at[slot])
                return dq

            lax.fori_loop(everyone.start, blocks.start, skip, None)
            dq = _walk(blocks, visit, as_tile(jnp.zeros((ROWS, p.H), jnp.float32)), ever_masked)
            lax.fori_loop(blocks.stop, everyone.stop, skip, None)
            q[...] = (dq * p.scale).astype(p.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[b, pl.ds(first_query, ROWS), n])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[warpgroup])
            return fetched + (everyone.stop - everyone.start)

        schedule.for_turns(table_ref, program, compute_tile)
        plgpu.wait_smem_to_gmem(0)


def backward(query, key, value, out, lse, dout, dlse, problem: Problem, gpu: Gpu):
    """The gradients of query, key and value. lse and dlse float32[B, N, T]."""
    p = problem
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    # Vectors are copied without regard to where an array ends.
    beyond = ((0, 0), (0, 0), (0, -p.T % (_DQ[max(p.H, p.Hv)].computing * ROWS)))
    operands = (query, key, value, dout, jnp.pad(lse * LOG2_E, beyond), jnp.pad(delta, beyond))

    def scratch(own, walked, statistics: int, plan: _Plan, arrivals: tuple[int, int]):
        vectors = [plgpu.SMEM((statistics, ROWS), jnp.float32)] * 2
        tiles = [
            [shared((count, ROWS, size), p.dtype) for size in sizes] for count, sizes in ((plan.computing, own), (plan.stages, walked))
        ]
        of_own, of_walked = (vectors, []) if statistics == plan.computing else ([], vectors)
        barriers = [
            plgpu.Barrier(num_arrivals=arrivals[0], num_barriers=plan.computing), plgpu.Barrier(num_barriers=plan.computing),
            plgpu.Barrier(num_arrivals=arrivals[1], num_barriers=plan.stages), plgpu.Barrier(num_arrivals=plan.computing, num_barriers=plan.stages),
        ]  # fmt: skip
        return [*tiles[0], *of_own, *tiles[1], *of_walked, *barriers]

    def run(kernel, name: str, plan: _Plan, schedule: Schedule, outputs, scratch):
        return launch(
            functools.partial(kernel, problem=p, schedule=schedule, plan=plan),
            *(jnp.asarray(schedule.table), *operands),
            name=name,
            programs=schedule.programs,
            warpgroups=plan.computing + 1,
            out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs),
            scratch=scratch,
        )

    wide = max(p.H, p.Hv)
    plan = _DKDV[wide]
    transposed = dataclasses.replace(p, T=p.S, S=p.T, N=p.K, H=p.Hv, Hv=p.H, band=p.band.transposed)
    schedule = schedule_of(transposed, plan.computing * ROWS, gpu.multiprocessors)
    dk, dv = run(_dkdv_kernel, "flashcore_dkdv", plan, schedule, (key, value), scratch((p.H, p.Hv), (p.H, p.Hv), plan.stages, plan, (2, 4)))
    plan = _DQ[wide]
    schedule = schedule_of(p, plan.computing * ROWS, gpu.multiprocessors)
    (dq,) = run(_dq_kernel, "flashcore_dq", plan, schedule, (query,), scratch((p.H, p.Hv), (p.H, p.Hv), plan.computing, plan, (4, 2)))
    return dq, dk, dv
