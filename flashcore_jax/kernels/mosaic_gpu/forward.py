"""Attention forward on Hopper: warpgroups that compute, one that fetches, programs that stay for one tile after the other.

A program holds 192 queries of a head, 64 to each of three warpgroups (head dim 256: 128, two), or a piece of such a tile; one more
warpgroup brings the keys and values by the copy engine. A warpgroup issues the products of a block of keys and those of the last
block's probabilities together; while it waits for them and computes its softmax, the others keep the tensor cores busy.

The key grid, the splits and every addition are those of kernels/triton/forward.py, in the same order: the bits are the same.
The running total of closed splits, which costs the Triton kernel its registers, rests in memory: shared where there is room.

Source: Shah et al., "FlashAttention-3" (2024), for the overlap of products and softmax; the scheme of splits is this package's.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flashcore_jax import online_softmax
from flashcore_jax.kernels.mosaic_gpu import registers
from flashcore_jax.kernels.mosaic_gpu.launch import launch, shared
from flashcore_jax.kernels.mosaic_gpu.registers import as_row, as_tile, over_columns
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS, Schedule, blocks_of, schedule_of
from flashcore_jax.logits import scores_of, takes_rough_tanh
from flashcore_jax.masks import Band, quotient, remainder
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of, told
from flashcore_jax.tuning.gpus import Gpu

_PIECE = 128  # columns of the output that leave through shared memory together


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a program is made up."""

    computing: int  # warpgroups
    registers: int  # of a computing thread
    fetching: int  # registers of a fetching thread; together what a multiprocessor has, 65,536
    stages: int  # blocks of keys, and of values, in shared memory
    total_in_shared: bool = True
    places: int = 2  # for a tile's queries: the next tile's come early
    addresses_stay: bool = False  # registers hold those of the queries; else they are computed anew for each block


# By the wider head dim.
_PLANS = {
    64: _Plan(3, 160, 32, 4, addresses_stay=True),
    128: _Plan(3, 160, 32, 2),
    256: _Plan(2, 240, 24, 2, total_in_shared=False, places=1),
}


def _plan_for(problem: Problem, closes: bool) -> _Plan:
    p = problem
    wide = max(p.H, p.Hv)
    plan = _PLANS[wide]
    if closes:  # The tiles are long, and the wait for queries is short beside them; nor is there room beside the total.
        plan = dataclasses.replace(plan, places=1)
    if wide == 128 and not _ever_masked(p):  # With masks they spill, and a causal call takes 4 % longer.
        plan = dataclasses.replace(plan, addresses_stay=True)
    return plan


def _ever_masked(problem: Problem) -> bool:
    p = problem
    return p.band != Band() or p.key_lengths or p.S % BLOCK != 0


def unsupported(problem: Problem) -> str | None:
    p = problem
    if p.dtype not in ("float16", "bfloat16"):
        return f"the tensor cores that it drives take 16-bit inputs, not {p.dtype}"
    if not {p.H, p.Hv} <= set(_PLANS):
        return f"its tiles are for head dims {', '.join(map(str, _PLANS))}, not {p.H} and {p.Hv}"
    if not takes_rough_tanh(p.dtype, p.logits_soft_cap):
        return f"its tanh is not exact enough for a soft cap of {p.logits_soft_cap:g}"
    return None


