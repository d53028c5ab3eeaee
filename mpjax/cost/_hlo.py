"""Bytes that compiled code moves, read from its HLO.

XLA's own count is unavailable for a GPU you don't have, and counts a matmul that runs
in a library as nothing.
"""

import math
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [\w\-]+\()|\S+) ([\w\-]+)\((.*)$"
)
_ARRAY = re.compile(r"\b(pred|[a-z]\d\w*|bf16|c64|c128)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')
_BITS = re.compile(r"\d+")

# Operations that move nothing: new names for existing memory, and the first half of
# asynchronous operations.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "copy-start",
        "all-reduce-start",
        "all-gather-start",
        "async-start",
        "async-update",
        "fusion-done",
        "collective-permute-start",
        "opt-barrier",
    ]
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    num_bytes: int
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


def moved_bytes(text: str) -> int:
    """Returns the bytes that a compiled module reads and writes.

    Every kernel reads its operands and writes its results, once each: inside a fusion
    nothing moves, and nothing stays in a cache from one kernel to the next. If a kernel
    only slices an operand or gathers from it, the bytes taken count; if it updates an
    operand in place, the bytes written count. A loop counts times its trip count if XLA
    knows it, else once; a conditional counts the branch that moves most.

    Args:
      text: `compiled.as_text()`.
    """
    computations, entry = _parse(text)
    return _computation_bytes(computations, entry)


def _computation_bytes(computations: dict, name: str) -> int:
    body = computations[name]
    sizes = {i.name: i.num_bytes for i in body}
    return sum(_instruction_bytes(computations, i, sizes) for i in body)


def _instruction_bytes(
    computations: dict, i: Instruction, sizes: dict[str, int]
) -> int:
    if i.op in _FREE:
        return 0
    called = [name for name in _CALLED.findall(i.rest) if name in computations]
    if i.op == "while":
        trips = _TRIPS.search(i.rest)
        body = re.search(r"body=%?([\w.\-]+)", i.rest)
        times = int(trips[1]) if trips else 1
        return times * _computation_bytes(computations, body[1]) if body else 0
    if i.op == "conditional":
        branches = _BRANCHES.search(i.rest)
        names = (
            [n.strip().lstrip("%") for n in branches[1].split(",")]
            if branches
            else called
        )
        return max((_computation_bytes(computations, n) for n in names), default=0)
    if i.op == "call" and called:
        return _computation_bytes(computations, called[0])
    if i.op in ("fusion", "fusion-start") and called:
        return _fusion_bytes(computations[called[0]], i, sizes)
    reads = [sizes.get(name, 0) for name in i.operands]
    if i.op in _SLICES:
        return 2 * i.num_bytes + sum(reads[1:])
    if i.op == "dynamic-update-slice":
        return 2 * (reads[1] if len(reads) > 1 else 0)
    return i.num_bytes + sum(reads)


def _fusion_bytes(inside: list[Instruction], fusion: Instruction, sizes: dict) -> int:
    inner = {i.name: i for i in inside}

    def source(name: str) -> str:
        """Returns the name of the array behind a view."""
        while name in inner and inner[name].op == "bitcast":
            name = inner[name].operands[0]
        return name

    readers: dict[str, list[tuple[Instruction, int]]] = {}
    for i in inside:
        for index, name in enumerate(i.operands if i.op != "bitcast" else ()):
            readers.setdefault(source(name), []).append((i, index))
    moved = 0
    for i in inside:
        if i.op == "parameter":
            operand = fusion.operands[int(i.rest.partition(")")[0])]
            moved += _bytes_read(readers.get(i.name, []), sizes.get(operand, 0))
    root = next(i for i in inside if i.is_root)
    for name in root.operands if root.op == "tuple" else (root.name,):
        result = inner[source(name)]
        if result.op == "dynamic-update-slice":
            result = inner[source(result.operands[1])]
        moved += result.num_bytes
    return moved


def _bytes_read(readers: list[tuple[Instruction, int]], num_bytes: int) -> int:
    """Returns how many of an array's `num_bytes` a kernel's instructions read."""
    parts = 0
    for i, index in readers:
        if index == 0 and i.op in _SLICES:
            parts += i.num_bytes
        elif index != 0 or i.op != "dynamic-update-slice":
            return num_bytes
    return parts


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found and body is not None:
            root, name, shape, op, rest = found.groups()
            operands = tuple(_NAME.findall(_arguments(rest)))
            body.append(
                Instruction(name, _num_bytes(shape), op, operands, rest, bool(root))
            )
        elif line.rstrip().endswith("{") and "->" in line:
            is_entry = line.startswith("ENTRY ")
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            body = computations.setdefault(name, [])
            entry = name if is_entry else entry
    return computations, entry


def _arguments(rest: str) -> str:
    """Returns the text up to the parenthesis that closes the one already open."""
    depth = 1
    for index, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return rest[:index]
    return rest


def _num_bytes(shape: str) -> int:
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        size = math.prod(int(d) for d in dims.split(",") if d)
        total += size * _bits(dtype) // 8
    return total


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = _BITS.search(dtype)
    return int(digits[0]) if digits else 0
