"""Attention backward on Hopper: two kernels, no atomics, as kernels/triton/backward.py.

`dkdv` holds 128 keys of a key/value head, 64 to each of two warpgroups, and walks over the queries of every head of the group;
`dq` holds 192 queries of a head, 64 to each of three, and walks over the keys. One more warpgroup fetches. Scores of `dkdv` stand
transposed, so that probabilities and their gradients are left operands as they lie in registers.

Of head dim 256 `dq` holds 128 queries and `dkdv` 64 keys, whose two sums do not fit one warpgroup's registers: the first computes the
probabilities and sums up dvalue, the second receives them through shared memory, computes ds and sums up dkey.

What lies beyond a row's lengths, and the cotangents of queries that see no key, may be NaN. As rows of a tile they spoil their own sums,
which are 0 in the end; where products add them up, they become 0 in shared memory.

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
from flashcore_jax.kernels.mosaic_gpu.registers import as_tile
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS, Schedule, blocks_of, schedule_of
from flashcore_jax.logits import scores_of, times_slope
from flashcore_jax.masks import Band, BlockRange, quotient, remainder, seeing
from flashcore_jax.online_softmax import LOG2_E
from flashcore_jax.problem import Problem
from flashcore_jax.rows import Rows, row_of, told
from flashcore_jax.tuning.gpus import Gpu


@dataclasses.dataclass(frozen=True)
class _Plan:
    computing: int  # warpgroups
    registers: int  # of a computing thread
    fetching: int  # of a fetching one
    stages: int
    value_stages: int | None = None  # where there is no room for as many
    sharing: int = 1  # warpgroups that compute a tile together: one, or one for dvalue and one for dkey
    addresses_stay: bool = False  # registers hold those of a tile's own rows; else they are computed anew for each block

    @property
    def tiles(self) -> int:
        return self.computing // self.sharing


_DKDV = {64: _Plan(2, 240, 24, 4, addresses_stay=True), 128: _Plan(2, 240, 24, 4), 256: _Plan(2, 240, 24, 2, sharing=2)}
_DQ = {64: _Plan(3, 160, 32, 4, addresses_stay=True), 128: _Plan(3, 160, 32, 2), 256: _Plan(2, 240, 24, 2, value_stages=1)}


def unsupported(problem: Problem) -> str | None:
    p = problem
    takes = p.dtype in ("float16", "bfloat16") and ({p.H, p.Hv} <= {64, 128} or p.H == p.Hv == 256)
    return None if takes else "16-bit inputs of head dims 64, 128 and 256 only"


def _may_see_no_key(problem: Problem) -> bool:
    """Whether there may be queries that see none, as those beyond a length."""
    p = problem
    return p.query_lengths or p.key_lengths or (p.band.right is not None and p.T - p.S > p.band.right)


def _lengths_of(row_refs, problem: Problem, b):
    """Valid queries and keys of row b, which cost no registers where they are known."""
    return tuple(x if isinstance(x, int) else registers.uniform(x) for x in row_of(row_refs, problem, b).lengths)


def _range_of(first, size: int, lengths: tuple[int, int], band: Band, inside: BlockRange | None = None) -> BlockRange:
    return registers.uniform_range(blocks_of(first, size, tuple(map(jnp.int32, lengths)), band, inside))


def _walk(blocks: BlockRange, visit, carry, ends_in_a_block: bool, band: Band):
    """Over the blocks in order; a loop with masks stands only where there can be something to mask."""
    unmasked_start, unmasked_stop = blocks.start, blocks.stop
    if band.left is not None:
        unmasked_start = jnp.clip(blocks.unmasked_start, blocks.start, blocks.stop)
        carry = lax.fori_loop(blocks.start, unmasked_start, functools.partial(visit, masked=True), carry)
    ends_masked = band.right is not None or ends_in_a_block
    if ends_masked:
        unmasked_stop = jnp.clip(blocks.unmasked_stop, unmasked_start, blocks.stop)
    carry = lax.fori_loop(unmasked_start, unmasked_stop, functools.partial(visit, masked=False), carry)
    return lax.fori_loop(unmasked_stop, blocks.stop, functools.partial(visit, masked=True), carry) if ends_masked else carry


def _probabilities(products, lse, seen, problem: Problem):
    """(probabilities, scores) of a block in float32; lse in log2 units, spread over it."""
    scores, log2_scale = scores_of(products, problem.scale, problem.logits_soft_cap, registers.tanh)
    probabilities = registers.scaled_exp2(scores, lse, log2_scale)
    if seen is not None:
        probabilities = jnp.where(seen(), probabilities, jnp.zeros_like(probabilities))
    return probabilities, scores


def _ds_of(products, dprobabilities, lse, delta, seen, problem: Problem):
    """(p, ds) of a block, in the inputs' dtype, of two products in flight. lse in log2 units and delta are spread over the block."""
    p = problem
    probabilities, scores = _probabilities(registers.finished(products, wait_n=1), lse, seen, p)
    ds = times_slope(probabilities * (registers.finished(dprobabilities, wait_n=0) - delta), scores, p.logits_soft_cap)
    return probabilities.astype(p.dtype), ds.astype(p.dtype)


