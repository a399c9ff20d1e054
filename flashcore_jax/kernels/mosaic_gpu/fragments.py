"""A few rows' scores and weights on their way through shared memory, lane by lane, and with them the steps of `registers.update`.

Of a tile of 64 rows whose first eight are real, a warpgroup's first warp holds all that counts: lane `l` a quarter of the columns of row
`l // 4`. What such a lane has of a block of 64 keys is a fragment: 16 scores, or 16 probabilities, their sum and the factor that
rescales what was summed up before. Fragments lie in shared memory as vectors, those of neighbouring lanes next to each other.
"""

import math

import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from flashcore_jax.kernels.mosaic_gpu import lanes, registers
from flashcore_jax.kernels.mosaic_gpu.registers import ROW, TILE
from flashcore_jax.kernels.mosaic_gpu.schedule import BLOCK, ROWS
from flashcore_jax.online_softmax import LOWEST

REAL_ROWS = 8  # of a tile, at most
PAD = 4  # numbers behind a row's, so that the rows lie in banks of their own
_QUAD, _WARP, _VECTOR = 4, 32, 4
_DEPTH = 16  # of a product
_SCORES = BLOCK // _QUAD  # of a fragment
_WORDS = _SCORES // 2  # that its probabilities fill, two to a word; behind them the sum and the factor
_NUMBER = plgpu.Layout.WG_SPLAT


def size_of_scores(rows: int) -> int:
    """How many numbers the scores of a block are, for so many real rows."""
    return rows * _QUAD * _SCORES


def size_of_weights(rows: int) -> int:
    """The same of its weights."""
    return rows * _QUAD * (_WORDS + 2)


def meet():
    """Waits for all threads of all programs of a cluster. What they have written before, to each other's memory too, is there then."""

    @plgpu.inline_mgpu()
    def run(_):
        lanes.instruction("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;")

    run()


