"""What becomes of weight gradients and updates in float16, counted in the train step.

"Mixed Precision Training", arXiv:1710.03740, section 3.1: Figure 2b shows exponents of
weight gradients; an update less than a 2048th of its weight is lost in float16.

P denotes the number of floating parameters (leaves).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.float16_updates import round_to_float16
from mpjax.numerics import ExponentHistogram, empty_histogram, exponent_histogram

_WORD = 2**32


class Counts(NamedTuple):
    """Counts beyond 32 bits; trees of uint32 arrays of one structure.

    Attributes:
      low: the count modulo 2**32.
      high: multiples of 2**32.
    """

    low: Any
    high: Any


class TrackedUpdates(NamedTuple):
    """State of `track_updates`.

    Attributes:
      gradients: `Counts` of an `ExponentHistogram` of the gradients of all steps.
      num_nonzero: `Counts` of (P,): updates that are not zero, over all steps.
      num_zeroed: `Counts` of (P,): those of them that float16 rounds to zero.
      num_lost: `Counts` of (P,): those that leave a float16 weight as it is, the zeroed
        ones included.
      magnitude: float32 (P,): sum of |update|.
      lost_magnitude: float32 (P,): sum of |update| of those lost.
      last_share: float32 (P,): share of the last step's nonzero updates that is lost.
      inner_state: the state of the wrapped optimizer.
    """

    gradients: Counts
    num_nonzero: Counts
    num_zeroed: Counts
    num_lost: Counts
    magnitude: jax.Array
    lost_magnitude: jax.Array
    last_share: jax.Array
    inner_state: Any


def track_updates(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Counts, at every step, what float16 would make of gradients and updates.

    The updates are those of `tx`, bitwise. Put it inside `mpjax.with_loss_scale`, where
    it sees unscaled float32 gradients, and inside `with_master_weights`,
    `with_stochastic_rounding` or `with_float16_updates`, where it sees updates before
    they are rounded. A skipped step leaves the state as it is, and so counts nothing.

    An update is lost if round(w + round(update)) is w, where w is the weight rounded to
    float16: for float16 weights what happens, for float32 weights what would.

    Args:
      tx: any optax transform, for trees with at least one floating leaf.

    Returns:
      An optax transform with the state `TrackedUpdates`; its `update` needs `params`
      (ValueError without them).
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Any) -> TrackedUpdates:
        num = len(_floating(params))
        counts, sums = np.zeros(num, np.uint32), jnp.zeros(num, jnp.float32)
        return TrackedUpdates(
            gradients=_no_counts(empty_histogram()),
            num_nonzero=_no_counts(counts),
            num_zeroed=_no_counts(counts),
            num_lost=_no_counts(counts),
            magnitude=sums,
            lost_magnitude=sums,
            last_share=sums,
            inner_state=tx.init(params),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any):
        if params is None:
            raise ValueError(
                "track_updates compares updates with their parameters and needs them: "
                "call tx.update(grads, opt_state, params)."
            )
        grads = updates
        updates, inner_state = tx.update(grads, state.inner_state, params, **extra_args)
        pairs = zip(_floating(params), _floating(updates), strict=True)
        rows = [_examine(w, update) for w, update in pairs]
        nonzero, zeroed, lost, magnitude, lost_magnitude = map(
            jnp.stack, zip(*rows, strict=True)
        )
        return updates, TrackedUpdates(
            gradients=_add(state.gradients, exponent_histogram(_flat(grads))),
            num_nonzero=_add(state.num_nonzero, nonzero),
            num_zeroed=_add(state.num_zeroed, zeroed),
            num_lost=_add(state.num_lost, lost),
            magnitude=state.magnitude + magnitude,
            lost_magnitude=state.lost_magnitude + lost_magnitude,
            last_share=lost / jnp.maximum(nonzero, 1).astype(jnp.float32),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def tracked(opt_state: Any) -> TrackedUpdates:
    """Returns the state of `track_updates` inside an optimizer's state.

    Raises:
      ValueError: unless there is exactly one.
    """
    is_tracked = lambda x: isinstance(x, TrackedUpdates)
    found = [*filter(is_tracked, jax.tree.leaves(opt_state, is_leaf=is_tracked))]
    if len(found) != 1:
        raise ValueError(
            f"expected one optimizer in track_updates, found {len(found)}; wrap it "
            "once: with_loss_scale(track_updates(tx))."
        )
    return found[0]


def read_tracked(opt_state: Any, params: Any) -> dict[str, Any]:
    """Returns what was counted since the first step, as JSON values.

    Args:
      opt_state: a state that holds that of `track_updates`.
      params: the parameters, for their names.

    Returns:
      `gradients`, as `histogram_from_json` reads it; and `updates`, for the path of
      each floating parameter `num_nonzero`, `num_zeroed`, `num_lost`, `magnitude`,
      `lost_magnitude` and `last_share` (see `TrackedUpdates`).
    """
    state = jax.device_get(tracked(opt_state))
    counted = {
        name: _totals(getattr(state, name)).tolist()
        for name in ("num_nonzero", "num_zeroed", "num_lost")
    }
    measured = {
        name: getattr(state, name).tolist()
        for name in ("magnitude", "lost_magnitude", "last_share")
    }
    columns = counted | measured
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [_name(path) for path, leaf in leaves if _is_floating(leaf)]
    return {
        "gradients": _histogram_to_json(_totals(state.gradients)),
        "updates": {
            name: {key: values[index] for key, values in columns.items()}
            for index, name in enumerate(names)
        },
    }


def histogram_from_json(values: dict[str, Any]) -> ExponentHistogram:
    """Returns the histogram that `read_tracked` wrote, with NumPy counts."""
    arrays = {key: np.asarray(value, np.int64) for key, value in values.items()}
    lo, hi = int(arrays.pop("lo")), int(arrays.pop("hi"))
    return ExponentHistogram(**arrays, lo=lo, hi=hi)


def share_below(histogram: ExponentHistogram, exponent: int) -> float:
    """Returns the share of nonzero numbers with magnitudes below 2**exponent.

    >>> numbers = jnp.array([0.0, 0.25, 0.5, 1.0, 3.0])
    >>> share_below(exponent_histogram(numbers), 0)
    0.5
    """
    num = int(histogram.num_nonzero)
    counts = np.asarray(histogram.counts)[histogram.exponents < exponent]
    return (int(counts.sum()) + int(histogram.below)) / num if num else float("nan")


def _examine(weights: jax.Array, updates: jax.Array) -> tuple[jax.Array, ...]:
    """Returns a leaf's counts of nonzero, zeroed and lost, and the magnitudes."""
    weights = round_to_float16(weights.astype(jnp.float32))
    updates = updates.astype(jnp.float32)
    rounded = round_to_float16(updates)
    is_nonzero = updates != 0
    is_lost = is_nonzero & (round_to_float16(weights + rounded) == weights)
    magnitudes = jnp.abs(updates)
    return (
        jnp.sum(is_nonzero),
        jnp.sum(is_nonzero & (rounded == 0)),
        jnp.sum(is_lost),
        jnp.sum(magnitudes),
        jnp.sum(jnp.where(is_lost, magnitudes, 0)),
    )


