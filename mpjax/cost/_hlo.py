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

# Operations that move nothing: new names for existing memory, and what only starts or
# ends an asynchronous operation.
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
        "async-update",
        "fusion-done",
        "opt-barrier",
    ]
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
# Each element of the result depends on one element of each operand that has as many.
_ELEMENTWISE_NAMES = """
bitcast bitcast-convert convert copy reduce-precision reshape reverse transpose
abs add and atan2 cbrt ceil clamp compare complex cosine count-leading-zeros divide erf
exponential exponential-minus-one floor imag is-finite log log-plus-one logistic maximum
minimum multiply negate not or popcnt power real remainder round-nearest-afz
round-nearest-even rsqrt select shift-left shift-right-arithmetic shift-right-logical
sign sine sqrt subtract tan tanh xor
"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())


class Instruction(NamedTuple):
    """One line of HLO; dtype and sizes are those of its result."""

    name: str
    dtype: str
    num_elements: int
    num_bytes: int
    op: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool


def moved_bytes(text: str) -> int:
    """Returns the bytes that a compiled module reads and writes.

    Every kernel reads its operands and writes its results, once each: inside a fusion
    nothing moves, and nothing stays in a cache from one kernel to the next. If a kernel
    only slices an operand or gathers from it, also behind a cast or other elementwise
    operations, what it takes counts; if it updates an operand in place, what it writes
    counts, and for a scatter also what it adds to. A loop counts times its trip count
    if XLA knows it, else once; a conditional counts the branch that moves most.

    Args:
      text: `compiled.as_text()`.
    """
    computations, entry = parse(text)
    return _computation_bytes(computations, entry)


def control_flow(computations: dict, i: Instruction) -> tuple[int, list[str]]:
    """Returns how often an instruction runs other computations, and which.

    Several are the branches of a conditional, one of which runs.
    """
    called = [name for name in _CALLED.findall(i.rest) if name in computations]
    if i.op == "while":
        trips = _TRIPS.search(i.rest)
        body = re.search(r"body=%?([\w.\-]+)", i.rest)
        return int(trips[1]) if trips else 1, [body[1]] if body else []
    if i.op == "conditional":
        branches = _BRANCHES.search(i.rest)
        names = branches[1].split(",") if branches else called
        return 1, [name.strip().lstrip("%") for name in names]
    return 1, called[:1] if i.op in ("call", "async-start") else []


def _computation_bytes(computations: dict, name: str) -> int:
    body = computations[name]
    sizes: dict[str, int] = {}
    for i in body:
        # What ends an asynchronous operation moves its operands and its result.
        is_started = _only_starts(i) or i.op == "async-update"
        reads = sum(sizes.get(name, 0) for name in i.operands)
        sizes[i.name] = reads if is_started else i.num_bytes
    return sum(_instruction_bytes(computations, i, sizes) for i in body)


def _only_starts(i: Instruction) -> bool:
    return i.op.endswith("-start") and i.op != "fusion-start"


def _instruction_bytes(
    computations: dict, i: Instruction, sizes: dict[str, int]
) -> int:
    if i.op in _FREE or _only_starts(i):
        return 0
    times, names = control_flow(computations, i)
    if names:
        return times * max(_computation_bytes(computations, name) for name in names)
    called = [name for name in _CALLED.findall(i.rest) if name in computations]
    if i.op in ("fusion", "fusion-start") and called:
        return _fusion_bytes(computations, called[0], i, sizes)
    reads = [sizes.get(name, 0) for name in i.operands]
    if i.op in _SLICES:
        return i.num_bytes + min(i.num_bytes, reads[0]) + sum(reads[1:])
    written = _written_operand(i)
    if written is not None:
        return _read_in_place(i, reads[written]) + reads[written] + sum(reads[1:])
    return i.num_bytes + sum(reads)


def _fusion_bytes(
    computations: dict, name: str, fusion: Instruction, sizes: dict
) -> int:
    body = computations[name]
    inner = {i.name: i for i in body}
    root = next(i for i in body if i.is_root)
    results = root.operands if root.op == "tuple" else (root.name,)
    moved, in_place = 0, set()
    for result in (_behind_views(inner, name) for name in results):
        written = _written_operand(result)
        if written is not None:
            in_place.add(result.name)
            result = inner[result.operands[written]]
        moved += result.num_bytes
    taken = _elements_taken(computations, body, root.num_elements, in_place)
    for i in body:
        if i.op == "parameter":
            size = sizes.get(fusion.operands[_parameter_number(i)], 0)
            moved += size * taken[i.name] // max(i.num_elements, 1)
    return moved


def _written_operand(i: Instruction) -> int | None:
    """Returns which operand is written into the first one in place; None if none is."""
    if i.op == "dynamic-update-slice":
        return 1
    return 2 if i.op == "scatter" and len(i.operands) == 3 else None


def _read_in_place(i: Instruction, written: int) -> int:
    """Returns how much of its first operand an update reads, if it writes `written`.

    A scatter adds to what is there.
    """
    return written if i.op == "scatter" else 0


def _behind_views(inner: dict[str, Instruction], name: str) -> Instruction:
    """Returns the instruction whose result a chain of bitcasts views."""
    while inner[name].op == "bitcast":
        name = inner[name].operands[0]
    return inner[name]


def _elements_taken(
    computations: dict, body: list[Instruction], of_root: int, in_place: set[str]
) -> dict[str, int]:
    """Returns how many elements of each value in a fusion are taken, by its name.

    Args:
      computations: all of the module's.
      body: the instructions of the fusion, operands before their users.
      of_root: how many elements of its result are taken.
      in_place: names of updates that write into their first operand.
    """
    sizes = {i.name: i.num_elements for i in body}
    taken = dict.fromkeys(sizes, 0)
    for i in reversed(body):
        if i.is_root:
            taken[i.name] = of_root
        wanted = taken[i.name]
        inside = _parameters_taken(computations, i, wanted)
        for index, name in enumerate(i.operands):
            is_first, is_whole = index == 0, sizes[name] == i.num_elements
            more = inside.get(index, sizes[name])
            if (i.op in _SLICES and is_first) or (i.op in _ELEMENTWISE and is_whole):
                more = wanted
            elif i.name in in_place and is_first:
                more = _read_in_place(i, sizes[i.operands[-1]])
            taken[name] = min(taken[name] + more, sizes[name])
    return taken


def _parameters_taken(
    computations: dict, i: Instruction, of_root: int
) -> dict[int, int]:
    """Returns how many elements a call in a fusion takes of each operand it slices."""
    called = [name for name in _CALLED.findall(i.rest) if name in computations]
    if i.op not in ("call", "fusion") or not called:
        return {}
    body = computations[called[0]]
    taken = _elements_taken(computations, body, of_root, set())
    return {_parameter_number(x): taken[x.name] for x in body if x.op == "parameter"}


def _parameter_number(parameter: Instruction) -> int:
    return int(parameter.rest.partition(")")[0])


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations of a compiled module by name, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, body = "", None
    for line in text.splitlines():
        found = _INSTRUCTION.match(line)
        if found and body is not None:
            root, name, shape, op, rest = found.groups()
            operands = tuple(_NAME.findall(_arguments(rest)))
            body.append(
                Instruction(name, *_sizes(shape), op, operands, rest, bool(root))
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


def _sizes(shape: str) -> tuple[str, int, int]:
    """Returns dtype, elements and bytes; of a tuple the first dtype, and the sums."""
    arrays = _ARRAY.findall(shape)
    num_elements = num_bytes = 0
    for dtype, dims in arrays:
        size = math.prod(int(d) for d in dims.split(",") if d)
        num_elements += size
        num_bytes += size * _bits(dtype) // 8
    return arrays[0][0] if arrays else "", num_elements, num_bytes


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    digits = _BITS.search(dtype)
    return int(digits[0]) if digits else 0
