"""Bytes that compiled code moves, read from its HLO.

XLA's own count is not to be had for a GPU that is not there, and counts the matmuls
that it gives to a library as nothing.
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

# Names for what is somewhere already, or the first half of what is done later.
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

    Every kernel reads its operands and writes its results, once each: what is fused
    moves nothing in between, and nothing stays in a cache from one kernel to the next.
    Of an operand that a kernel only slices or gathers from, what is taken counts; of
    one that it updates in place, twice the update. Loops count as often as XLA knows
    that they run, else once; of a conditional's branches the one that moves most.

    Args:
      text: `compiled.as_text()`.
    """
    computations, entry = _parse(text)
    return _of_computation(computations, entry)


def _of_computation(computations: dict, name: str) -> int:
    body = computations[name]
    sizes = {i.name: i.num_bytes for i in body}
    return sum(_of_instruction(computations, i, sizes) for i in body)


def _of_instruction(computations: dict, i: Instruction, sizes: dict[str, int]) -> int:
    if i.op in _FREE:
        return 0
    called = [name for name in _CALLED.findall(i.rest) if name in computations]
    if i.op == "while":
        trips = _TRIPS.search(i.rest)
        body = re.search(r"body=%?([\w.\-]+)", i.rest)
        times = int(trips[1]) if trips else 1
        return times * _of_computation(computations, body[1]) if body else 0
    if i.op == "conditional":
        branches = _BRANCHES.search(i.rest)
        names = (
            [n.strip().lstrip("%") for n in branches[1].split(",")]
            if branches
            else called
        )
        return max((_of_computation(computations, n) for n in names), default=0)
    if i.op == "call" and called:
        return _of_computation(computations, called[0])
    if i.op == "fusion" and called:
        return _of_fusion(computations[called[0]], i, sizes)
    reads = [sizes.get(name, 0) for name in i.operands]
    if i.op in _SLICES:
        return 2 * i.num_bytes + sum(reads[1:])
    if i.op == "dynamic-update-slice":
        return 2 * (reads[1] if len(reads) > 1 else 0)
    return i.num_bytes + sum(reads)


def _of_fusion(inside: list[Instruction], fusion: Instruction, sizes: dict) -> int:
    parameters = {
        int(i.rest.partition(")")[0]): i.name for i in inside if i.op == "parameter"
    }
    read = 0
    for index, operand in enumerate(fusion.operands):
        users = [i for i in inside if parameters.get(index) in i.operands]
        if users and all(
            i.op in _SLICES and i.operands[0] == parameters[index] for i in users
        ):
            read += sum(i.num_bytes for i in users)
        elif not (users and all(_is_updated(i, parameters[index]) for i in users)):
            read += sizes.get(operand, 0)
    inner = {i.name: i for i in inside}
    root = next((i for i in inside if i.is_root), None)
    while root is not None and root.op == "bitcast":
        root = inner.get(root.operands[0])
    if root is not None and root.op == "dynamic-update-slice":
        update = inner.get(root.operands[1])
        return read + 2 * (update.num_bytes if update else 0)
    return read + fusion.num_bytes


def _is_updated(i: Instruction, name: str) -> bool:
    return i.op == "dynamic-update-slice" and i.operands[0] == name


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
    """Returns what stands between the parentheses that the text begins within."""
    depth = 1
    for place, char in enumerate(rest):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return rest[:place]
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