def _kernel(table_ref, q_ref, k_ref, v_ref, *refs, problem: Problem, schedule: Schedule, plan: _Plan, closes: bool):
    p, stages = problem, plan.stages
    row_refs, (out_ref, lse_ref, *refs) = refs[: sum(told(p))], refs[sum(told(p)) :]
    total_ref, *refs = refs if closes and not plan.total_in_shared else (None, *refs)
    q_smem, k_smem, v_smem, out_smem, lse_smem, q_full, q_free, k_full, k_free, v_full, v_free = refs
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    rings = ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free))

    def place_of(turn, warpgroup):
        """Of a warpgroup's queries."""
        return remainder(turn, plan.places) * plan.computing + warpgroup if plan.places > 1 else warpgroup

    @pl.when(warpgroup == plan.computing)
    def _():
        plgpu.set_max_registers(plan.fetching, action="decrease")

        def fetch_tile(turn, fetched):
            b, n, first_query, queries = schedule.tile(table_ref, program, turn)
            row = row_of(row_refs, p, b)
            lengths = tuple(map(jnp.int32, row.lengths))
            blocks = blocks_of(first_query, queries, lengths, p.band)
            kv_head = quotient(n, p.G)

            def fetch(block, fetched, rings=rings):
                slot = remainder(fetched, stages)
                at = (*row.before, b, pl.ds(block * BLOCK, BLOCK), kv_head)
                for ref, smem, full, free in rings:

                    @pl.when(fetched >= stages)
                    def _(free=free):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], full.at[slot])
                return fetched + 1

            def fetch_queries():
                for w in range(plan.computing):
                    place = place_of(turn, w)

                    @pl.when(turn >= plan.places)
                    def _(place=place):
                        plgpu.barrier_wait(q_free.at[place])

                    rows = pl.ds(schedule.part(first_query, queries, w), ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[place], q_full.at[place])

            if plan.places > 1:
                fetch_queries()
                return lax.fori_loop(blocks.start, blocks.stop, fetch, fetched)
            # In the order in which the last tile leaves room: its last block's keys and its queries, then that block's values.
            ahead = jnp.minimum(blocks.start + stages - 1, blocks.stop)
            fetched = lax.fori_loop(blocks.start, ahead, fetch, fetched)
            one_more = jnp.minimum(ahead + 1, blocks.stop)
            lax.fori_loop(ahead, one_more, functools.partial(fetch, rings=rings[:1]), fetched)
            fetch_queries()
            fetched = lax.fori_loop(ahead, one_more, functools.partial(fetch, rings=rings[1:]), fetched)
            return lax.fori_loop(one_more, blocks.stop, fetch, fetched)

        schedule.for_turns(table_ref, program, fetch_tile)

    @pl.when(warpgroup < plan.computing)
    def _():
        plgpu.set_max_registers(plan.registers, action="increase")
        if closes and plan.total_in_shared:
            # The output takes the place of the total, which is twice as large.
            total, out_tile = out_smem[0].at[warpgroup], out_smem[1].at[2 * warpgroup]
        else:
            total, out_tile = total_ref.at[program, warpgroup] if closes else None, out_smem.at[warpgroup]

        def compute_tile(turn, fetched):
            b, n, first_query, queries = schedule.tile(table_ref, program, turn)
            row = row_of(row_refs, p, b)
            lengths = tuple(map(jnp.int32, row.lengths))
            everyone = blocks_of(first_query, queries, lengths, p.band)
            first_query = schedule.part(first_query, queries, warpgroup)
            blocks = blocks_of(first_query, ROWS, lengths, p.band, everyone)
            # From here on blocks are counted so that their number tells their place in shared memory.
            offset = registers.uniform(remainder(fetched + (stages * pl.cdiv(p.S, BLOCK) - everyone.start), stages))
            everyone, blocks = (registers.uniform_range(x, offset) for x in (everyone, blocks))

            def skip(block, _):
                for full, free in ((k_full, k_free), (v_full, v_free)):
                    plgpu.barrier_wait(full.at[remainder(block, stages)])
                    leave(free)(block)

            def leave(free):
                return lambda block: plgpu.barrier_arrive(free.at[remainder(block, stages)])

            def leave_queries():
                plgpu.barrier_arrive(q_free.at[place])

            place = place_of(turn, warpgroup)
            plgpu.barrier_wait(q_full.at[place])
            lax.fori_loop(everyone.start, blocks.start, skip, None)
            run = functools.partial(
                sum_of, q_smem=q_smem, place=place, k_smem=k_smem, v_smem=v_smem, full=(k_full, v_full), leave=(leave_queries, leave(k_free), leave(v_free)),
                first_query=first_query, lengths=lengths, blocks=blocks, offset=offset, total=total, addresses_stay=plan.addresses_stay, problem=p,
            )  # fmt: skip
            any_block = jnp.minimum(blocks.stop - blocks.start, 1)
            acc, running_max, row_sum = lax.fori_loop(jnp.int32(0), any_block, lambda *_: run(), nothing_yet(p))
            lax.fori_loop(blocks.stop, everyone.stop, skip, None)

            pl.when(any_block == 0)(leave_queries)

            queries = first_query + registers.row_iota()
            factor, empty, nothing, lse = finish(running_max, row_sum, queries, lengths, row.overflowed)
            rows, width = pl.ds(first_query, ROWS), min(p.Hv, _PIECE)
            for start in range(0, p.Hv, width):
                # Selected, not multiplied by 0: a product with a poisoned query is NaN.
                out = jnp.where(
                    over_columns(empty, width), jnp.full((ROWS, width), nothing), _columns(acc, start, width) * over_columns(factor, width)
                ).astype(p.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if closes and plan.total_in_shared:
                    plgpu.commit_smem()  # every thread has read the total
                out_tile[...] = out
                if start == 0:
                    lse_smem[warpgroup] = lse
                plgpu.commit_smem()

                @pl.when(first_query < schedule.rows)
                def _(start=start):
                    plgpu.copy_smem_to_gmem(out_tile, out_ref.at[b, rows, n, pl.ds(start, width)])
                    if start == 0:
                        plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref.at[b, n, rows])

            return everyone.stop

        schedule.for_turns(table_ref, program, compute_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def sum_of(
    *, q_smem, place, k_smem, v_smem, full, leave, first_query, lengths, blocks, offset, total, addresses_stay: bool, problem: Problem,
    group: int = 1, real_rows: int = ROWS,
):  # fmt: skip
    """The sum over all blocks, at least one: (acc, running_max, row_sum).

    full: the barriers of keys and of values. leave: what is called when the queries, and a block's keys and its values, are needed no
    longer. offset: what was added to the blocks' numbers, so that they tell a block's place. group: so many rows of the tile are one
    query; of all rows the first real_rows matter.
    """
    p, stages = problem, k_smem.shape[0]
    (k_full, v_full), (leave_queries, leave_keys, leave_values) = full, leave
    dtype = jnp.dtype(p.dtype)
    ever_masked = _ever_masked(p)
    scores_shape, out_shape = (ROWS, BLOCK), (ROWS, p.Hv)

    def slot_of(block):
        return remainder(block, stages)

    def first_key_of(block):
        return (block - offset) * BLOCK

    stays = registers.uniform(place)

    def multiply_keys(block):
        plgpu.barrier_wait(k_full.at[slot_of(block)])
        return registers.inner_products(q_smem.at[stays if addresses_stay else registers.uniform(place)], k_smem.at[slot_of(block)])

    def weigh(scores, block, running_max, row_sum, masked):
        scores, log2_scale = scores_of(scores, p.scale, p.logits_soft_cap, registers.tanh)
        if masked:
            scores = jnp.where(registers.seen(scores_shape, first_query, first_key_of(block), lengths, p.band, group), scores, -jnp.inf)
        return registers.update(scores, running_max, row_sum, log2_scale, dtype, real_rows)

    def wait_for_values(block):
        """Until they are there. Those beyond the row's length become 0: 0 times what lies there would be NaN, if that is."""
        plgpu.barrier_wait(v_full.at[slot_of(block)])
        if p.key_lengths:
            registers.clear((v_smem.at[slot_of(block)],), first_key_of(block), (0, lengths[1]))

    no_acc, lowest, no_sum = nothing_yet(p)
    if total is not None:
        per_split = p.split_size // BLOCK
        splits = quotient(blocks.start - offset, per_split), quotient(blocks.stop - offset + (per_split - 1), per_split)
    scores = registers.finished(multiply_keys(blocks.start), wait_n=0)
    leave_keys(blocks.start)
    probabilities, running_max, row_sum, _ = weigh(scores, blocks.start, lowest, no_sum, ever_masked)

    def multiply(block, acc, before, run):
        """Issues the product of a block's keys, and adds that of the probabilities `before`, of the last block, with its values.
        `run(scores, product)` computes with the former, and calls `product()` for the latter."""

        def scoped(acc_ref):
            wait_for_values(block - 1)
            acc_ref[...] = acc
            scores = multiply_keys(block)
            plgpu.wgmma(acc_ref, before, v_smem.at[slot_of(block - 1)])
            scores = registers.finished(scores, wait_n=1)
            leave_keys(block)

            def product():
                summed = plgpu.wgmma_accumulator_load(acc_ref, wait_n=0)
                registers.in_use(before)
                leave_values(block - 1)
                return summed

            return run(scores, product)

        return pl.run_scoped(scoped, plgpu.ACC(out_shape, jnp.float32))

    def visit(block, carry, masked):
        """Adds the last block's product, and takes this block's scores in."""
        acc, before, running_max, row_sum, *of_total = carry

        def run(scores, product):
            probabilities, new_max, new_sum, rescale = weigh(scores, block, running_max, row_sum, masked)
            return product() * over_columns(rescale, p.Hv), probabilities, new_max, new_sum, *of_total

        return multiply(block, acc, before, run)

    def begin(block, carry):
        """The same for the first block of a split: what was before goes into the total."""
        acc, before, running_max, row_sum, *of_total = carry

        def run(scores, product):
            acc, closed = product(), (running_max, registers.quad_sum(row_sum))
            factors, of_total[:] = _merged(of_total, closed)
            is_first = quotient(block - offset, per_split) == splits[0] + 1

            @pl.when(is_first)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's output, perhaps from the same memory
                registers.park(total, acc)

            @pl.when(jnp.logical_not(is_first))
            def _():
                registers.add_to_parked(total, acc, *factors)

            probabilities, new_max, new_sum, _ = weigh(scores, block, lowest, no_sum, ever_masked)
            return no_acc, probabilities, new_max, new_sum, *of_total

        return multiply(block, acc, before, run)

    def walk(start, stop, carry):
        """The blocks [start, stop) of one split."""
        unmasked_start = start
        if p.band.left is not None:
            unmasked_start = jnp.clip(blocks.unmasked_start, start, jnp.maximum(start, stop))
            carry = lax.fori_loop(start, unmasked_start, functools.partial(visit, masked=True), carry)
        unmasked_stop = jnp.clip(blocks.unmasked_stop, unmasked_start, jnp.maximum(unmasked_start, stop))
        carry = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), carry)
        return lax.fori_loop(unmasked_stop, stop, functools.partial(visit, masked=True), carry) if ever_masked else carry

    carry = no_acc, probabilities, running_max, row_sum
    if total is None:
        carry = walk(blocks.start + 1, blocks.stop, carry)
    else:

        def add_split(split, carry):
            start = registers.uniform(split * per_split + offset)
            return walk(start + 1, jnp.minimum(blocks.stop, start + per_split), begin(start, carry))

        carry = walk(blocks.start + 1, jnp.minimum(blocks.stop, (splits[0] + 1) * per_split + offset), carry)
        carry = lax.fori_loop(splits[0] + 1, splits[1], add_split, (*carry, lowest, no_sum))
    acc, probabilities, running_max, row_sum, *of_total = carry
    leave_queries()

    def last(acc_ref):
        wait_for_values(blocks.stop - 1)
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, probabilities, v_smem.at[slot_of(blocks.stop - 1)])
        return plgpu.wgmma_accumulator_load(acc_ref, wait_n=0)

    acc, row_sum = pl.run_scoped(last, plgpu.ACC(out_shape, jnp.float32)), registers.quad_sum(row_sum)
    leave_values(blocks.stop - 1)
    if total is None:
        return acc, running_max, row_sum
    several = jnp.minimum(splits[1] - splits[0] - 1, 1)
    factors, statistics = _merged(of_total, (running_max, row_sum))
    return lax.fori_loop(jnp.int32(0), several, lambda _, acc: registers.plus_parked(total, acc, *factors), acc), *statistics


