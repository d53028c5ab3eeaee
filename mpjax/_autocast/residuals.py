"""Minimizes the residuals that a forward scan saves for its backward scan.

JAX differentiates a scan into two scans: the first saves residuals, stacked over its
steps, and the second reads them. A gate `s` may leave the residuals `s`, `1 - s` and
`s * (1 - s)`, each in an array of its own. Outside of loops XLA weighs storing against
rematerializing; it does not look from one loop into another. Here the values to store
are a minimum cut: the fewest bytes from which cheap arithmetic rematerializes the rest,
by the same equations that computed it first. PyTorch's partitioner cuts likewise (He
and Yu, "Transcending Runtime-Memory Tradeoffs in Checkpointing by being Fusion Aware",
MLSys 2023).
"""

from typing import Any, NamedTuple

import numpy as np

from mpjax._autocast.inline import returns_constants
from mpjax._jaxpr.core import (
    Var,
    count_uses,
    inner_jaxprs,
    is_var,
    may_change_operands,
    num_bytes,
    open_jaxpr,
    renamed,
    stacked_aval,
    with_equations,
)
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import map_jaxprs
from mpjax._jaxpr.primitives import facts_of

# scipy's capacities have 32 bits: the limit of all variables together, and infinity.
_LIMIT = 2**30
_INFINITE = 2**31 - 1


def minimize_residuals(jaxpr: Any) -> Any:
    """Returns a jaxpr whose scans save fewer bytes for one another.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the same object if nothing changed.
    """
    return map_jaxprs(_minimize, jaxpr)


def _minimize(jaxpr: Any) -> Any:
    """Minimizes the residuals between the scans of one jaxpr, not of inner ones."""
    body = open_jaxpr(jaxpr)
    eqns = list(body.eqns)
    made_by: dict[Var, int] = {}
    for index, eqn in enumerate(eqns):
        if eqn.primitive.name != "scan":
            continue
        for first in sorted({made_by[x] for x in eqn.invars if _is_in(x, made_by)}):
            uses = count_uses(body.replace(eqns=eqns))
            replaced = _Pair(eqns[first], eqns[index], uses).cut(body)
            if replaced is not None:
                eqns[first], eqns[index] = replaced
        made_by |= dict.fromkeys(eqn.outvars, index)
    if all(new is old for new, old in zip(eqns, body.eqns, strict=True)):
        return jaxpr
    return with_equations(jaxpr, eqns=eqns)


class _ScanPairs:
    """A scan: its operands and results, each paired with its variable in the body."""

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self._scan = Scan(eqn)
        self.body = self._scan.body
        ins = list(zip(eqn.invars, self.body.invars, strict=True))
        self.consts, self.carry, self.xs = self._scan.split_operands(ins)
        self.outs = list(zip(eqn.outvars, self.body.outvars, strict=True))
        _, ys = self._scan.split_results(self.outs)
        self.ys = [(stack, var) for stack, var in ys if is_var(var)]

    def with_outs(self, outs: list) -> Any:
        """Returns the equation with other results."""
        jaxpr = with_equations(self._scan.jaxpr, outvars=[var for _, var in outs])
        return self._scan.rebuild(jaxpr, outvars=[outer for outer, _ in outs])

    def with_ins(self, consts: list, xs: list, before: list, names: dict) -> Any:
        """Returns the equation with other operands, and equations before the rest.

        Args:
          consts: pairs of a constant and its variable in the body.
          xs: pairs of a stack and the variable of its slice.
          before: equations for the beginning of the body.
          names: new names of variables of the body.
        """
        ins = [*consts, *self.carry, *xs]
        eqns = [e.replace(invars=renamed(e.invars, names)) for e in self.body.eqns]
        jaxpr = with_equations(
            self._scan.jaxpr,
            invars=[var for _, var in ins],
            outvars=renamed(self.body.outvars, names),
            eqns=before + eqns,
        )
        invars = [outer for outer, _ in ins]
        return self._scan.rebuild(jaxpr, num_consts=len(consts), invars=invars)


class _Residual(NamedTuple):
    """A value that one scan saves at every step and a later scan reads.

    Attributes:
      stack: its variable outside of both scans.
      made: its variable in the body of the first scan.
      taken: its variable in the body of the second scan.
    """

    stack: Var
    made: Var
    taken: Var


