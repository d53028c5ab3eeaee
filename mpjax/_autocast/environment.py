"""The equations of a rewritten jaxpr, and what its variables have become."""

from typing import Any

import numpy as np

from mpjax._jaxpr.core import (
    Literal,
    Var,
    broadcast_eqn,
    convert_eqn,
    dtype_of,
    literal,
    new_var,
    renamed,
)


class Environment:
    """Maps old variables to those of the rewritten jaxpr, and collects its equations.

    Attributes:
      eqns: the equations written so far.
      changed: whether anything differs from the old jaxpr.
    """

    def __init__(self):
        self.eqns: list[Any] = []
        self.changed = False
        self._new: dict[Var, Var] = {}
        self._values: dict[Var, float] = {}

    def actual(self, atom: Any) -> Any:
        """Returns what an old variable is now; the variable itself if unchanged."""
        return atom if isinstance(atom, Literal) else self._new.get(atom, atom)

    def cast(self, atom: Any, dtype: Any, like: Any) -> Any:
        """Returns an old variable in a dtype, through a cast of its own if needed."""
        if isinstance(atom, Literal) and np.ndim(atom.val) == 0:
            same = dtype_of(atom) == dtype
            return atom if same else literal(atom.val, dtype)
        actual = self.actual(atom)
        if dtype_of(actual) == dtype:
            return actual
        return self.convert(actual, new_var(atom.aval, dtype), like)

    def cast_broadcast(self, atom: Any, shape: Any, dtype: Any, like: Any) -> Any:
        """Returns a float32 variable, broadcast to a shape and cast after that.

        Its derivative is then a cast to float32 before a sum, so the sum is float32.

        Args:
          atom: an operand of the old jaxpr.
          shape: the shape of the result.
          dtype: the half dtype to cast to.
          like: equation whose source line, name scope and context the new ones take.
        """
        actual = self.actual(atom)
        is_scalar = isinstance(atom, Literal) and np.ndim(atom.val) == 0
        if is_scalar or dtype_of(actual) == dtype or actual.aval.shape == shape:
            return self.cast(atom, dtype, like)
        self.eqns.append(broadcast_eqn(actual, shape, like))
        (wide,) = self.eqns[-1].outvars
        return self.convert(wide, new_var(wide.aval, dtype), like)

    def as_traced(self, atom: Any, like: Any = None) -> Any:
        """Returns an old variable in the dtype that it was traced in."""
        actual = self.actual(atom)
        if dtype_of(actual) == dtype_of(atom):
            return actual
        return self.convert(actual, Var(atom.aval), like)

    def output(self, atom: Any, dtype: Any, producers: dict) -> Any:
        """Returns an output in a dtype: the variable itself, or a cast of it.

        Args:
          atom: an output of the old jaxpr.
          dtype: the dtype to return it in; None for the one that it has now.
          producers: the equation of each variable that an equation defines.
        """
        if dtype is None:
            return self.actual(atom)
        like = None if isinstance(atom, Literal) else producers.get(atom)
        if dtype == dtype_of(atom):
            return self.as_traced(atom, like)
        return self.cast(atom, dtype, like)

    def convert(self, atom: Any, out: Var, like: Any) -> Var:
        """Writes a cast of `atom` to the dtype of `out`."""
        self.eqns.append(convert_eqn(atom, out, like))
        self.changed = True
        return out

    def define(self, var: Var, dtype: Any) -> Var:
        """Returns the new form of an old variable, in a dtype."""
        if dtype == dtype_of(var):
            return var
        self.changed = True
        new = self._new[var] = new_var(var.aval, dtype)
        return new

    def write(
        self, eqn: Any, *, invars: Any, params: Any = None, dtypes: Any = None
    ) -> None:
        """Writes an old equation with its changes; the same object if it has none.

        Args:
          eqn: the equation.
          invars: its operands.
          params: its parameters; None to keep them.
          dtypes: the dtype of each result; None to keep them as traced.
        """
        changes: dict[str, Any] = {}
        pairs = zip(invars, eqn.invars, strict=True)
        if any(new is not old for new, old in pairs):
            changes["invars"] = invars
        if params is not None:
            changes["params"] = params
        if dtypes is not None:
            outs = zip(eqn.outvars, dtypes, strict=True)
            changes["outvars"] = [self.define(var, dtype) for var, dtype in outs]
        self.changed = self.changed or bool(changes)
        self.eqns.append(eqn.replace(**changes) if changes else eqn)

    def write_rounded(self, eqn: Any, dtype: Any) -> None:
        """Writes an equation as traced, and casts of its results to a dtype."""
        full = [self.as_traced(x, eqn) for x in eqn.invars]
        outvars = [Var(var.aval) for var in eqn.outvars]
        self.eqns.append(eqn.replace(invars=full, outvars=outvars))
        for var, out in zip(eqn.outvars, outvars, strict=True):
            self.convert(out, self.define(var, dtype), eqn)

    def splice(self, traced: Any, eqn: Any, invars: Any, outvars: Any = None) -> None:
        """Writes the equations of a jaxpr in place of one equation.

        Args:
          traced: the jaxpr, open.
          eqn: the equation, whose source line the new ones take.
          invars: the variables that take the place of the jaxpr's inputs.
          outvars: those that take the place of its outputs; the equation's results if
            None.
        """
        names = dict(zip(traced.invars, invars, strict=True))
        names |= dict(zip(traced.outvars, outvars or eqn.outvars, strict=True))
        for inner in traced.eqns:
            self.eqns.append(
                inner.replace(
                    invars=renamed(inner.invars, names),
                    outvars=renamed(inner.outvars, names),
                    source_info=eqn.source_info,
                )
            )
        self.changed = True

    def known_value(self, atom: Any) -> float | None:
        """Returns the number that a variable is known to hold everywhere, or None."""
        if not isinstance(atom, Literal):
            return self._values.get(atom)
        if np.ndim(atom.val) or not np.isrealobj(atom.val) or dtype_of(atom) is None:
            return None
        return float(atom.val)

    def set_known_value(self, var: Var, value: float | None) -> None:
        """Records the number that a variable holds everywhere."""
        if value is not None:
            self._values[var] = value