def nothing_yet(problem: Problem):
    """`online_softmax.nothing`, laid out over a warpgroup."""
    return (
        as_tile(jnp.zeros((ROWS, problem.Hv), jnp.float32)),
        as_row(jnp.full((ROWS,), online_softmax.LOWEST, jnp.float32)),
        as_row(jnp.zeros((ROWS,), jnp.float32)),
    )


def _merged(of_total, of_closed):
    """What `online_softmax.merge` does but for the accumulators: their two factors, and the running maximum and the row sum."""
    running_max = jnp.maximum(of_total[0], of_closed[0])
    factors = registers.rescale(of_total[0], running_max), registers.rescale(of_closed[0], running_max)
    return factors, (running_max, of_total[1] * factors[0] + of_closed[1] * factors[1])


def _columns(x, start: int, width: int):
    return x if (start, width) == (0, x.shape[1]) else lax.slice(x, (0, start), (ROWS, start + width))


def finish(running_max, row_sum, queries, lengths, overflowed):
    """`kernels.triton.forward.finish`, to be applied to the output's columns: their factor, the rows that are empty, what those
    hold, and the natural log-sum-exp."""
    ones = jnp.ones((ROWS,), jnp.float32)
    empty = (row_sum == 0.0) | (queries >= lengths[0])
    row_sum = jnp.where(empty, ones, row_sum)
    factor, lse = 1.0 / row_sum, jnp.where(empty, -jnp.inf * ones, (running_max + jnp.log2(row_sum)) * online_softmax.LN_2)
    if overflowed is None:
        return factor, empty, jnp.float32(0), lse
    nan = jnp.where(overflowed, jnp.float32(jnp.nan), jnp.float32(0))
    factor, lse = factor + nan, lse + nan
    return factor, empty, nan, lse


