"""Where in a function an equation is."""

from typing import Any, NamedTuple, Self

from mpjax._jaxpr import join_scope, source_line


class Place(NamedTuple):
    """What is around an equation, from the outermost on.

    Attributes:
      scope: name scope.
      is_backward: whether JAX's transposition made the equation.
      is_recomputed: whether it repeats the forward pass inside the backward pass, for
        `jax.checkpoint`.
      iterations: of the loops, where they are known.
      eqns: the equation, and those around it, the outermost first.
    """

    scope: str = ""
    is_backward: bool = False
    is_recomputed: bool = False
    iterations: tuple[int, ...] = ()
    eqns: tuple[Any, ...] = ()

    def enter(self, eqn: Any) -> Self:
        """Returns the place of an equation, and of what is inside it."""
        stack = str(eqn.source_info.name_stack)
        return self._replace(
            scope=join_scope(self.scope, eqn),
            is_backward=self.is_backward or "transpose(" in stack,
            is_recomputed=self.is_recomputed or "rematted_computation" in stack,
            eqns=(*self.eqns, eqn),
        )

    @property
    def source(self) -> str:
        """The user's source line, of the call where JAX's own code has none."""
        return next(filter(None, map(source_line, reversed(self.eqns))), "")

    def at(self, iteration: int) -> Self:
        """Returns the place inside an iteration of a loop."""
        return self._replace(iterations=(*self.iterations, iteration))
