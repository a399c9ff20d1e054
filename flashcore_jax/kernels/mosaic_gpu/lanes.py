"""What a lane holds of a warpgroup's tile, and instructions on its numbers: where `registers` and `fragments` meet.

A lane holds two rows of a warp's sixteen, and of each row two neighbouring columns out of every eight, a pair. The four lanes of a quad
hold a row together. The steps of a row's softmax stand here once, so that whatever a kernel adds up has the same bits.
"""

import struct

import jax.experimental.mosaic.gpu as mgpu
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

QUAD = (1, 2)  # the lanes' bits that hold a row's columns


def highest_of(scores):
    """The largest of a row's pairs of scores, those of the four lanes that hold it, in each of them."""
    highest = tree(maximum, [x for pair in scores for x in pair])
    for lanes in QUAD:
        highest = maximum(highest, mgpu.utils.shfl_bfly(highest, lanes))
    return highest


def weights_of(scores, running_max, log2_scale: float) -> list:
    """2^(score * log2_scale - running_max) of a row's pairs of scores."""
    shift, instructions = asm("neg.f32 $0, $1;", running_max), f"fma.rn.f32 x, $1, {literal(log2_scale)}, $2; ex2.approx.ftz.f32 $0, x;"
    return [[asm(instructions, x, shift) for x in pair] for pair in scores]


def sum_of(p):
    """Of a row's pairs, those of one lane, in the order of `online_softmax`."""
    return tree(add, [add(*pair) for pair in p])


def factor(old_max, new_max):
    """What rescales a sum whose maximum has grown: a power of two, below 2^-126 0."""
    return asm("sub.f32 x, $1, $2; ex2.approx.ftz.f32 $0, x;", old_max, new_max)


def by_row(tile):
    """A thread's numbers of a tile: of each of its two rows a list of pairs of neighbours, in the columns' order."""
    return [[[_element(register, i) for i in (0, 1)] for register in tile.registers.flat[order]] for order in row_order(tile)]


def from_rows(tile, rows) -> list:
    """The inverse of `by_row`: registers in the order of tile.registers."""
    registers = [None] * tile.registers.size
    pair_type = ir.VectorType.get((2,), ir.F32Type.get())
    for order, pairs in zip(row_order(tile), rows, strict=True):
        for at, pair in zip(order, pairs, strict=True):
            registers[at] = vector.from_elements(pair_type, pair)
    return registers


def row_order(tile):
    """For each of the two rows the positions of its registers, in the columns' order: one axis counts rows, another columns."""
    found, expected = ([size for size in shape if size != 1] for shape in (tile.registers.shape, (tile.shape[1] // 8, 2)))
    if found != expected:
        raise NotImplementedError(f"registers of shape {tile.registers.shape} for a tile {tile.shape}: a layout this was not written for")
    return np.arange(tile.registers.size).reshape(-1, 2).T


def numbers_of(row) -> list:
    return [_element(register, 0) for register in row.registers.flat]


def _element(register, i: int):
    return vector.extract(register, [], [i]) if isinstance(register.type, ir.VectorType) else register


def like(array, registers):
    """An array laid out as `array`, of these registers or numbers."""
    kinds = [register.type for register in array.registers.flat]
    registers = [
        vector.from_elements(kind, [x]) if isinstance(kind, ir.VectorType) and not isinstance(x.type, ir.VectorType) else x
        for kind, x in zip(kinds, registers, strict=True)
    ]
    made = np.empty(len(registers), dtype=object)
    made[:] = registers
    return mgpu.FragmentedArray(_registers=made.reshape(array.registers.shape), _layout=array.layout, _is_signed=None)


def tree(operation, numbers: list):
    """Over all numbers, neighbours first."""
    while len(numbers) > 1:
        numbers = [operation(a, b) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    return numbers[0]


def instruction(instruction: str, *registers):
    """PTX without a result, which may use 32-bit registers, and stays where it is."""
    llvm.inline_asm(ir.Type.parse("!llvm.void"), list(registers), instruction, ",".join(["r"] * len(registers)), has_side_effects=True)


def maximum(a, b):
    return asm("max.f32 $0, $1, $2;", a, b)


def add(a, b):
    return asm("add.f32 $0, $1, $2;", a, b)


def asm(instructions: str, *numbers):
    """PTX on float32 numbers: $0 is the result, $1 ... the arguments, x a register."""
    constraints = ",".join(["=f", *["f"] * len(numbers)])
    return llvm.inline_asm(ir.F32Type.get(), list(numbers), f"{{ .reg .f32 x; {instructions} }}", constraints)


def literal(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex()
