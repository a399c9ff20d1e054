"""The online softmax on the registers of a warpgroup: `online_softmax`, instruction by instruction, to the bit.

A warpgroup's tile of 64 rows lies in registers as the tensor core leaves it (`lanes`). What is written out
here is what Mosaic has no operation for: the order of a row's additions (the two bits of the column's number that lie across
a quad come last, once per split), exp2 of a fused multiply-add, a maximum rounded up to an integer.
"""

import functools

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from flashcore_jax.kernels.mosaic_gpu import lanes
from flashcore_jax.kernels.mosaic_gpu.schedule import ROWS
from flashcore_jax.masks import Band, BlockRange, quotient, visible_keys

TILE = plgpu.Layout.WGMMA
ROW, COLUMN = TILE.reduce(1), TILE.reduce(0)
THREADS = 128  # of a warpgroup
_VECTOR = 4  # numbers that a thread reads and writes together


def shared_tile(columns: int):
    """A 16-bit tile in shared memory, as `launch.shared` lays it out."""
    columns = min(columns, 64)
    return plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)))


def as_tile(x):
    return plgpu.layout_cast(x, TILE)


def as_row(x):
    return plgpu.layout_cast(x, ROW)


def over_columns(row, columns: int):
    """A number per row, for each of its columns."""
    return jax.lax.broadcast_in_dim(row, (ROWS, columns), (0,))


def iota(shape, axis: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=TILE)


def row_iota():
    """The number of each row of a tile."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)


def uniform(x):
    """An int32 that is the same in all threads, in a form that tells ptxas so. What is computed from it then costs the threads no
    registers; without it a value that was spilled once is each thread's own, and all that follows from it. Said within a loop, it also
    keeps ptxas from computing ahead of the loop what follows from it: the addresses of all operands that stay, more than fit."""
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=scalar)
    def run(_, x):
        i32 = ir.IntegerType.get_signless(32)
        first = llvm.inline_asm(i32, [x.registers.item()], "shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(first, (), is_signed=True)

    return run(x)


def by_length(lengths_ref, order_ref, place):
    """The row of the batch that comes at this place when those with the most keys come first: each thread compares its row with all.

    lengths_ref: int32[B] in memory, of as many rows as threads at most; order_ref: int32[threads + 1] in shared memory.
    """
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=scalar)
    def run(_, lengths, order, place):
        i32, (batch,) = ir.IntegerType.get_signless(32), lengths.type.shape

        def number(x):
            return mgpu.c(x, i32)

        def at(ref, index):
            return mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [index], i32)

        thread = arith.andi(mgpu.utils.thread_idx(), number(THREADS - 1))
        is_row = arith.cmpi(arith.CmpIPredicate.slt, thread, number(batch))
        own = arith.select(is_row, llvm.load(i32, at(lengths, arith.minui(thread, number(batch - 1)))), number(-(1 << 31)))
        llvm.store(own, at(order, thread))
        mgpu.utils.warpgroup_barrier()
        before = number(0)
        for row in range(0, batch, _VECTOR):
            four = llvm.load(ir.VectorType.get((_VECTOR,), i32), at(order, row), alignment=_VECTOR * 4)
            for i in range(_VECTOR):
                other = vector.extract(four, [], [i])
                longer = arith.cmpi(arith.CmpIPredicate.sgt, other, own)
                # Of rows with as many keys the first comes first.
                as_long = arith.cmpi(arith.CmpIPredicate.eq, other, own)
                comes_before = arith.ori(longer, arith.andi(as_long, arith.cmpi(arith.CmpIPredicate.sgt, thread, number(row + i))))
                before = arith.addi(before, arith.extui(i32, comes_before))
        found = at(order, number(THREADS))
        with mgpu.utils.when(arith.andi(is_row, arith.cmpi(arith.CmpIPredicate.eq, before, place.registers.item()))):
            llvm.store(thread, found)
        mgpu.utils.warpgroup_barrier()
        return mgpu.FragmentedArray.splat(llvm.load(i32, found), (), is_signed=True)

    return run(lengths_ref, order_ref, place)


def uniform_range(blocks: BlockRange, offset=0) -> BlockRange:
    """The same blocks, `uniform`, and counted from another number on."""
    return BlockRange(*(uniform(at + offset) for at in (blocks.start, blocks.unmasked_start, blocks.unmasked_stop, blocks.stop)))


def seen(shape, first_row, first_column, lengths, band: Band, group: int = 1):
    """Whether a tile's row sees its column, of rows below their length: (own length, others' length). A bound per row, and one
    comparison for each number, where `masks.visible` has one for every condition. group: so many of the tile's rows are one."""
    rows = first_row + quotient(row_iota(), group)
    if band.right is None:  # further than any key; a bound that is one number for all rows finds no layout (jax 0.11.2)
        band = Band(band.left, lengths[0])
    first, last = visible_keys(rows, *lengths, band)
    columns = iota(shape, 1)
    inside = columns <= over_columns(last - first_column, shape[1])
    return inside if band.left is None else inside & (columns >= over_columns(first - first_column, shape[1]))