def _of_query(smem):
    """A number per query, for each of a block's keys, which stand in its rows."""
    return lax.broadcast_in_dim(plgpu.load(smem, layout=registers.COLUMN, optimized=False), (ROWS, BLOCK), (1,))


def _added(acc, left, right):
    """acc + left @ right"""

    def add(acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, left, right)
        return plgpu.wgmma_accumulator_load(acc_ref, wait_n=0)

    return pl.run_scoped(add, plgpu.ACC(acc.shape, jnp.float32))


def _zeros(size: int):
    return as_tile(jnp.zeros((ROWS, size), jnp.float32))


def _dkdv_kernel(table_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, problem, schedule, plan):
    p, stages = problem, plan.stages
    row_refs, (dk_ref, dv_ref, *scratch) = refs[: sum(told(p))], refs[sum(told(p)) :]
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, *handed_on, own_full, own_free, full, free = scratch
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    band = p.band.transposed

    @pl.when(warpgroup == plan.computing)
    def _():
        plgpu.set_max_registers(plan.fetching, action="decrease")

        def fetch_tile(turn, fetched):
            b, kv_head, first_key, keys = schedule.tile(table_ref, program, turn)
            blocks = _range_of(first_key, keys, _lengths_of(row_refs, p, b)[::-1], band)

            def fetch(head, block, fetched):
                slot = remainder(fetched, stages)

                @pl.when(fetched >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                rows = pl.ds(block * BLOCK, BLOCK)
                for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, head], smem.at[slot], full.at[slot])
                for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, head, rows], smem.at[slot], full.at[slot])
                return fetched + 1

            def fetch_head(g, fetched):
                start = jnp.where(g == 0, ahead, blocks.start)
                return lax.fori_loop(start, blocks.stop, functools.partial(fetch, kv_head * p.G + g), fetched)

            # There is room for these before the last tile is done.
            ahead = jnp.minimum(blocks.start + stages, blocks.stop)
            fetched = lax.fori_loop(blocks.start, ahead, functools.partial(fetch, kv_head * p.G), fetched)
            for i in range(plan.tiles):

                @pl.when(turn > 0)
                def _(i=i):
                    plgpu.barrier_wait(own_free.at[i])

                rows = pl.ds(schedule.part(first_key, keys, i), ROWS)
                for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, kv_head], smem.at[i], own_full.at[i])
            return lax.fori_loop(jnp.int32(0), jnp.int32(p.G), fetch_head, fetched)

        schedule.for_turns(table_ref, program, fetch_tile)

    def for_tiles(own, visit, *sums):
        """Computes a tile's sums, `visit(a block's number, its place, whether a key is seen, the sums so far)`, and writes each one:
        (where it may lie in shared memory: an operand that no other warpgroup reads, where it belongs, its factor)."""
        plgpu.set_max_registers(plan.registers, action="increase")

        def compute_tile(turn, fetched):
            fetched = registers.uniform(fetched)
            b, kv_head, first_key, size = schedule.tile(table_ref, program, turn)
            queries, keys = _lengths_of(row_refs, p, b)
            everyone = _range_of(first_key, size, (keys, queries), band)
            first_key = schedule.part(first_key, size, own)
            blocks = _range_of(first_key, ROWS, (keys, queries), band, everyone) if plan.tiles > 1 else everyone
            count = everyone.stop - everyone.start

            def number_of(g, block):
                return fetched + g * count + (block - everyone.start)

            def skip(g, block, _):
                slot = remainder(number_of(g, block), stages)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])

            def visit_block(g, block, so_far, masked):
                number = number_of(g, block)
                slot = remainder(number, stages)
                seen = functools.partial(registers.seen, (ROWS, BLOCK), first_key, block * BLOCK, (keys, queries), band) if masked else None
                plgpu.barrier_wait(full.at[slot])
                if masked and _may_see_no_key(p):
                    registers.clear((q_smem.at[slot], do_smem.at[slot]), block * BLOCK, seeing(queries, keys, p.band))
                so_far = visit(number, slot, seen, *so_far)
                plgpu.barrier_arrive(free.at[slot])
                return so_far

            def visit_head(g, so_far):
                lax.fori_loop(everyone.start, blocks.start, functools.partial(skip, g), None)
                so_far = _walk(blocks, functools.partial(visit_block, g), so_far, p.query_lengths or p.T % BLOCK != 0, band)
                lax.fori_loop(blocks.stop, everyone.stop, functools.partial(skip, g), None)
                return so_far

            plgpu.barrier_wait(own_full.at[own])
            zeros = tuple(_zeros(smem.shape[-1]) for smem, *_ in sums)
            results = lax.fori_loop(jnp.int32(0), jnp.int32(p.G), visit_head, zeros)
            for (smem, ref, factor), x in zip(sums, results, strict=True):
                x = registers.only((0, keys), first_key, x * factor) if p.key_lengths else x * factor
                smem.at[own][...] = x.astype(p.dtype)
                plgpu.commit_smem()

                @pl.when(first_key < schedule.rows)
                def _(smem=smem, ref=ref):
                    plgpu.copy_smem_to_gmem(smem.at[own], ref.at[b, pl.ds(first_key, ROWS), kv_head])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[own])
            return fetched + p.G * count

        schedule.for_turns(table_ref, program, compute_tile)

    stays = registers.uniform(warpgroup)

    def add_both(_, slot, seen, dk, dv):
        own = stays if plan.addresses_stay else registers.uniform(warpgroup)
        lse, delta = _of_query(lse_smem.at[slot]), _of_query(delta_smem.at[slot])

        products = registers.inner_products(k_smem.at[own], q_smem.at[slot])
        dprobabilities = registers.inner_products(v_smem.at[own], do_smem.at[slot])
        probabilities, ds = _ds_of(products, dprobabilities, lse, delta, seen, p)

        def add(dk_acc, dv_acc):
            dv_acc[...] = dv
            dk_acc[...] = dk
            plgpu.wgmma(dv_acc, probabilities, do_smem.at[slot])
            plgpu.wgmma(dk_acc, ds, q_smem.at[slot])
            new_dv = plgpu.wgmma_accumulator_load(dv_acc, wait_n=0)
            return plgpu.wgmma_accumulator_load(dk_acc, wait_n=0), new_dv

        return pl.run_scoped(add, plgpu.ACC(dk.shape, jnp.float32), plgpu.ACC(dv.shape, jnp.float32))

    if plan.sharing == 1:

        @pl.when(warpgroup < plan.computing)
        def _():
            for_tiles(warpgroup, add_both, (k_smem, dk_ref, p.scale), (v_smem, dv_ref, 1.0))

        return

    p_smem, p_full, p_free = handed_on
    places = p_smem.shape[0]

    def add_dvalue(number, slot, seen, dv):
        lse, place = _of_query(lse_smem.at[slot]), remainder(number, places)
        products = registers.finished(registers.inner_products(k_smem.at[0], q_smem.at[slot]), wait_n=0)
        probabilities, scores = _probabilities(products, lse, seen, p)

        @pl.when(number >= places)
        def _():
            plgpu.barrier_wait(p_free.at[place])

        registers.park(p_smem.at[place], times_slope(probabilities, scores, p.logits_soft_cap))
        plgpu.barrier_arrive(p_full.at[place])
        return (_added(dv, probabilities.astype(p.dtype), do_smem.at[slot]),)

    def add_dkey(number, slot, _, dk):
        delta, place = _of_query(delta_smem.at[slot]), remainder(number, places)
        dp = registers.finished(registers.inner_products(v_smem.at[0], do_smem.at[slot]), wait_n=0)
        plgpu.barrier_wait(p_full.at[place])
        ds = registers.times_parked(p_smem.at[place], dp - delta)
        plgpu.barrier_arrive(p_free.at[place])
        return (_added(dk, ds.astype(p.dtype), q_smem.at[slot]),)

    for number, visit, the_sum in ((0, add_dvalue, (k_smem, dv_ref, 1.0)), (1, add_dkey, (v_smem, dk_ref, p.scale))):

        @pl.when(warpgroup == number)
        def _(visit=visit, the_sum=the_sum):
            for_tiles(0, visit, the_sum)


