"""Where in a function an equation is."""

from typing import Any, NamedTuple, Self

from mpjax._jaxpr import join_scope


class Place(NamedTuple):
    """What is around an equation, from the outermost on.

    Attributes:
      scope: name scope.
      is_backward: whether JAX's transposition made the equation.
      is_recomputed: whether it repeats the forward pass inside the backward pass, for
        `jax.checkpoint`.
      iterations: of the loops, where they are known.
    """

    scope: str = ""
    is_backward: bool = False
    is_recomputed: bool = False
    iterations: tuple[int, ...] = ()

    def enter(self, eqn: Any) -> Self:
        """Returns the place of an equation, and of what is inside it."""
        stack = str(eqn.source_info.name_stack)
        return self._replace(
            scope=join_scope(self.scope, eqn),
            is_backward=self.is_backward or "transpose(" in stack,
            is_recomputed=self.is_recomputed or "rematted_computation" in stack,
        )

    def at(self, iteration: int) -> Self:
        """Returns the place inside an iteration of a loop."""
        return self._replace(iterations=(*self.iterations, iteration))
