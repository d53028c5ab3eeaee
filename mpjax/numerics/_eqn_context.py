"""What surrounds an equation in a function."""

from typing import Any, NamedTuple, Self

from mpjax._jaxpr.core import num_trips
from mpjax._jaxpr.provenance import is_reserved, join_scope
from mpjax._report import short_source


class EqnContext(NamedTuple):
    """What surrounds an equation, from the outermost jaxpr on.

    Attributes:
      scope: name scope.
      source: the user's source line.
      times: how often the equation runs, as far as that is known.
      iterations: iterations of the surrounding loops, where they are known.
      is_backward: whether JAX's transposition made the equation.
      is_rematerialized: whether it repeats the forward pass in the backward pass, for
        `jax.checkpoint`.
      is_rewritten: whether it is inside `autocast`, `full_precision` or
        `half_precision`.
    """

    scope: str = ""
    source: str = ""
    times: int = 1
    iterations: tuple[int, ...] = ()
    is_backward: bool = False
    is_rematerialized: bool = False
    is_rewritten: bool = False

    def enter(self, eqn: Any) -> Self:
        """Returns the context of an equation.

        An equation in a jit of JAX's own, such as that of `jnp.where`, has no source
        line; it takes the line of the call.
        """
        stack = str(eqn.source_info.name_stack)
        return self._replace(
            scope=join_scope(self.scope, eqn),
            source=short_source(eqn) or self.source,
            is_backward=self.is_backward or "transpose(" in stack,
            is_rematerialized=self.is_rematerialized or "rematted_computation" in stack,
        )

    def inside(self, eqn: Any) -> Self:
        """Returns the context inside an equation whose own context this is."""
        return self._replace(
            times=self.times * num_trips(eqn),
            is_rewritten=self.is_rewritten or is_reserved(eqn),
        )

    def at(self, iteration: int) -> Self:
        """Returns the context inside one iteration of a loop."""
        return self._replace(iterations=(*self.iterations, iteration))
