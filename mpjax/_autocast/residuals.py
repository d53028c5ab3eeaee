"""What one scan stacks up for another, cut down to what cannot be computed again.

JAX differentiates a scan into two: the first stacks up, step by step, what the second
takes. Of a gate `s` that may be `s`, `1 - s` and `s * (1 - s)`, each in an array of its
own. Outside of loops XLA weighs storing against computing again; it does not look from
one loop into another. Here the values to stack are a minimum cut: the fewest bytes from
which arithmetic gives the rest, by the very equations that gave it before. PyTorch's
partitioner cuts likewise (He and Yu, "Transcending Runtime-Memory Tradeoffs in
Checkpointing by being Fusion Aware", MLSys 2023).
"""

import collections
from typing import Any, NamedTuple

import numpy as np

from mpjax._autocast.inline import gives_constants, with_loops_side_by_side
from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Var, is_var, open_jaxpr, renamed
from mpjax._jaxpr.loops import Scan
from mpjax._jaxpr.passes import map_jaxprs
from mpjax._jaxpr.primitives import facts_of

# scipy's capacities have 32 bits: that of all variables together, and an infinite one.
_LIMIT = 2**30
_INFINITE = 2**31 - 1


def with_fewer_stacks(jaxpr: Any) -> Any:
    """Returns a jaxpr whose scans stack up less for one another.

    Args:
      jaxpr: closed or open.

    Returns:
      The jaxpr; the very object if nothing changed.
    """
    side_by_side = with_loops_side_by_side(jaxpr)
    shrunk = map_jaxprs(_shrink, side_by_side)
    return jaxpr if shrunk is side_by_side else shrunk


def _shrink(jaxpr: Any) -> Any:
    body = open_jaxpr(jaxpr)
    eqns = list(body.eqns)
    made_by: dict[Var, int] = {}
    for index, eqn in enumerate(eqns):
        if eqn.primitive.name != "scan":
            continue
        for first in sorted({made_by[x] for x in eqn.invars if _is_in(x, made_by)}):
            pair = _Pair(eqns[first], eqns[index], _count_uses(eqns, body))
            replaced = pair.cut(body)
            if replaced is not None:
                eqns[first], eqns[index] = replaced
        made_by |= dict.fromkeys(eqn.outvars, index)
    if all(new is old for new, old in zip(eqns, body.eqns, strict=True)):
        return jaxpr
    return _jaxpr.with_equations(jaxpr, eqns=eqns)


class _Scan:
    """A scan: its operands and results, each beside its variable in the body."""

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self.body = open_jaxpr(eqn.params["jaxpr"])
        self._scan = Scan(eqn)
        ins = list(zip(eqn.invars, self.body.invars, strict=True))
        self.consts, self.carry, self.xs = self._scan.split_operands(ins)
        self.outs = list(zip(eqn.outvars, self.body.outvars, strict=True))
        _, ys = self._scan.split_results(self.outs)
        self.ys = [(stack, var) for stack, var in ys if is_var(var)]

    def with_outs(self, outs: list) -> Any:
        """Returns the equation with other results."""
        jaxpr = _jaxpr.with_equations(
            self.eqn.params["jaxpr"], outvars=[var for _, var in outs]
        )
        return self._scan.rebuild(jaxpr, outvars=[outer for outer, _ in outs])

    def with_ins(self, consts: list, xs: list, before: list, names: dict) -> Any:
        """Returns the equation with other operands, and equations before the rest."""

        ins = [*consts, *self.carry, *xs]
        eqns = [e.replace(invars=renamed(e.invars, names)) for e in self.body.eqns]
        jaxpr = _jaxpr.with_equations(
            self.eqn.params["jaxpr"],
            invars=[var for _, var in ins],
            outvars=renamed(self.body.outvars, names),
            eqns=before + eqns,
        )
        invars = [outer for outer, _ in ins]
        return self._scan.rebuild(jaxpr, num_consts=len(consts), invars=invars)


class _Slot(NamedTuple):
    """A value that one scan stacks up and another takes apart.

    Attributes:
      stack: outside of both.
      made: in the body of the first.
      taken: in the body of the second.
    """

    stack: Var
    made: Var
    taken: Var