def _no_counts(like: Any) -> Counts:
    low, high = (
        jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.uint32), like)
        for _ in range(2)
    )
    return Counts(low, high)


def _add(counts: Counts, more: Any) -> Counts:
    low = jax.tree.map(lambda a, b: a + b.astype(jnp.uint32), counts.low, more)
    high = jax.tree.map(
        lambda high, before, after: high + (after < before).astype(jnp.uint32),
        counts.high,
        counts.low,
        low,
    )
    return Counts(low, high)


def _totals(counts: Counts) -> Any:
    """Returns the counts as int64 NumPy arrays."""
    return jax.tree.map(
        lambda low, high: np.int64(low) + _WORD * np.int64(high),
        counts.low,
        counts.high,
    )


def _histogram_to_json(histogram: ExponentHistogram) -> dict[str, Any]:
    names = ("class_counts", "zeros", "below", "above", "infs", "nans")
    values = {name: np.asarray(getattr(histogram, name)).tolist() for name in names}
    return values | {"lo": histogram.lo, "hi": histogram.hi}


def _floating(tree: Any) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if _is_floating(x)]


def _flat(tree: Any) -> jax.Array:
    """Returns all numbers of a tree: one long count compiles faster than many."""
    return jnp.concatenate([x.reshape(-1) for x in _floating(tree)])


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