def _dq_kernel(table_ref, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs, problem, schedule, plan):
    p = problem
    row_refs, (dq_ref, *scratch) = refs[: sum(told(p))], refs[sum(told(p)) :]
    q_smem, do_smem, lse_smem, delta_smem, k_smem, v_smem, own_full, own_free, k_full, k_free, v_full, v_free = scratch
    rings = ((k_ref, k_smem, k_full, k_free, plan.stages), (v_ref, v_smem, v_full, v_free, plan.value_stages or plan.stages))
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

    def part_of(first, queries, w):
        """`schedule.part`, but no further beyond than the vectors are padded."""
        return jnp.where(w * ROWS < queries, first + w * ROWS, schedule.rows)

    @pl.when(warpgroup == plan.computing)
    def _():
        plgpu.set_max_registers(plan.fetching, action="decrease")

        def fetch_tile(turn, fetched):
            b, n, first_query, queries = schedule.tile(table_ref, program, turn)
            blocks = _range_of(first_query, queries, _lengths_of(row_refs, p, b), p.band)

            def fetch(block, fetched):
                at = (b, pl.ds(block * BLOCK, BLOCK), quotient(n, p.G))
                for ref, smem, full, free, stages in rings:
                    slot = remainder(fetched, stages)

                    @pl.when(fetched >= stages)
                    def _(free=free, slot=slot):
                        plgpu.barrier_wait(free.at[slot])

                    plgpu.copy_gmem_to_smem(ref.at[at], smem.at[slot], full.at[slot])
                return fetched + 1

            # As above.
            ahead = jnp.minimum(blocks.start + min(stages for *_, stages in rings), blocks.stop)
            fetched = lax.fori_loop(blocks.start, ahead, fetch, fetched)
            for w in range(plan.computing):

                @pl.when(turn > 0)
                def _(w=w):
                    plgpu.barrier_wait(own_free.at[w])

                rows = pl.ds(part_of(first_query, queries, w), ROWS)
                for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[w], own_full.at[w])
                for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
                    plgpu.copy_gmem_to_smem(ref.at[b, n, rows], smem.at[w], own_full.at[w])
            return lax.fori_loop(ahead, blocks.stop, fetch, fetched)

        schedule.for_turns(table_ref, program, fetch_tile)

    @pl.when(warpgroup < plan.computing)
    def _():
        plgpu.set_max_registers(plan.registers, action="increase")
        q = q_smem.at[warpgroup]

        def compute_tile(turn, fetched):
            fetched = registers.uniform(fetched)
            b, n, first_query, queries = schedule.tile(table_ref, program, turn)
            lengths = _lengths_of(row_refs, p, b)
            everyone = _range_of(first_query, queries, lengths, p.band)
            first_query = part_of(first_query, queries, warpgroup)
            blocks = _range_of(first_query, ROWS, lengths, p.band, everyone)

            def slots_of(block):
                return [remainder(fetched + (block - everyone.start), stages) for *_, stages in rings]

            def skip(block, _):
                for (_, _, full, free, _), slot in zip(rings, slots_of(block), strict=True):
                    plgpu.barrier_wait(full.at[slot])
                    plgpu.barrier_arrive(free.at[slot])

            plgpu.barrier_wait(own_full.at[warpgroup])
            of_row = [plgpu.load(x.at[warpgroup], layout=registers.ROW, optimized=False) for x in (lse_smem, delta_smem)]

            stays = registers.uniform(warpgroup)

            def visit(block, dq, masked):
                of_key, of_value = slots_of(block)
                plgpu.barrier_wait(k_full.at[of_key])
                plgpu.barrier_wait(v_full.at[of_value])
                if masked and p.key_lengths:
                    registers.clear((k_smem.at[of_key], v_smem.at[of_value]), block * BLOCK, (0, lengths[1]))
                lse, delta = (registers.over_columns(x, BLOCK) for x in of_row)
                seen = functools.partial(registers.seen, (ROWS, BLOCK), first_query, block * BLOCK, lengths, p.band) if masked else None

                own = stays if plan.addresses_stay else registers.uniform(warpgroup)
                products = registers.inner_products(q_smem.at[own], k_smem.at[of_key])
                dprobabilities = registers.inner_products(do_smem.at[own], v_smem.at[of_value])
                _, ds = _ds_of(products, dprobabilities, lse, delta, seen, p)
                plgpu.barrier_arrive(v_free.at[of_value])

                dq = _added(dq, ds, k_smem.at[of_key])
                plgpu.barrier_arrive(k_free.at[of_key])
                return dq

            lax.fori_loop(everyone.start, blocks.start, skip, None)
            dq = _walk(blocks, visit, _zeros(p.H), p.key_lengths or p.S % BLOCK != 0, p.band)
            lax.fori_loop(blocks.stop, everyone.stop, skip, None)
            dq = dq * p.scale
            if _may_see_no_key(p):
                dq = registers.only(seeing(*lengths, p.band), first_query, dq)
            q[...] = dq.astype(p.dtype)
            plgpu.commit_smem()

            @pl.when(first_query < schedule.rows)
            def _():
                plgpu.copy_smem_to_gmem(q, dq_ref.at[b, pl.ds(first_query, ROWS), n])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(own_free.at[warpgroup])
            return fetched + (everyone.stop - everyone.start)

        schedule.for_turns(table_ref, program, compute_tile)


