"""Stops a run that loss scaling cannot save, from outside the jitted step."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mpjax.loss_scale import as_loss_scale


class NonFiniteTrainingError(RuntimeError):
    """Gradients stay non-finite although the loss scale is at its minimum.

    Attributes:
      found: the operation that made the first Inf or NaN, a
        `mpjax.numerics.NonFinite`; None if no search was made.
    """

    def __init__(self, message: str, found: Any = None):
        super().__init__(message)
        self.found = found


class NonFiniteGuard:
    """Watches the metrics of a train step and raises once skipping has become hopeless.

    A few skipped steps are how dynamic loss scaling works. Skips at the smallest scale
    are not: then the data, the model or the learning rate makes the Inf or NaN, or
    a parameter that need not be trained, which `TrainState.create(trainable=)` freezes.

    >>> import mpjax
    >>> guard = NonFiniteGuard(mpjax.NoOpLossScale(), max_consecutive_skipped=2)
    >>> guard.check({"grads_finite": False, "loss_scale": 1.0, "loss": float("nan")})
    """

    def __init__(self, loss_scale: Any, *, max_consecutive_skipped: int = 20):
        """Starts with no skipped steps.

        Args:
          loss_scale: as given to `with_loss_scale`; its `min_loss_scale` is the minimum
            (1 where it has none).
          max_consecutive_skipped: skips in a row at the minimum before it raises, at
            least 1.

        Raises:
          ValueError: if `max_consecutive_skipped` is less than 1.
          TypeError: if `loss_scale` is none.
        """
        if max_consecutive_skipped < 1:
            raise ValueError(
                f"max_consecutive_skipped={max_consecutive_skipped} must be at least 1."
            )
        loss_scale = as_loss_scale(loss_scale)
        self.min_loss_scale = float(getattr(loss_scale, "min_loss_scale", 1.0))
        self.max_consecutive_skipped = max_consecutive_skipped
        self.num_consecutive_skipped = 0

    def check(
        self, metrics: dict[str, Any], find: Callable[[], Any] | None = None
    ) -> None:
        """Counts one step, or several stacked along a first axis.

        Reads `grads_finite` and `loss_scale`; on device arrays this waits for the step,
        so a loop calls it on metrics of steps that are done.

        Args:
          metrics: metrics of `make_train_step`.
          find: called before the error is raised, which then names its result:
            `lambda: mpjax.numerics.find_nonfinite(train_step)(state, batch)`. Nothing
            moves on a skipped step, so the newest state will do.

        Raises:
          NonFiniteTrainingError: after too many skips in a row at the minimum; the
            message names the metrics at hand, and what `find` found.
        """
        metrics = jax.device_get(metrics)
        finite = np.atleast_1d(metrics["grads_finite"])
        scales = np.broadcast_to(metrics["loss_scale"], finite.shape)
        for index, (is_finite, scale) in enumerate(zip(finite, scales, strict=True)):
            hopeless = not is_finite and scale <= self.min_loss_scale
            self.num_consecutive_skipped = (
                self.num_consecutive_skipped + 1 if hopeless else 0
            )
            if self.num_consecutive_skipped >= self.max_consecutive_skipped:
                found = find() if find is not None else None
                raise NonFiniteTrainingError(
                    self._message(metrics, index, found), found
                )

    def _message(self, metrics: dict[str, Any], index: int, found: Any) -> str:
        seen = ", ".join(
            f"{name}={np.atleast_1d(value)[min(index, np.size(value) - 1)]}"
            for name, value in metrics.items()
            if np.ndim(value) <= 1 and np.size(value)
        )
        cause = (
            f"The first Inf or NaN: {found}"
            if found is not None
            else "Look for NaN or Inf in the data, a division by zero or log of zero "
            "in the loss, or a learning rate that is too large."
        )
        return (
            f"the gradients were not finite in {self.num_consecutive_skipped} steps in "
            f"a row at the smallest loss scale ({self.min_loss_scale:g}), so loss "
            f"scaling cannot help. The last step had {seen}. {cause}"
        )