class _Pair:
    """A scan, and a later one that takes stacks of it.

    Args:
      first: the equation of the one.
      second: that of the other.
      uses: how often each variable outside of them is used.
    """

    def __init__(self, first: Any, second: Any, uses: dict[Var, int]):
        self._first, self._second = _Scan(first), _Scan(second)
        self._uses = uses
        self._length = first.params["length"]
        # What is in the first body, as it is outside of it.
        self._constants = {var: outer for outer, var in self._first.consts}
        stacks = self._first.xs + self._first.ys
        self._stacks = {var: outer for outer, var in stacks if uses[outer]}

    def cut(self, body: Any) -> tuple[Any, Any] | None:
        """Returns both scans of a jaxpr with fewer bytes between them, or None."""
        first, second = self._first.eqn, self._second.eqn
        if self._length != second.params["length"] or not all(
            map(_jaxpr.may_change_operands, (first, second))
        ):
            return None
        made_of = dict(self._first.ys)
        between = [
            _Slot(stack, made_of[stack], taken)
            for stack, taken in self._second.xs
            if _is_in(stack, made_of) and self._uses[stack] == 1
        ]
        targets = [slot.made for slot in between]
        if not targets:
            return None
        there = self._there(body, {slot.stack for slot in between})
        makers = _makers(self._first.body, targets, there)
        cost = {var: 0 if var in there else self._num_bytes(var) for var in makers}
        if not all(isinstance(num, int) for num in cost.values()):
            return None  # A size that is not known yet.
        kept = _minimum_cut(makers, cost, targets)
        if sum(cost[var] for var in kept) >= sum(cost[var] for var in targets):
            return None
        return self._rebuild([var for var in makers if var in kept], between)

    def _there(self, body: Any, between: set[Var]) -> set[Var]:
        """Returns what of the first body is in memory but for the stacks between."""
        outer = {**self._stacks, **self._constants}
        held = {*body.constvars, *body.invars}
        held |= {v for eqn in body.eqns if gives_constants(eqn) for v in eqn.outvars}
        held |= {x for x, _ in self._second.consts + self._second.xs if is_var(x)}
        held |= {y for y, _ in self._first.ys if self._uses[y]}
        held -= between
        return {v for v, x in outer.items() if not is_var(x) or x in held}

    def _num_bytes(self, var: Var) -> int:
        if var in self._constants:
            return _jaxpr.num_bytes(self._constants[var])
        return self._length * _jaxpr.num_bytes(var)

    def _rebuild(self, kept: list[Var], between: list[_Slot]) -> tuple[Any, Any]:
        consts, xs = list(self._second.consts), list(self._second.xs)
        outs = list(self._first.outs)
        names: dict[Var, Var] = {}
        for var in kept:
            if var in self._constants:
                names[var] = _name_of(self._constants[var], var, consts)
                continue
            stack = self._stacks.get(var)
            if stack is None:
                stack = Var(_jaxpr.stacked_aval(var.aval, self._length))
                outs.append((stack, var))
            names[var] = _name_of(stack, var, xs)
        dropped = [slot for slot in between if names.get(slot.made) is not slot.taken]
        made = [slot.made for slot in dropped]
        again = _computed_again(self._first.body, made, names)
        new_names = {slot.taken: names[slot.made] for slot in dropped}
        gone = {slot.stack for slot in dropped}
        outs = [pair for pair in outs if pair[0] not in gone]
        xs = [pair for pair in xs if pair[0] not in gone]
        return (
            self._first.with_outs(outs),
            self._second.with_ins(consts, xs, again, new_names),
        )


def _name_of(outer: Any, var: Var, pairs: list) -> Var:
    """Returns what an operand is called in a body, one more operand if need be."""
    for other, name in pairs:
        if other is outer:
            return name
    pairs.append((outer, Var(var.aval)))
    return pairs[-1][1]


def _is_in(atom: Any, found: Any) -> bool:
    return is_var(atom) and atom in found


def _count_uses(eqns: list[Any], body: Any) -> dict[Var, int]:
    atoms = [x for eqn in eqns for x in eqn.invars]
    return collections.Counter(x for x in (*atoms, *body.outvars) if is_var(x))


def _makers(body: Any, targets: list[Var], there: set[Var]) -> dict[Var, Any]:
    """Returns all that targets can be computed again from, and the equation of each.

    That is None of a value that cannot be computed again, or is there in any case.
    """
    made_by = {v: eqn for eqn in body.eqns for v in eqn.outvars}
    found: dict[Var, Any] = {}
    todo = list(targets)
    while todo:
        var = todo.pop()
        if var in found:
            continue
        found[var] = None
        if var not in there and var in made_by and _is_cheap(made_by[var]):
            found[var] = made_by[var]
            todo += filter(is_var, made_by[var].invars)
    return found


def _is_cheap(eqn: Any) -> bool:
    inner = _jaxpr.inner_jaxprs(eqn)
    if eqn.primitive.name == "jit" and inner:
        return all(map(_is_cheap, open_jaxpr(inner[0]).eqns))
    return facts_of(eqn).is_cheap


def _minimum_cut(makers: dict, cost: dict, targets: list[Var]) -> set[Var]:
    """Returns the variables of least cost that lie on every way to the targets.

    Of several such sets it is the one nearest to the targets.
    """
    place = {var: 2 + 2 * i for i, var in enumerate(makers)}
    unit = max(1, -(-sum(cost.values()) // _LIMIT))
    edges = []
    for var, eqn in makers.items():
        edges.append((place[var], place[var] + 1, -(-cost[var] // unit)))
        if eqn is None:
            edges.append((0, place[var], _INFINITE))
        else:
            sources = set(filter(is_var, eqn.invars))
            edges += [(place[x] + 1, place[var], _INFINITE) for x in sources]
    edges += [(place[var] + 1, 1, _INFINITE) for var in set(targets)]
    start, end, capacity = np.array(edges, np.int32).T
    size = 2 + 2 * len(makers)
    from scipy.sparse import csgraph, csr_array

    graph = csr_array((capacity, (start, end)), shape=(size, size))
    left = graph - csgraph.maximum_flow(graph, 0, 1).flow
    left.eliminate_zeros()
    after = csgraph.breadth_first_order(left.T, 1, return_predecessors=False)
    after = set(after.tolist())
    return {v for v, i in place.items() if i not in after and i + 1 in after}


def _computed_again(body: Any, targets: list[Var], names: dict) -> list[Any]:
    """Returns equations that compute targets again; `names` learns their results."""
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