def keep(scores_ref, highest_ref, scores, own, block, log2_scale: float, rows: int, programs: int):
    """Keeps the scores of a program's `own`-th block, and tells all programs of the cluster their `online_softmax.highest_of`.

    scores_ref: float32[own blocks * size_of_scores(rows)]; highest_ref: float32[rows, blocks + PAD]; scores: float32[64, 64].
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), TILE, _NUMBER, _NUMBER))
    def run(_, scores_ref, highest_ref, scores, own, block):
        pairs = lanes.by_row(scores)[0]
        of_row, highest = [x for pair in pairs for x in pair], lanes.highest_of(pairs)
        highest = lanes.asm(f"mul.f32 x, $1, {lanes.literal(log2_scale)}; cvt.rpi.f32.f32 $0, x;", highest)
        own, block, thread = own.registers.item(), block.registers.item(), _thread()
        at = _at(highest_ref.type.shape, arith.divui(thread, _i32(_QUAD)), block)
        with mgpu.utils.when(_below(thread, rows * _QUAD)):
            first = _element(mgpu.utils.memref_ptr(scores_ref), arith.muli(own, _i32(size_of_scores(rows))))
            for address, i in zip(_vectors(first, thread, rows, _SCORES), range(0, _SCORES, _VECTOR), strict=True):
                _store(of_row[i : i + _VECTOR], address)
            # The lanes of a row's quad tell a quarter of the programs each.
            quad = arith.remui(thread, _i32(_QUAD))
            for program in range(0, programs, _QUAD):
                of_program = mgpu.utils.get_cluster_ptr(mgpu.utils.memref_ptr(highest_ref), arith.addi(quad, _i32(program)))
                llvm.store(highest, _element(of_program, at))

    run(scores_ref, highest_ref, scores, own, block)


def weigh(scores_ref, highest_ref, weights_ref, warpgroup, warpgroups: int, member, start, stop, log2_scale: float, dtype, rows: int, programs: int):  # fmt: skip
    """Makes weights of all scores that a program has kept, of blocks in [start, stop), and writes them to the memory of every program of
    the cluster. Each warp takes one block in turn, or a part of its programs. weights_ref: float32[blocks * size_of_weights(rows)]."""
    blocks = highest_ref.shape[1] - PAD
    own_blocks = blocks // programs

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3 + (_NUMBER,) * 4)
    def run(_, scores_ref, highest_ref, weights_ref, *numbers):
        warpgroup, member, start, stop = (x.registers.item() for x in numbers)
        element_type = mgpu.dialect_lowering.utils.dtype_to_ir_type(jnp.dtype(dtype))
        lane, warps = arith.remui(_thread(), _i32(_WARP)), warpgroups * registers.THREADS // _WARP
        # Warps without a block of their own take one over from others for some of the programs.
        shares = math.gcd(max(warps // own_blocks, 1), programs)
        warp = arith.addi(arith.muli(warpgroup, _i32(registers.THREADS // _WARP)), arith.divui(_thread(), _i32(_WARP)))
        row, quad = arith.divui(lane, _i32(_QUAD)), arith.remui(lane, _i32(_QUAD))
        is_real = _below(lane, rows * _QUAD)
        for first in range(0, own_blocks * shares, warps):
            job = arith.addi(warp, _i32(first))
            own, share = arith.remui(job, _i32(own_blocks)), arith.divui(job, _i32(own_blocks))
            block = arith.addi(arith.muli(member, _i32(own_blocks)), own)
            there = arith.andi(_below(job, own_blocks * shares), arith.andi(_below(block, stop), _at_least(block, start)))
            with mgpu.utils.when(there):
                of_row = arith.minui(row, _i32(rows - 1))
                before = _highest(highest_ref, of_row, quad, start, block)
                own_highest = _element(mgpu.utils.memref_ptr(highest_ref), _at(highest_ref.type.shape, of_row, block))
                running_max = lanes.maximum(before, llvm.load(ir.F32Type.get(), own_highest))
                with mgpu.utils.when(is_real):
                    kept = _element(mgpu.utils.memref_ptr(scores_ref), arith.muli(own, _i32(size_of_scores(rows))))
                    scores = [x for address in _vectors(kept, lane, rows, _SCORES) for x in _load(address)]
                    p = lanes.weights_of(list(zip(scores[::2], scores[1::2], strict=True)), running_max, log2_scale)
                    row_sum, rescale = lanes.sum_of(p), lanes.factor(before, running_max)
                    rounded = arith.truncf(ir.VectorType.get((_SCORES,), element_type), _vector([x for pair in p for x in pair]))
                    words = _numbers(vector.bitcast(ir.VectorType.get((_WORDS,), ir.F32Type.get()), rounded))
                    at = arith.muli(block, _i32(size_of_weights(rows)))
                    for i in range(0, programs, shares):
                        program = arith.addi(share, _i32(i))
                        of_program = _element(mgpu.utils.get_cluster_ptr(mgpu.utils.memref_ptr(weights_ref), program), at)
                        *vectors, statistics = _vectors(of_program, lane, rows, _WORDS + 2)
                        for i, address in enumerate(vectors):
                            _store(words[_VECTOR * i : _VECTOR * (i + 1)], address)
                        _store([row_sum, rescale], statistics)

    run(scores_ref, highest_ref, weights_ref, warpgroup, member, start, stop)


def add(acc, row_sum, weights_ref, values_ref, first, dtype, rows: int):
    """Adds the blocks from `first` on, of which `weigh` has left the weights: what `registers.update` and the product do, of real rows.

    acc: float32[64, columns of a warp]: each warp has the real rows, of columns of its own (`columns_of_a_warp`). row_sum: float32[64],
    the same in all of them. values_ref: [blocks * 64, columns] in shared memory. The products are those of warps (mma.sync), which wait
    for nobody.
    """
    columns, width = values_ref.shape[1], acc.shape[1]
    tile, row = (plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=layout) for x, layout in ((acc, TILE), (row_sum, ROW)))
    blocks = values_ref.shape[0] // BLOCK

    @plgpu.inline_mgpu(arg_types=(TILE, ROW, plgpu.RefType(), registers.shared_tile(columns), _NUMBER), return_type=(tile, row))
    def run(_, acc, row_sum, weights_ref, values_ref, first):
        value_at = _value_address(values_ref, columns, width)

        def operands(i: int):
            *vectors, statistics = _weights(weights_ref, arith.addi(first.registers.item(), _i32(i)), rows)
            # An instruction loads four matrices of 8 x 8: of 32 keys, or of 16 keys and 16 columns.
            keys = range(i * BLOCK, (i + 1) * BLOCK, 4 * 8 * 8 // width)
            values = [x for key in keys for x in _load_transposed(value_at, key * columns * 2)]
            words = [llvm.bitcast(ir.IntegerType.get_signless(32), x) for address in vectors for x in _load(address)]
            return words, values, _load(statistics, 2)

        sums, row_sums = lanes.by_row(acc)[0], lanes.numbers_of(row_sum)
        words, values, (added, rescale) = operands(0)
        for i in range(blocks):
            # The next block's operands are loaded before this one's products, which are a chain, are waited for.
            following = operands(i + 1) if i + 1 < blocks else None
            sums = [[arith.mulf(x, rescale) for x in pair] for pair in sums]
            row_sums = [arith.addf(arith.mulf(x, rescale), added) for x in row_sums]
            for step in range(BLOCK // _DEPTH):
                for n in range(len(sums)):
                    at = 2 * (step * len(sums) + n)
                    sums[n] = _product(words[2 * step : 2 * step + 2], values[at : at + 2], sums[n], jnp.dtype(dtype))
            if following:
                words, values, (added, rescale) = following
        return lanes.like(acc, lanes.from_rows(acc, (sums, lanes.by_row(acc)[1]))), lanes.like(row_sum, row_sums)

    return run(acc, row_sum, weights_ref, values_ref, first)


def columns_of_a_warp(columns: int) -> int:
    """How many of a tile's columns a warp computes. Eight is the least: of 16 columns two warps compute what the other two do."""
    return max(columns * _WARP // registers.THREADS, 8)


def put(ref, acc, rows: int):
    """Writes what `add` has summed up, in the dtype of ref [8, columns] in shared memory."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), TILE))
    def run(_, ref, acc):
        element_type, (_, columns) = ref.type.element_type, ref.type.shape
        lane, width = arith.remui(_thread(), _i32(_WARP)), acc.shape[1]
        first = arith.addi(_first_column(columns, width), arith.muli(arith.remui(lane, _i32(_QUAD)), _i32(2)))
        first = arith.addi(arith.muli(arith.divui(lane, _i32(_QUAD)), _i32(columns)), first)
        with mgpu.utils.when(_below(lane, rows * _QUAD)):
            for n, pair in enumerate(lanes.by_row(acc)[0]):
                address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [arith.addi(first, _i32(8 * n))], element_type)
                pair = _vector(pair)
                llvm.store(pair if element_type == ir.F32Type.get() else arith.truncf(ir.VectorType.get((2,), element_type), pair), address)

    run(ref, acc)


def _first_column(columns: int, width: int):
    """Of those of a warp."""
    warp = arith.divui(_thread(), _i32(_WARP))
    return arith.muli(arith.remui(warp, _i32(columns // width)), _i32(width))


def _value_address(values_ref, columns: int, width: int):
    """The address that a lane names when its warp loads its columns' values: that of eight numbers of a key."""
    lane, keys = arith.remui(_thread(), _i32(_WARP)), 4 * 8 * 8 // width
    key, half = arith.remui(lane, _i32(keys)), arith.divui(lane, _i32(keys))
    column = arith.addi(_first_column(columns, width), arith.muli(half, _i32(8)))
    offset = arith.muli(arith.addi(arith.muli(key, _i32(columns)), column), _i32(2))
    # The swizzle: the number of a row of 128 bytes is mixed into that of its 16 bytes.
    mixed = arith.shli(arith.andi(arith.shrui(offset, _i32(7)), _i32(columns // 8 - 1)), _i32(4))
    return arith.addi(llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu.utils.memref_ptr(values_ref)), arith.xori(offset, mixed))


def _load_transposed(address, offset: int) -> list:
    """Four matrices of 8 keys and 8 columns, those of the keys first, each a word of a lane: two keys of a column."""
    i32 = ir.IntegerType.get_signless(32)
    found = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4), [arith.addi(address, _i32(offset))],
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(i32, found, [i]) for i in range(4)]


def _product(left, right, sums, dtype) -> list:
    """sums + left @ right, of 8 rows, a depth of 16 and 8 columns: a lane's numbers of each."""
    f32, zero = ir.F32Type.get(), _i32(0)
    kind = {"bfloat16": "bf16", "float16": "f16"}[dtype.name]
    nothing = mgpu.c(0.0, f32)
    found = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4), [left[0], zero, left[1], zero, *right, *sums, nothing, nothing],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{$0, $1, $2, $3}}, {{$4, $5, $6, $7}}, {{$8, $9}}, {{$10, $11, $12, $13}};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
    )  # fmt: skip
    return [llvm.extractvalue(f32, found, [i]) for i in range(2)]