def backward(query, key, value, rows: Rows, out, lse, dout, dlse, problem: Problem, gpu: Gpu):
    """The gradients of query, key and value. lse and dlse float32[B, N, T]."""
    p = problem
    delta = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2) - dlse
    if _may_see_no_key(p):
        delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    # Vectors are copied without regard to where an array ends, and dq's go one part further (`part_of`).
    beyond = ((0, 0), (0, 0), (0, -p.T % ROWS + ROWS))
    operands = (query, key, value, dout, jnp.pad(lse * LOG2_E, beyond), jnp.pad(delta, beyond), *rows.arrays)

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
    lengths = rows.lengths(p)
    schedule = schedule_of(transposed, plan.tiles, gpu.multiprocessors, lengths[::-1] if p.key_lengths else None)
    handed_on = [plgpu.SMEM((2, ROWS * BLOCK), jnp.float32), *[plgpu.Barrier(num_barriers=2)] * 2] if plan.sharing > 1 else []
    dk, dv = run(
        *(_dkdv_kernel, "flashcore_dkdv", plan, schedule, (key, value)),
        [
            *(shared((count, ROWS, size), p.dtype) for count in (plan.tiles, plan.stages) for size in (p.H, p.Hv)),
            *[plgpu.SMEM((plan.stages, ROWS), jnp.float32)] * 2,
            *handed_on,
            plgpu.Barrier(num_arrivals=2, num_barriers=plan.tiles),
            plgpu.Barrier(num_arrivals=plan.sharing, num_barriers=plan.tiles),
            plgpu.Barrier(num_arrivals=4, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=plan.computing, num_barriers=plan.stages),
        ],
    )
    plan = _DQ[wide]
    schedule = schedule_of(p, plan.computing, gpu.multiprocessors, lengths if p.query_lengths else None)
    rings = [(plan.stages, p.H), (plan.value_stages or plan.stages, p.Hv)]
    (dq,) = run(
        *(_dq_kernel, "flashcore_dq", plan, schedule, (query,)),
        [
            *(shared((plan.computing, ROWS, size), p.dtype) for size in (p.H, p.Hv)),
            *[plgpu.SMEM((plan.computing, ROWS), jnp.float32)] * 2,
            *(shared((stages, BLOCK, size), p.dtype) for stages, size in rings),
            plgpu.Barrier(num_arrivals=4, num_barriers=plan.computing),
            plgpu.Barrier(num_barriers=plan.computing),
            *(plgpu.Barrier(num_arrivals=n, num_barriers=stages) for stages, _ in rings for n in (1, plan.computing)),
        ],
    )
    return dq, dk, dv
