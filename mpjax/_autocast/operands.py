"""The values of a jaxpr as they are after the rewrite, and reading them."""

from typing import Any

import numpy as np

from mpjax._jaxpr import core as _jaxpr
from mpjax._jaxpr.core import Literal, Var, dtype_of


class Operands:
    """The variables of a jaxpr as they are after the rewrite, and reading them.

    Attributes:
      eqns: the equations written so far.
      changed: whether anything is not as it was.
    """

    def __init__(self):
        self.eqns: list[Any] = []
        self.changed = False
        self._env: dict[Var, Var] = {}
        self._values: dict[Var, float] = {}

    def actual(self, atom: Any) -> Any:
        """Returns what an old variable is now; the variable itself if unchanged."""
        return atom if isinstance(atom, Literal) else self._env.get(atom, atom)

    def cast(self, atom: Any, dtype: Any, like: Any) -> Any:
        """Returns an old variable in a dtype, by a cast of its own if need be."""
        if isinstance(atom, Literal) and np.ndim(atom.val) == 0:
            same = dtype_of(atom) == dtype
            return atom if same else _jaxpr.literal(atom.val, dtype)
        actual = self.actual(atom)
        if dtype_of(actual) == dtype:
            return actual
        return self.convert(actual, _jaxpr.new_var(atom.aval, dtype), like)

    def as_traced(self, atom: Any, like: Any = None) -> Any:
        """Returns an old variable in the dtype that it was traced in."""
        actual = self.actual(atom)
        if dtype_of(actual) == dtype_of(atom):
            return actual
        return self.convert(actual, Var(atom.aval), like)

    def returned(self, atom: Any, dtype: Any, made_by: dict) -> Any:
        """Returns an output in a dtype: the variable itself, or a cast of it."""
        like = None if isinstance(atom, Literal) else made_by.get(atom)
        if dtype == dtype_of(atom):
            return self.as_traced(atom, like)
        return self.cast(atom, dtype, like)

    def convert(self, atom: Any, out: Var, like: Any) -> Var:
        """Writes a cast of `atom` to the dtype of `out`."""
        self.eqns.append(_jaxpr.convert_eqn(atom, out, like))
        self.changed = True
        return out

    def define(self, var: Var, dtype: Any) -> Var:
        """Returns the new form of an old variable, in a dtype."""
        if dtype == dtype_of(var):
            return var
        self.changed = True
        new = self._env[var] = _jaxpr.new_var(var.aval, dtype)
        return new

    def value(self, atom: Any) -> float | None:
        """Returns the number that a variable is known to hold everywhere, or None."""
        if not isinstance(atom, Literal):
            return self._values.get(atom)
        if np.ndim(atom.val) or not np.isrealobj(atom.val) or dtype_of(atom) is None:
            return None
        return float(atom.val)

    def set_value(self, var: Var, value: float | None) -> None:
        """Notes what number a variable holds."""
        if value is not None:
            self._values[var] = value

    def splice(self, traced: Any, eqn: Any, invars: Any, outvars: Any = None) -> None:
        """Writes the equations of a jaxpr in the place of one equation."""
        names = dict(zip(traced.invars, invars, strict=True))
        names |= dict(zip(traced.outvars, outvars or eqn.outvars, strict=True))

        def rename(atom):
            return atom if isinstance(atom, Literal) else names.get(atom, atom)

        for inner in traced.eqns:
            self.eqns.append(
                inner.replace(
                    invars=[rename(x) for x in inner.invars],
                    outvars=[rename(v) for v in inner.outvars],
                    source_info=eqn.source_info,
                )
            )
        self.changed = True
