"""The arrays that a step saves for its backward pass, and why.

An array is saved if the forward pass computes it and the backward pass needs it. XLA
does not store all that the jaxpr passes from one to the other: arithmetic on arrays
that are stored anyway is computed again, inside the kernels that need it. So the arrays
listed are a minimum cut, as in `residuals`: those that both passes read from memory
(operands of matmuls, half copies of weights), and the fewest bytes from which
arithmetic yields the rest. What a step holds for a short time, such as the cotangents
of its largest layer or the layer that a `jax.checkpoint` computes again, is not listed.

Compiled for an H100, the sum was 0.55 to 1.0 of the temporaries of MLPs, transformers
and convnets. Sometimes XLA computes more again: the sum was 1.4 of the temporaries of
an MLP with silu.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from mpjax._autocast.eligibility import asks_for_sign
from mpjax._autocast.graph import Graph, Node, Value, behind_views
from mpjax._autocast.residuals import minimum_cut
from mpjax._jaxpr.core import dtype_of, is_float32, num_bytes, num_trips
from mpjax._jaxpr.primitives import facts_of
from mpjax._report import short_source
from mpjax._tree import is_half


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """An array saved for the backward pass; arrays that look the same are merged.

    Attributes:
      dtype: its dtype.
      shape: its shape; in a loop with the number of steps in front.
      num_bytes: bytes of all `count` arrays together.
      count: how many arrays look the same.
      primitive: name of the JAX primitive that computed it.
      scope: the name scope of that operation.
      source: its source line, `model.py:12 (loss_fn)`.
      reason: what the backward pass needs it for, and why it is float32 if it is.
    """

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    count: int
    primitive: str
    scope: str
    source: str
    reason: str


def find_saved(
    jaxpr: Any, why_float32: Mapping[tuple[str, str], str]
) -> tuple[SavedArray, ...]:
    """Returns what the forward passes in a jaxpr save for their backward passes.

    Args:
      jaxpr: closed or open, after every pass.
      why_float32: why operations run in float32, by the name of the primitive and the
        source line.

    Returns:
      The arrays, the largest first; none if the jaxpr has no backward pass. The body of
      a loop that holds both passes counts once.
    """
    merged: dict[tuple, list[int]] = {}
    for row, size in _rows(Graph(jaxpr), why_float32):
        count = merged.setdefault(row, [0, 0])
        count[0] += size
        count[1] += 1
    found = [
        SavedArray(row[0], row[1], size, count, *row[2:])
        for row, (size, count) in merged.items()
    ]
    return tuple(sorted(found, key=lambda saved: -saved.num_bytes))


def _rows(graph: Graph, why_float32: Mapping) -> Iterator[tuple[tuple, int]]:
    for value in _saved_values(graph):
        yield _describe(graph, value, why_float32), num_bytes(value)
    for node in graph.nodes:
        if not node.is_backward:
            for inner in node.bodies:
                yield from _rows(inner, why_float32)


class _Arithmetic(NamedTuple):
    """What computes a value again: arithmetic on the values `invars`."""

    invars: list[Value]


def _saved_values(graph: Graph) -> list[Value]:
    """Returns the values that stay in memory from the forward to the backward pass."""
    is_made_forward = functools.partial(_is_made_forward, graph)
    targets, read = {}, {True: set(), False: set()}
    for node in graph.nodes:
        operands = [behind_views(x) for x in node.operands if x is not None]
        if node.reads_memory:
            read[node.is_backward].update(operands)
        if node.is_backward:
            targets |= dict.fromkeys(filter(is_made_forward, operands))
    if not targets:
        return []
    in_memory = {v for v in read[True] & read[False] if is_made_forward(v)}
    producers: dict[Value, Any] = {}
    todo = list(targets)
    while todo:
        value = todo.pop()
        if value in producers:
            continue
        producers[value] = None
        if is_made_forward(value) and value not in in_memory and value.node.is_fused:
            operands = _operands_again(value.node)
            producers[value] = _Arithmetic(operands)
            todo += operands
    cost = {
        v: num_bytes(v) if is_made_forward(v) and v not in in_memory else 0
        for v in producers
    }
    if not all(isinstance(size, int) for size in cost.values()):
        return []  # A symbolic size.
    cut = minimum_cut(producers, cost, list(targets))
    return [v for v in producers if v in in_memory or (v in cut and cost[v])]


def _is_made_forward(graph: Graph, value: Value) -> bool:
    is_made = value.node is not None and not value.node.is_backward
    return is_made and not graph.is_constant(value)


def _operands_again(node: Node) -> list[Value]:
    """Returns the operands from which arithmetic computes its result again.

    The sign of x, which relu's derivative asks for, is as well that of max(x, 0).
    """
    operands = [x for x in node.operands if x is not None]
    uses = [use for x in operands for use in x.uses] if asks_for_sign(node.eqn) else []
    for user, _ in uses:
        is_max = user.eqn.primitive.name == "max" and not user.is_backward
        if is_max and any(getattr(x, "val", None) == 0 for x in user.eqn.invars):
            operands = user.results
    return list(map(behind_views, operands))


def _describe(graph: Graph, value: Value, why_float32: Mapping) -> tuple:
    source, is_cast = _origin(value)
    node = source.node or value.node
    assert node is not None
    line = short_source(node.eqn)
    reason = ""
    if source.node is None and is_cast and is_half(dtype_of(value)):
        reason = f"half copy of {_kind_of_input(graph, source)}"
    reason = reason or _why_needed(value, node)
    if value.node is not None and (num_steps := num_trips(value.node.eqn)) > 1:
        reason = f"in each of {num_steps} steps: {reason}"
    if is_float32(value.aval) and (
        why := why_float32.get((node.eqn.primitive.name, line))
    ):
        reason += f"; float32: {why}"
    aval: Any = value.aval
    shape = tuple(aval.shape)
    return str(aval.dtype), shape, node.eqn.primitive.name, node.scope, line, reason


def _origin(value: Value) -> tuple[Value, bool]:
    """Returns the value behind casts, views and loops, and whether there was a cast."""
    is_cast = False
    while (node := value.node) is not None:
        if node.eqn.primitive.name == "convert_element_type" and node.operands[0]:
            value, is_cast = node.operands[0], True
        elif node.is_view and behind_views(value) is not value:
            value = behind_views(value)
        else:
            alike = [g for g in node.bodies if len(g.outputs) == len(node.results)]
            inside = [graph.outputs[value.index] for graph in alike]
            made = [x for x in inside if x is not None and _origin(x)[0].node]
            if not made:
                break
            value = made[0]
    return value, is_cast


def _kind_of_input(graph: Graph, value: Value) -> str:
    """Returns whether an input is differentiated.

    Its gradient is an output of the same shape and dtype. If more inputs look like it
    than have a gradient, there is no telling which.
    """

    def is_alike(x):
        return (x.aval.shape, dtype_of(x)) == (value.aval.shape, dtype_of(value))

    made = [x for x in graph.outputs if x is not None and x.node is not None]
    num_gradients = sum(is_alike(x) for x in made if x.node.is_backward)
    num_alike = sum(map(is_alike, graph.inputs))
    return "a parameter" if num_gradients >= num_alike else "an argument"


def _why_needed(value: Value, maker: Node) -> str:
    """Returns what the backward pass does with a value.

    Args:
      value: the value.
      maker: the operation that computed it, behind casts and loops.
    """
    found = _find_use(value, lambda node: node.is_backward)
    if found is None:
        return "needed by the backward pass"
    node, index = found
    if node.is_checkpointed:
        return "a jax.checkpoint computes its inside again from it"
    name, line = node.eqn.primitive.name, short_source(node.eqn)
    at = f" at {line}" if line else ""
    if facts_of(node.eqn).is_matmul:
        return f"operand of a matmul: {name}{at} needs it for its gradient"
    if name == "select_n" and index == 0:
        return f"a mask: where the gradient passes{at}"
    same_line = line == short_source(maker.eqn)
    if same_line and maker.is_fused and not facts_of(maker.eqn).is_cheap:
        return f"its own derivative: {maker.eqn.primitive.name}"
    return f"needed for the gradient{at}"


def _find_use(value: Value, is_wanted: Callable) -> tuple[Node, int] | None:
    """Returns the nearest operation that takes a value, or arithmetic on it.

    An operation that reads from memory comes before arithmetic, and inside a loop the
    operation that takes the value there.
    """
    seen, level = {value}, [value]
    while level:
        uses = [use for x in level for use in x.uses]
        wanted = [use for use in uses if is_wanted(use[0]) and not _passes_on(use[0])]
        if wanted:
            node, index = max(wanted, key=lambda use: use[0].reads_memory)
            return _find_use_inside(node, index) or (node, index)
        results = itertools.chain.from_iterable(
            node.results for node, _ in uses if node.is_fused
        )
        level = [x for x in results if x not in seen]
        seen.update(level)
    return None


def _passes_on(node: Node) -> bool:
    return node.is_view or node.eqn.primitive.name == "convert_element_type"


def _find_use_inside(node: Node, index: int) -> tuple[Node, int] | None:
    """Returns the operation inside a scan that takes its operand, or None."""
    if node.eqn.primitive.name != "scan":
        return None
    (body,) = node.bodies
    return _find_use(body.inputs[index], lambda node: True)
