"""Optimizers for parameters that are kept in half precision.

An update much smaller than its weight rounds away: |w| / |dw| >= 2048 loses every
float16 update ("Mixed Precision Training", section 3.1). Either the optimizer keeps a
float32 master copy, or it rounds stochastically, so that the mean is right.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mpjax._tree import is_half, to_full


class MasterWeightsState(NamedTuple):
    """State of `with_master_weights`.

    Attributes:
      master: like params, float32 copies of the half leaves and None elsewhere.
      inner_state: the state of the wrapped optimizer, built from float32 parameters.
    """

    master: Any
    inner_state: Any


class StochasticRoundingState(NamedTuple):
    """State of `with_stochastic_rounding`.

    Attributes:
      num_updates: int32 scalar; together with the seed it gives the random bits.
      inner_state: the state of the wrapped optimizer, built from float32 parameters.
    """

    num_updates: jax.Array
    inner_state: Any


def with_master_weights(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Keeps a float32 copy of half-precision parameters and updates that.

    `tx` sees float32 gradients and parameters. The returned updates, applied with
    `optax.apply_updates`, leave each half parameter as its master copy rounded to
    nearest. Float32 leaves have no copy. The 1.5x weight memory is the paper's.

    Args:
      tx: any optax transform.

    Returns:
      An optax transform; its `update` needs `params` (ValueError without them).
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        master = jax.tree.map(lambda p: to_full(p) if is_half(p) else None, params)
        return MasterWeightsState(master, tx.init(_full_copy(master, params)))

    def update(updates, state, params=None, **extra_args):
        _require_params(params, "with_master_weights")
        full = _full_copy(state.master, params)
        updates, inner_state = tx.update(
            jax.tree.map(to_full, updates), state.inner_state, full, **extra_args
        )
        new_full = jax.tree.map(lambda p, u: p + u.astype(p.dtype), full, updates)
        master = jax.tree.map(
            lambda m, new: None if m is None else new,
            state.master,
            new_full,
            is_leaf=lambda x: x is None,
        )
        updates = jax.tree.map(
            lambda p, new, u: (
                _step_to(p, _round_to_nearest(new, p.dtype)) if is_half(p) else u
            ),
            params,
            new_full,
            updates,
        )
        return updates, MasterWeightsState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def with_stochastic_rounding(
    tx: optax.GradientTransformation, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Rounds each new half-precision parameter up or down at random, without bias.

    The parameter moves to one of its two neighbours in half precision with the
    probability that makes the expectation exact, so that updates far below the spacing
    of bfloat16 still add up. No master copy is kept.

    `tx` sees float32 gradients and parameters, and keeps float32 moments.

    Args:
      tx: any optax transform.
      seed: seed of the random bits; the same seed and step give the same rounding.

    Returns:
      An optax transform; its `update` needs `params` (ValueError without them).
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        full = jax.tree.map(to_full, params)
        return StochasticRoundingState(jnp.zeros((), jnp.int32), tx.init(full))

    def update(updates, state, params=None, **extra_args):
        _require_params(params, "with_stochastic_rounding")
        full = jax.tree.map(to_full, params)
        updates, inner_state = tx.update(
            jax.tree.map(to_full, updates), state.inner_state, full, **extra_args
        )
        leaves, treedef = jax.tree.flatten(params)
        key = jax.random.fold_in(jax.random.key(seed), state.num_updates)
        keys = treedef.unflatten(
            list(jax.random.split(key, max(len(leaves), 1)))[: len(leaves)]
        )

        def rounded(p, u, key):
            if not is_half(p):
                return u
            new = to_full(p) + u.astype(jnp.float32)
            return _step_to(p, stochastic_round(new, p.dtype, key))

        updates = jax.tree.map(rounded, params, updates, keys)
        num_updates = jnp.asarray(optax.safe_increment(state.num_updates))
        return updates, StochasticRoundingState(num_updates, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_round(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    """Rounds a float32 array to a narrower dtype so that the expectation is `x`.

    Args:
      x: float32 array of any shape.
      dtype: a floating dtype narrower than float32.
      key: PRNG key.

    Returns:
      Array of `dtype` with the shape of `x`. A value that `dtype` represents stays as
      it is; a value beyond its largest finite number rounds to nearest.
    """
    nearest = _round_to_nearest(x, dtype)
    error = x - nearest.astype(jnp.float32)
    largest = jnp.finfo(dtype).max
    other = jnp.nextafter(nearest, jnp.where(error > 0, largest, -largest))
    gap = other.astype(jnp.float32) - nearest.astype(jnp.float32)
    chance = jax.random.uniform(key, x.shape)
    move = (chance * jnp.abs(gap) < jnp.abs(error)) & jnp.isfinite(nearest)
    return jnp.where(move, other, nearest)


def _round_to_nearest(x: jax.Array, dtype: Any) -> jax.Array:
    """Casts to half, by a cast that XLA:GPU does not leave out.

    By default (`xla_allow_excess_precision`) it leaves out a cast to half and back. The
    rounding error would be x - x, and stochastic rounding would round to nearest.
    """
    return jax.lax.optimization_barrier(x.astype(dtype))


def _step_to(param: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the float32 update by which `optax.apply_updates` reaches `target`."""
    return to_full(target) - to_full(param)


def _full_copy(master: Any, params: Any) -> Any:
    return jax.tree.map(
        lambda m, p: p if m is None else m, master, params, is_leaf=lambda x: x is None
    )


def _require_params(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(
            f"{name} rounds to the parameters' dtype and needs them: call "
            "tx.update(grads, opt_state, params)."
        )
