"""Sums that are half although an operand is float32.

A biased activation, a residual stream and the result of a normalization are sums that
go on to a matmul. A model by hand stores them in half; in float32 they would take twice
the memory, beside the half copy that the matmul takes. So they run in half. In a chain
of sums, which XLA fuses, only the last is half. A sum that goes nowhere but into a loss
or a softmax stays float32.

Whether a sum of the forward pass is half does not depend on what reads it in the
backward pass: the forward pass is the same with and without a gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mpjax._autocast.demand import Demand
from mpjax._autocast.environment import Environment
from mpjax._jaxpr.core import Var, dtype_of, is_var
from mpjax._jaxpr.primitives import Kind, facts_of
from mpjax._jaxpr.provenance import is_backward

_FLOAT32 = np.dtype(np.float32)


class Sums:
    """Decides on the sums of one jaxpr.

    Args:
      body: the jaxpr, open.
      env: what its variables have become so far.
      kind_of: the kind of an equation.
      in_backward: whether the jaxpr belongs to a backward pass.
    """

    def __init__(
        self,
        body: Any,
        env: Environment,
        kind_of: Callable[[Any], Kind],
        in_backward: bool,
    ):
        self._env = env
        self._kind_of = kind_of
        self._in_backward = in_backward
        self._readers: dict[Var, list[Any]] = {}
        for eqn in body.eqns:
            for var in filter(is_var, eqn.invars):
                self._readers.setdefault(var, []).append(eqn)
        for var in filter(is_var, body.outvars):
            self._readers.setdefault(var, []).append(None)

    def half_dtype(self, eqn: Any, demand: Demand) -> Any:
        """Returns the half dtype of a sum with a float32 operand, or None for float32.

        Args:
          eqn: an equation.
          demand: the demand on its result.
        """
        if not facts_of(eqn).is_sum or demand.must_keep or len(demand.flows) != 1:
            return None
        if any(self._env.known_value(x) is not None for x in eqn.invars):
            return None
        if all(dtype_of(self._env.actual(x)) != _FLOAT32 for x in eqn.invars):
            return None
        readers = self._own_readers(eqn)
        others = [r for r in readers if r is None or not facts_of(r).sums_axes]
        if len(others) == 1 and self._continues(others[0]):
            return None
        return next(iter(demand.flows))

    def is_rounded_after(self, eqn: Any) -> bool:
        """Whether a sum of float32 operands runs in float32 and is rounded once.

        XLA drops a rounding whose result is cast back to float32 at once. Where an
        operation reads the result in float32, the sum itself runs in half.
        """
        is_forward = not is_backward(eqn, self._in_backward)
        return is_forward and not self._is_read_in_float32(eqn)

    def _is_read_in_float32(self, eqn: Any) -> bool:
        """Whether an operation takes a result, or a view of it, in float32."""
        for reader in filter(None, self._own_readers(eqn)):
            if self._kind_of(reader) is Kind.FLOAT32:
                return True
            if facts_of(reader).is_view and self._is_read_in_float32(reader):
                return True
        return False

    def _own_readers(self, eqn: Any) -> list[Any]:
        """Returns the equations of its pass that read a result; None is an output."""
        own = is_backward(eqn, self._in_backward)
        return [
            reader
            for reader in self._readers.get(eqn.outvars[0], ())
            if reader is None or is_backward(reader, self._in_backward) is own
        ]

    def _continues(self, eqn: Any) -> bool:
        """Whether a reader continues a chain: a sum, or arithmetic with a constant."""
        if eqn is None or self._kind_of(eqn) is not Kind.PROMOTE:
            return False
        facts = facts_of(eqn)
        has_constant = any(self._env.known_value(x) is not None for x in eqn.invars)
        return facts.is_sum or (facts.is_cheap and has_constant)
