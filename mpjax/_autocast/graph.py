"""A jaxpr as a graph of values, with calls entered and equal operations merged.

XLA inlines calls and merges equal operations before it decides what stays in memory;
so does this graph. Loops and branches are single operations in it.
"""

import dataclasses
import functools
from typing import Any

from mpjax._jaxpr.core import default_branch, inner_jaxprs, is_var, open_jaxpr
from mpjax._jaxpr.primitives import Flops, Kind, facts_of
from mpjax._jaxpr.provenance import join_scope


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the graph.

    Attributes:
      aval: its shape and dtype.
      node: the operation that computes it; None for an input or a constant.
      index: which of the results of that operation it is.
      uses: the operations that take it, each with the index of the operand.
    """

    aval: Any
    node: "Node | None" = None
    index: int = 0
    uses: list[tuple["Node", int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Node:
    """An operation of the graph.

    Attributes:
      eqn: its equation.
      scope: its name scope.
      is_backward: whether it belongs to the backward pass.
      is_checkpointed: whether it is inside a `jax.checkpoint`, which the backward pass
        computes again.
      operands: its operands; None for a literal.
      results: its results.
    """

    eqn: Any
    scope: str
    is_backward: bool
    is_checkpointed: bool
    operands: list[Value | None]
    results: list[Value] = dataclasses.field(default_factory=list)

    @property
    def is_fused(self) -> bool:
        """Whether XLA computes it inside the kernels that take its result."""
        eqn, facts = self.eqn, facts_of(self.eqn)
        is_arithmetic = facts.is_cheap or facts.kind in (Kind.PROMOTE, Kind.FLOAT32)
        moves_windows = "window_dimensions" in eqn.params
        reduces = facts.flops is Flops.PER_INPUT or moves_windows
        return is_arithmetic and not (reduces or eqn.effects or inner_jaxprs(eqn))

    @property
    def reads_memory(self) -> bool:
        """Whether its operands must be in memory: a matmul, a pooling, a loop, ..."""
        if "window_dimensions" in self.eqn.params:
            return True
        return not self.is_fused and facts_of(self.eqn).flops is not Flops.PER_INPUT

    @functools.cached_property
    def bodies(self) -> list["Graph"]:
        """A graph per jaxpr inside a loop or a conditional."""
        return [Graph(inner, self.scope) for inner in inner_jaxprs(self.eqn)]

    @property
    def is_view(self) -> bool:
        """Whether it moves or repeats numbers, at no cost in memory."""
        facts = facts_of(self.eqn)
        return facts.moves_data and not facts.shrinks and not facts.is_slice


class Graph:
    """The graph of one jaxpr.

    JAX names the operations of a backward pass `transpose(...)`.

    Args:
      jaxpr: closed or open.
      scope: its name scope.

    Attributes:
      inputs: a value per input.
      outputs: a value per output; None for a literal.
      nodes: all operations, each after those that compute its operands.
    """

    def __init__(self, jaxpr: Any, scope: str = ""):
        self.nodes: list[Node] = []
        self._merged: dict[Any, list[Value]] = {}
        self._constant: set[Value] = set()
        self.inputs = [Value(v.aval) for v in open_jaxpr(jaxpr).invars]
        top = Node(None, scope, False, False, [])
        self.outputs = self._add_all(jaxpr, self.inputs, top)

    def is_constant(self, value: Value) -> bool:
        """Whether a value depends on no input."""
        return value in self._constant

    def _add_all(self, jaxpr: Any, inputs: list[Value], call: Node) -> list[Any]:
        body = open_jaxpr(jaxpr)
        env = dict(zip(body.invars, inputs, strict=True))
        constants = {v: Value(v.aval) for v in body.constvars}
        self._constant.update(constants.values())
        env |= constants
        for eqn in body.eqns:
            node = Node(
                eqn,
                join_scope(call.scope, eqn),
                call.is_backward or "transpose(" in str(eqn.source_info.name_stack),
                call.is_checkpointed,
                [env[x] if is_var(x) else None for x in eqn.invars],
            )
            env.update(zip(eqn.outvars, self._results(node), strict=True))
        return [env[x] if is_var(x) else None for x in body.outvars]

    def _results(self, node: Node) -> list[Value]:
        eqn = node.eqn
        operands = [
            value if value is not None else self._literal(x)
            for value, x in zip(node.operands, eqn.invars, strict=True)
        ]
        branch, inner = default_branch(eqn), inner_jaxprs(eqn)
        if branch is not None:
            inner, operands = [branch], operands[1:]
        elif not facts_of(eqn).is_call:
            inner = []
        if len(inner) == 1 and len(open_jaxpr(inner[0]).invars) == len(operands):
            # By its parameter: a checkpoint must not be merged with the forward pass.
            node.is_checkpointed |= "prevent_cse" in eqn.params
            outputs = self._add_all(inner[0], operands, node)
            pairs = zip(outputs, eqn.outvars, strict=True)
            return [self._literal(v) if x is None else x for x, v in pairs]
        return self._merge(node)

    def _literal(self, atom: Any) -> Value:
        value = Value(atom.aval)
        self._constant.add(value)
        return value

    def _merge(self, node: Node) -> list[Value]:
        """Adds an operation, or returns the results of an equal one."""
        eqn = node.eqn
        literals = [str(x) for x in eqn.invars if not is_var(x)]
        key = (eqn.primitive.name, str(eqn.params), *map(id, node.operands), *literals)
        is_plain = not (inner_jaxprs(eqn) or eqn.effects or node.is_checkpointed)
        if is_plain and key in self._merged:
            return self._merged[key]
        node.results = [Value(v.aval, node, i) for i, v in enumerate(eqn.outvars)]
        self.nodes.append(node)
        given = [x for x in node.operands if x is not None]
        if is_plain:
            self._merged[key] = node.results
            if all(map(self.is_constant, given)):
                self._constant.update(node.results)
        for index, value in enumerate(node.operands):
            if value is not None:
                value.uses.append((node, index))
        return node.results


def behind_views(value: Value) -> Value:
    """Returns the value that is in memory, of which another is a view."""
    while value.node is not None and value.node.is_view:
        operands = value.node.operands
        is_each_its_own = len(operands) == len(value.node.results)
        operand = operands[value.index if is_each_its_own else 0]
        if operand is None:
            break
        value = operand
    return value
