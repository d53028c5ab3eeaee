"""Scans and while loops: splits their operands and results, and rebuilds them.

How a scan stores its counts differs between versions of JAX; only this file knows.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from mpjax._jaxpr.core import open_jaxpr

T = TypeVar("T")


class Scan:
    """A `scan` equation.

    Its operands are constants, initial carried values, and arrays whose slices along
    the first axis go to the steps (`xs`); its results are final carried values, and the
    stacked outputs of the steps (`ys`).

    Attributes:
      eqn: the equation.
      jaxpr: the body, closed: `(*consts, *carry, *xs) -> (*carry, *ys)`.
      body: the body, open.
      length: number of steps.
      is_reverse: whether the last step comes first.
      num_consts: number of constants.
      num_carry: number of carried values.
    """

    def __init__(self, eqn: Any):
        params = eqn.params
        self.eqn = eqn
        self.jaxpr = params["jaxpr"]
        self.body = open_jaxpr(self.jaxpr)
        self.length: int = params["length"]
        self.is_reverse: bool = params["reverse"]
        if "ft_in" in params:  # From JAX 0.11 on.
            consts, carry, _ = params["ft_in"].unpack()
            self.num_consts, self.num_carry = len(consts), len(carry)
        else:
            self.num_consts, self.num_carry = params["num_consts"], params["num_carry"]

    def split_operands(self, operands: Sequence[T]) -> tuple[list[T], list[T], list[T]]:
        """Cuts a list in the order of the operands into constants, carry and xs."""
        first = self.num_consts + self.num_carry
        operands = list(operands)
        return (
            operands[: self.num_consts],
            operands[self.num_consts : first],
            operands[first:],
        )

    def split_results(self, results: Sequence[T]) -> tuple[list[T], list[T]]:
        """Cuts a list in the order of the results into carry and ys."""
        results = list(results)
        return results[: self.num_carry], results[self.num_carry :]

    def rebuild(
        self,
        jaxpr: Any,
        *,
        num_consts: Any = None,
        invars: Any = None,
        outvars: Any = None,
    ) -> Any:
        """Returns the equation with another body, and other operands or results.

        Args:
          jaxpr: the body; it carries as many values as before.
          num_consts: number of constants; None to keep it.
          invars: operands; None to keep them.
          outvars: results; None to keep them.
        """
        num_consts = self.num_consts if num_consts is None else num_consts
        invars = self.eqn.invars if invars is None else invars
        outvars = self.eqn.outvars if outvars is None else outvars
        num_xs = len(invars) - num_consts - self.num_carry
        counts = _count_params(
            num_consts, self.num_carry, num_xs, len(outvars) - self.num_carry
        )
        params = self.eqn.params | counts | {"jaxpr": jaxpr}
        return self.eqn.replace(invars=invars, outvars=outvars, params=params)


class While:
    """A `while` equation.

    Attributes:
      eqn: the equation.
      cond: the condition, closed: `(*cond_consts, *carry) -> bool`.
      body: the body, closed: `(*body_consts, *carry) -> carry`.
    """

    class Operands(NamedTuple):
        """Operands, or any values in their order, by part."""

        cond_consts: list[Any]
        body_consts: list[Any]
        carry: list[Any]

    def __init__(self, eqn: Any):
        self.eqn = eqn
        self.cond = eqn.params["cond_jaxpr"]
        self.body = eqn.params["body_jaxpr"]

    def split_operands(self, operands: Sequence[Any]) -> "While.Operands":
        """Cuts a list in the order of the operands."""
        num_cond = self.eqn.params["cond_nconsts"]
        first = num_cond + self.eqn.params["body_nconsts"]
        operands = list(operands)
        return self.Operands(
            operands[:num_cond], operands[num_cond:first], operands[first:]
        )


@functools.lru_cache(maxsize=1024)
def _count_params(
    num_consts: int, num_carry: int, num_xs: int, num_ys: int
) -> dict[str, Any]:
    """Returns the parameters in which a scan stores these counts."""

    def fn(consts, carry, xs):
        def step(carry, xs):
            total = sum((*consts, *carry, *xs))
            return [total * x for x in carry], [total * i for i in range(num_ys)]

        return jax.lax.scan(step, carry, xs, length=1)

    scalar = jax.ShapeDtypeStruct((), np.float32)
    stack = jax.ShapeDtypeStruct((1,), np.float32)
    args = [scalar] * num_consts, [scalar] * num_carry, [stack] * num_xs
    with jax.disable_jit(False):
        (eqn,) = jax.make_jaxpr(fn)(*args).eqns
    names = ("ft_in", "ft_out", "num_consts", "num_carry")
    return {name: eqn.params[name] for name in names if name in eqn.params}