class _Pair:
    """A scan, and a later scan that reads residuals of the first.

    Args:
      first: the equation of the first scan.
      second: the equation of the second scan.
      uses: how often each variable outside of both is used.
    """

    def __init__(self, first: Any, second: Any, uses: dict[Var, int]):
        self._first, self._second = _ScanPairs(first), _ScanPairs(second)
        self._uses = uses
        self._length = first.params["length"]
        # For variables of the first body, the variables outside that they stand for.
        self._constants = {var: outer for outer, var in self._first.consts}
        stacks = self._first.xs + self._first.ys
        self._stacks = {var: outer for outer, var in stacks if uses[outer]}

    def cut(self, body: Any) -> tuple[Any, Any] | None:
        """Returns both scans of a jaxpr with fewer bytes between them, or None."""
        first, second = self._first.eqn, self._second.eqn
        if self._length != second.params["length"] or not all(
            map(may_change_operands, (first, second))
        ):
            return None
        made_of = dict(self._first.ys)
        residuals = [
            _Residual(stack, made_of[stack], taken)
            for stack, taken in self._second.xs
            if _is_in(stack, made_of) and self._uses[stack] == 1
        ]
        targets = [residual.made for residual in residuals]
        if not targets:
            return None
        available = self._available(body, {x.stack for x in residuals})
        producers = _producers(self._first.body, targets, available)
        cost = {
            var: 0 if var in available else self._num_bytes(var) for var in producers
        }
        if not all(isinstance(num, int) for num in cost.values()):
            return None  # A symbolic size.
        kept = minimum_cut(producers, cost, targets)
        if sum(cost[var] for var in kept) >= sum(cost[var] for var in targets):
            return None
        return self._rebuild([var for var in producers if var in kept], residuals)

    def _available(self, body: Any, residual_stacks: set[Var]) -> set[Var]:
        """Returns variables of the first body that are in memory without residuals."""
        outer = {**self._stacks, **self._constants}
        held = {*body.constvars, *body.invars}
        held |= {v for e in body.eqns if returns_constants(e) for v in e.outvars}
        held |= {x for x, _ in self._second.consts + self._second.xs if is_var(x)}
        held |= {y for y, _ in self._first.ys if self._uses[y]}
        held -= residual_stacks
        return {v for v, x in outer.items() if not is_var(x) or x in held}

    def _num_bytes(self, var: Var) -> int:
        if var in self._constants:
            return num_bytes(self._constants[var])
        return self._length * num_bytes(var)

    def _rebuild(self, kept: list[Var], residuals: list[_Residual]) -> tuple[Any, Any]:
        consts, xs = list(self._second.consts), list(self._second.xs)
        outs = list(self._first.outs)
        names: dict[Var, Var] = {}
        for var in kept:
            if var in self._constants:
                names[var] = _body_var(self._constants[var], var, consts)
                continue
            stack = self._stacks.get(var)
            if stack is None:
                stack = Var(stacked_aval(var.aval, self._length))
                outs.append((stack, var))
            names[var] = _body_var(stack, var, xs)
        dropped = [x for x in residuals if names.get(x.made) is not x.taken]
        targets = [residual.made for residual in dropped]
        before = _rematerialize(self._first.body, targets, names)
        new_names = {x.taken: names[x.made] for x in dropped}
        gone = {residual.stack for residual in dropped}
        outs = [pair for pair in outs if pair[0] not in gone]
        xs = [pair for pair in xs if pair[0] not in gone]
        return (
            self._first.with_outs(outs),
            self._second.with_ins(consts, xs, before, new_names),
        )


def _body_var(outer: Any, var: Var, pairs: list) -> Var:
    """Returns an operand's variable in a body; adds the operand if it is missing."""
    for other, name in pairs:
        if other is outer:
            return name
    pairs.append((outer, Var(var.aval)))
    return pairs[-1][1]


def _is_in(atom: Any, found: Any) -> bool:
    return is_var(atom) and atom in found


def _producers(body: Any, targets: list[Var], available: set[Var]) -> dict[Var, Any]:
    """Returns every variable that targets depend on, with its equation.

    The equation is None for a value that is available or cannot be rematerialized.
    """
    made_by = {v: eqn for eqn in body.eqns for v in eqn.outvars}
    found: dict[Var, Any] = {}
    todo = list(targets)
    while todo:
        var = todo.pop()
        if var in found:
            continue
        found[var] = None
        if var not in available and var in made_by and _is_cheap(made_by[var]):
            found[var] = made_by[var]
            todo += filter(is_var, made_by[var].invars)
    return found


def _is_cheap(eqn: Any) -> bool:
    inner = inner_jaxprs(eqn)
    if eqn.primitive.name == "jit" and inner:
        return all(map(_is_cheap, open_jaxpr(inner[0]).eqns))
    return facts_of(eqn).is_cheap


def minimum_cut(producers: dict, cost: dict, targets: list[Var]) -> set[Var]:
    """Returns the cheapest variables that cut every path to the targets.

    Args:
      producers: for each variable what computes it, with its operands in `invars`; None
        for a variable that cannot be computed again.
      cost: the bytes of each variable.
      targets: the variables that are needed.

    If several sets cost the same, it is the one nearest to the targets.
    """
    # Imported here: it takes as long as importing all of mpjax.
    from scipy.sparse import csgraph, csr_array

    node = {var: 2 + 2 * i for i, var in enumerate(producers)}
    unit = max(1, -(-sum(cost.values()) // _LIMIT))
    edges = []
    for var, eqn in producers.items():
        edges.append((node[var], node[var] + 1, -(-cost[var] // unit)))
        if eqn is None:
            edges.append((0, node[var], _INFINITE))
        else:
            sources = set(filter(is_var, eqn.invars))
            edges += [(node[x] + 1, node[var], _INFINITE) for x in sources]
    edges += [(node[var] + 1, 1, _INFINITE) for var in set(targets)]
    start, end, capacity = np.array(edges, np.int32).T
    size = 2 + 2 * len(producers)
    graph = csr_array((capacity, (start, end)), shape=(size, size))
    left = graph - csgraph.maximum_flow(graph, 0, 1).flow
    left.eliminate_zeros()
    after = csgraph.breadth_first_order(left.T, 1, return_predecessors=False)
    after = set(after.tolist())
    return {v for v, i in node.items() if i not in after and i + 1 in after}


def _rematerialize(body: Any, targets: list[Var], names: dict) -> list[Any]:
    """Returns equations that rematerialize targets; adds their results to `names`."""
    needed = {var for var in targets if var not in names}
    chosen = []
    for eqn in reversed(body.eqns):
        if not needed.isdisjoint(eqn.outvars):
            chosen.append(eqn)
            needed.update(x for x in eqn.invars if is_var(x) and x not in names)
    found, given = [], set(names)
    for eqn in reversed(chosen):
        invars = [names[x] if is_var(x) else x for x in eqn.invars]
        outvars = [Var(v.aval) for v in eqn.outvars]
        pairs = zip(eqn.outvars, outvars, strict=True)
        names.update((old, new) for old, new in pairs if old not in given)
        found.append(eqn.replace(invars=invars, outvars=outvars))
    return found