def update(scores, running_max, row_sum, log2_scale: float, dtype, real_rows: int = ROWS):
    """`online_softmax.update` but for the products: (probabilities in `dtype`, running_max, row_sum, rescale).

    scores: float32[64, keys], the other two float32[64]. row_sum is a thread's own: `quad_sum` closes it. Of all rows the first
    real_rows matter: where those are eight, a thread has nothing to do for its second row.
    """
    tile = plgpu.ShapeDtypeStruct(scores.shape, dtype, layout=TILE)
    row = plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW)

    @plgpu.inline_mgpu(arg_types=(TILE, ROW, ROW), return_type=(tile, row, row, row))
    def run(_, scores, running_max, row_sum):
        of_row = lanes.by_row(scores)
        results = [
            _update_row(*arguments, log2_scale) if i * 8 < real_rows else _leave_row(*arguments)
            for i, arguments in enumerate(zip(of_row, lanes.numbers_of(running_max), lanes.numbers_of(row_sum), strict=True))
        ]
        probabilities, *rows = zip(*results, strict=True)
        tile = lanes.like(scores, lanes.from_rows(scores, probabilities)).astype(mgpu.dialect_lowering.utils.dtype_to_ir_type(dtype))
        return tile, *(lanes.like(running_max, numbers) for numbers in rows)

    return run(scores, running_max, row_sum)


def _update_row(scores, running_max, row_sum, log2_scale: float):
    rounded_up = f"mul.f32 x, $1, {lanes.literal(log2_scale)}; cvt.rpi.f32.f32 x, x; max.f32 $0, x, $2;"
    new_max = lanes.asm(rounded_up, lanes.highest_of(scores), running_max)
    rescale = lanes.factor(running_max, new_max)
    p = lanes.weights_of(scores, new_max, log2_scale)
    row_sum = lanes.asm("mul.f32 x, $1, $2; add.f32 $0, x, $3;", row_sum, rescale, lanes.sum_of(p))
    return p, new_max, row_sum, rescale


def _leave_row(scores, running_max, row_sum):
    zero, one = (mgpu.c(x, ir.F32Type.get()) for x in (0.0, 1.0))
    return [(zero, zero)] * len(scores), running_max, row_sum, one


def rescale(old_max, new_max):
    """The factors, float32[64], of sums whose maximum has grown."""

    @plgpu.inline_mgpu(arg_types=(ROW, ROW), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW))
    def run(_, old_max, new_max):
        return lanes.like(old_max, [lanes.factor(*pair) for pair in zip(lanes.numbers_of(old_max), lanes.numbers_of(new_max), strict=True)])

    return run(old_max, new_max)


def quad_sum(row_sum):
    """`online_softmax.close`: the sums that the four threads of a row have kept apart, in each of them."""

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW))
    def run(_, row_sum):
        def close(x):
            return functools.reduce(lambda x, bit: lanes.add(x, mgpu.utils.shfl_bfly(x, bit)), lanes.QUAD, x)

        return lanes.like(row_sum, [close(x) for x in lanes.numbers_of(row_sum)])

    return run(row_sum)


def scaled_exp2(scores, shift, log2_scale: float):
    """As `kernels.triton.launch.scaled_exp2`, of two tiles."""

    @plgpu.inline_mgpu(arg_types=(TILE, TILE), return_type=_tile_like(scores))
    def run(_, scores, shift):
        instructions = f"neg.f32 x, $2; fma.rn.f32 x, $1, {lanes.literal(log2_scale)}, x; ex2.approx.ftz.f32 $0, x;"
        rows = [
            [[lanes.asm(instructions, *numbers) for numbers in zip(*pairs, strict=True)] for pairs in zip(*of_row, strict=True)]
            for of_row in zip(lanes.by_row(scores), lanes.by_row(shift), strict=True)
        ]
        return lanes.like(scores, lanes.from_rows(scores, rows))

    return run(scores, shift)