def highest(highest_ref, start, stop, rows: int):
    """The running maximum behind the blocks [start, stop): float32[64], a tile's other rows repeating the real ones."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _NUMBER, _NUMBER), return_type=plgpu.ShapeDtypeStruct((ROWS,), jnp.float32, layout=ROW))
    def run(_, highest_ref, start, stop):
        lane = arith.remui(_thread(), _i32(_WARP))
        of_row, quad = arith.minui(arith.divui(lane, _i32(_QUAD)), _i32(rows - 1)), arith.remui(lane, _i32(_QUAD))
        found = _highest(highest_ref, of_row, quad, start.registers.item(), stop.registers.item())
        return mgpu.FragmentedArray.splat(found, (ROWS,), ROW.to_mgpu())

    return run(highest_ref, start, stop)


def _highest(highest_ref, row, quad, start, stop):
    """The largest number of a row in [start, stop), each lane of a quad having looked at a quarter."""
    found = lowest = mgpu.c(LOWEST, ir.F32Type.get())
    of_lane = (highest_ref.type.shape[1] - PAD) // _QUAD
    for at in range(0, of_lane, _VECTOR):
        number = arith.addi(arith.muli(quad, _i32(of_lane)), _i32(at))
        for i, x in enumerate(_load(_element(mgpu.utils.memref_ptr(highest_ref), _at(highest_ref.type.shape, row, number)))):
            that = arith.addi(number, _i32(i))
            counts = arith.andi(_at_least(that, start), _below(that, stop))
            found = lanes.maximum(found, arith.select(counts, x, lowest))
    for bit in lanes.QUAD:
        found = lanes.maximum(found, mgpu.utils.shfl_bfly(found, bit))
    return found


def _weights(weights_ref, block, rows: int) -> list:
    """The addresses of a lane's vectors of a block; of one beyond the real rows, those of the last that is real."""
    lane = arith.minui(arith.remui(_thread(), _i32(_WARP)), _i32(rows * _QUAD - 1))
    return _vectors(_element(mgpu.utils.memref_ptr(weights_ref), arith.muli(block, _i32(size_of_weights(rows)))), lane, rows, _WORDS + 2)


