"""What a compiled program copies, read from its optimized HLO."""

import collections
import dataclasses
import math
import re

# These give what another instruction made, or only say when it is there.
_MAKES_NOTHING = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "optimization-barrier"}
# XLA inserts a copy before it where the operand is still needed, and that copy is found.
_IN_PLACE = {"dynamic-update-slice", "scatter"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str
    elements: int  # of its largest array
    text: str
    is_root: bool


def computations(hlo: str) -> dict[str, list[Instruction]]:
    """{computation: its instructions} of a module's text."""
    found, current = {}, []
    for line in hlo.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = found.setdefault(header[1], [])
        elif given := re.match(r"\s+(ROOT )?%?[\w.\-]+ = (.*)", line):
            shape, rest = _split_shape(given[2])
            if opcode := re.match(r"([\w\-]+)\(", rest):
                current.append(Instruction(opcode[1], _largest(shape), rest, given[1] is not None))
    return found


def copies(hlo: str, elements: int) -> dict[str, int]:
    """{opcode: how many} of the instructions that make a new array of at least so many elements. An update in place makes none:
    a custom call that aliases, a slice written into its own operand, or a fusion of nothing else."""
    module = computations(hlo)
    called = {name: _called(i) for body in module.values() for i in body if i.opcode.startswith("fusion") and (name := _called(i))}
    count = collections.Counter()
    for name, body in module.items():
        if name in called:  # the fusion that calls it is one instruction
            continue
        for instruction in body:
            if _makes(instruction, module, elements):
                count[instruction.opcode.removesuffix("-start")] += 1
    return dict(count)


def _makes(instruction: Instruction, module, elements: int) -> bool:
    opcode = instruction.opcode
    if opcode in ("fusion", "fusion-start"):  # an asynchronous one lists its operands among its results: look inside
        body = module[_called(instruction)]
        root_is_large = any(i.is_root and i.elements >= elements for i in body)
        return root_is_large and any(_makes(i, module, elements) for i in body)
    if instruction.elements < elements or opcode in _MAKES_NOTHING | _IN_PLACE:
        return False
    if opcode.endswith(("-done", "-update")) or opcode == "async-start":
        return False
    return not (opcode == "custom-call" and "output_to_operand_aliasing" in instruction.text)


def _called(instruction: Instruction) -> str | None:
    found = re.search(r"calls=%?([\w.\-]+)", instruction.text)
    return found and found[1]


def _split_shape(text: str) -> tuple[str, str]:
    """The shape at the start of an instruction, which may be a tuple of shapes, and the rest."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: at + 1], text[at + 2 :]
    return text, ""


def _largest(shape: str) -> int:
    sizes = (math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\[([\d,]*)\]", shape))
    return max(sizes, default=0)