def tanh(x):
    """As `kernels.triton.launch.tanh_for`, the rough one: 1 - 2 / (2^(2 log2(e) x) + 1)."""

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=_tile_like(x))
    def run(_, x):
        two_log2_e = lanes.literal(2.0 * np.log2(np.e))
        instructions = (
            f"mul.f32 x, $1, {two_log2_e}; ex2.approx.ftz.f32 x, x; add.f32 x, x, {lanes.literal(1.0)}; "
            f"rcp.approx.ftz.f32 x, x; fma.rn.f32 $0, x, {lanes.literal(-2.0)}, {lanes.literal(1.0)};"
        )
        return lanes.like(
            x, lanes.from_rows(x, [[[lanes.asm(instructions, number) for number in pair] for pair in row] for row in lanes.by_row(x)])
        )

    return run(x)


def inner_products(left, right):
    """left @ right.T of two 16-bit tiles in shared memory, float32[64, rows of right], in flight until `finished`: `plgpu.wgmma`, but
    that the first instruction writes where that one adds to zeros, which may cost an instruction each."""
    shape = left.shape[0], right.shape[0]

    @plgpu.inline_mgpu(arg_types=(shared_tile(left.shape[1]),) * 2, return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=TILE))
    def run(_, left, right):
        operations = ir.InsertionPoint.current.block.operations
        before = len(operations)
        acc = mgpu.wgmma(mgpu.WGMMAAccumulator.zero(*shape), left, mgpu.memref_transpose(right, (1, 0, 3, 2)))
        first = next(op for op in list(operations)[before:] if "wgmma.mma_async" in str(op.attributes.get("asm_string", "")))
        with ir.InsertionPoint(first):
            first.operands[shape[1] // 2 + 2] = mgpu.c(0, ir.IntegerType.get_signless(32))  # behind the sums and two addresses
        lanes.instruction("wgmma.commit_group.sync.aligned;")
        return acc.value

    return run(left, right)


def finished(tile, wait_n: int):
    """The tile, when at most so many later products are in flight."""

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=_tile_like(tile))
    def run(_, tile):
        lanes.instruction(f"wgmma.wait_group.sync.aligned {wait_n};")
        return tile

    return run(tile)


def in_use(p):
    """Says that an unfinished product may have been reading p until here. Without it the compiler gives p's registers to what
    comes next, ptxas notices, and makes every product wait for the one before (C7513)."""

    @plgpu.inline_mgpu(arg_types=(TILE,))
    def run(_, p):
        lanes.instruction("", *(llvm.bitcast(ir.IntegerType.get_signless(32), x) for x in p.registers.flat))

    run(p)


def park(ref, tile):
    """Writes a thread's numbers of a tile to memory, float32[64 * columns], in an order that no other thread has to know."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, ref, tile):
        for address, _, numbers in _vectors(ref, tile):
            llvm.store(numbers, address, alignment=_VECTOR * 4)

    run(ref, tile)


def add_to_parked(ref, tile, of_parked, of_tile):
    """What is parked becomes itself times of_parked plus the tile times of_tile, float32[64] both."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE, ROW, ROW))
    def run(_, ref, tile, of_parked, of_tile):
        for address, row, numbers in _vectors(ref, tile):
            llvm.store(_weighted(address, numbers, of_parked, of_tile, row), address, alignment=_VECTOR * 4)

    run(ref, tile, of_parked, of_tile)


def plus_parked(ref, tile, of_parked, of_tile):
    """The same sum, not written back."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE, ROW, ROW), return_type=_tile_like(tile))
    def run(_, ref, tile, of_parked, of_tile):
        return lanes.like(
            tile, _from_vectors(tile, [_weighted(address, x, of_parked, of_tile, row) for address, row, x in _vectors(ref, tile)])
        )

    return run(ref, tile, of_parked, of_tile)


def times_parked(ref, tile):
    """What is parked times the tile."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE), return_type=_tile_like(tile))
    def run(_, ref, tile):
        return lanes.like(tile, _from_vectors(tile, [arith.mulf(_parked(address, x), x) for address, _, x in _vectors(ref, tile)]))

    return run(ref, tile)