def _vectors(first, lane, rows: int, numbers: int) -> list:
    """The addresses of a lane's vectors of a fragment of so many numbers; what is left of four is the last one."""
    sizes = [min(_VECTOR, numbers - i) for i in range(0, numbers, _VECTOR)]
    return [_element(first, arith.addi(arith.muli(lane, _i32(n)), _i32(i * rows * _QUAD * _VECTOR))) for i, n in enumerate(sizes)]


def _at(shape, row, column):
    return arith.addi(arith.muli(row, _i32(shape[1])), column)


def _element(first, number):
    return mgpu.utils.getelementptr(first, [number], ir.F32Type.get())


def _load(address, count: int = _VECTOR) -> list:
    return _numbers(llvm.load(ir.VectorType.get((count,), ir.F32Type.get()), address, alignment=4 * count))


def _store(numbers, address):
    llvm.store(_vector(numbers), address, alignment=4 * len(numbers))


def _vector(numbers):
    return vector.from_elements(ir.VectorType.get((len(numbers),), ir.F32Type.get()), numbers)


def _numbers(x) -> list:
    return [vector.extract(x, [], [i]) for i in range(x.type.shape[0])]


def _thread():
    """A thread's number in its warpgroup."""
    return arith.andi(mgpu.utils.thread_idx(), _i32(registers.THREADS - 1))


def _i32(x: int):
    return mgpu.c(x, ir.IntegerType.get_signless(32))


def _below(x, limit):
    return arith.cmpi(arith.CmpIPredicate.slt, x, _i32(limit) if isinstance(limit, int) else limit)


def _at_least(x, limit):
    return arith.cmpi(arith.CmpIPredicate.sge, x, limit)