def forward(query, key, value, rows: Rows, problem: Problem, gpu: Gpu):
    """The output [B, T, N, Hv] and the natural log-sum-exp float32[B, N, T]."""
    p = problem
    closes = p.split_size is not None and p.S > p.split_size
    plan = _plan_for(p, closes)
    schedule = schedule_of(p, plan.computing, gpu.multiprocessors, rows.lengths(p) if p.query_lengths else None)
    width = min(p.Hv, _PIECE)
    out_tile = shared((plan.computing, ROWS, width), p.dtype)
    # Vectors are copied without regard to where an array ends.
    out_type = [
        jax.ShapeDtypeStruct((p.B, p.T, p.N, p.Hv), query.dtype),
        jax.ShapeDtypeStruct((p.B, p.N, schedule.rows), jnp.float32),
    ]
    if closes and plan.total_in_shared:
        out_tile = plgpu.RefUnion(plgpu.SMEM((plan.computing, ROWS * p.Hv), jnp.float32), shared((2 * plan.computing, ROWS, p.Hv), p.dtype))
    elif closes:
        out_type.append(jax.ShapeDtypeStruct((schedule.programs, plan.computing, ROWS * p.Hv), jnp.float32))

    def barriers(count: int, arrivals: int = 1):
        return plgpu.Barrier(num_arrivals=arrivals, num_barriers=count)

    out, lse, *_ = launch(
        functools.partial(_kernel, problem=p, schedule=schedule, plan=plan, closes=closes),
        *(jnp.asarray(schedule.table), query, key, value, *rows.arrays),
        name="flashcore_forward_closing" if closes else "flashcore_forward",
        programs=schedule.programs,
        warpgroups=plan.computing + 1,
        out_type=tuple(out_type),
        scratch=[
            shared((plan.places * plan.computing, ROWS, p.H), p.dtype),
            *(shared((plan.stages, BLOCK, size), p.dtype) for size in (p.H, p.Hv)),
            out_tile,
            plgpu.SMEM((plan.computing, ROWS), jnp.float32),
            *[barriers(plan.places * plan.computing)] * 2,
            *(barriers(plan.stages), barriers(plan.stages, plan.computing)) * 2,
        ],
    )
    return out, lse[:, :, : p.T]