def clear(tiles, first_row, live):
    """The rows of a block's tiles in shared memory that are none of `live`, [first, stop), become 0, so that products may add them up."""
    first, stop = (at - first_row for at in live)

    @pl.when((first > 0) | (stop < ROWS))
    def _():
        for tile in tiles:
            clear_rows(tile, first, stop)
        plgpu.commit_smem()


def only(live, first_row, tile):
    """The same of a tile in registers."""
    rows = first_row + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    return jnp.where(over_columns((rows >= live[0]) & (rows < live[1]), tile.shape[1]), tile, jnp.zeros_like(tile))


def clear_rows(ref, first, stop):
    """The rows of a 16-bit tile in shared memory, 64 of them, that are not in [first, stop) become 0. 64 numbers of a row at a time lie
    together, and the swizzle moves them among themselves; two threads write a row."""

    @plgpu.inline_mgpu(arg_types=(shared_tile(ref.shape[1]), plgpu.Layout.WG_SPLAT, plgpu.Layout.WG_SPLAT))
    def run(_, ref, first, stop):
        i32, kind = ir.IntegerType.get_signless(32), ir.MemRefType(ref.type)
        (_, pieces, rows, columns), (strides, _) = kind.shape, kind.get_strides_and_offset()
        # Computed here: ahead of a loop it would cost registers, of which there are none to spare.
        thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        row, half = (arith.andi(x, mgpu.c(n - 1, i32)) for x, n in ((arith.shrui(thread, mgpu.c(1, i32)), ROWS), (thread, 2)))
        place = arith.divui(row, mgpu.c(rows, i32)), arith.remui(row, mgpu.c(rows, i32)), half
        at = mgpu.utils.dyn_dot(place, [mgpu.c(n, i32) for n in (strides[0], strides[2], columns // 2)])
        address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [at], kind.element_type)
        before = arith.cmpi(arith.CmpIPredicate.slt, row, first.registers.item())
        behind = arith.cmpi(arith.CmpIPredicate.sge, row, stop.registers.item())
        with mgpu.utils.when(arith.ori(before, behind)):
            zeros = vector.broadcast(ir.VectorType.get((_VECTOR,), i32), mgpu.c(0, i32))
            for piece in range(pieces):
                for i in range(0, columns // 2, 8):
                    llvm.store(zeros, mgpu.utils.getelementptr(address, [piece * strides[1] + i], kind.element_type), alignment=_VECTOR * 4)

    run(ref, first, stop)


def _tile_like(tile):
    return plgpu.ShapeDtypeStruct(tile.shape, jnp.float32, layout=TILE)


def _vectors(ref, tile):
    """(address, row, numbers) of a thread's tile, four numbers of a row at a time; neighbouring threads have neighbouring addresses."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    thread = arith.andi(mgpu.utils.thread_idx(), mgpu.c(THREADS - 1, i32))
    first = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.muli(thread, mgpu.c(_VECTOR, i32))], f32)
    i = 0
    for row, order in enumerate(lanes.row_order(tile)):
        for a, b in zip(order[::2], order[1::2], strict=True):
            numbers = vector.shuffle(tile.registers.flat[a], tile.registers.flat[b], [0, 1, 2, 3])
            yield mgpu.utils.getelementptr(first, [i * THREADS * _VECTOR], f32), row, numbers
            i += 1


def _from_vectors(tile, vectors) -> list:
    """The registers of a tile from four numbers at a time, in the order of `_vectors`."""
    pairs = [[vector.extract(four, [], [at]), vector.extract(four, [], [at + 1])] for four in vectors for at in (0, 2)]
    return lanes.from_rows(tile, (pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]))


def _parked(address, like):
    return llvm.load(like.type, address, alignment=_VECTOR * 4)


def _weighted(address, numbers, of_parked, of_tile, row: int):
    def spread(factors):
        return vector.broadcast(numbers.type, lanes.numbers_of(factors)[row])

    return arith.addf(arith.mulf(_parked(address, numbers), spread(of_parked)), arith.mulf(numbers, spread(of_tile)))
