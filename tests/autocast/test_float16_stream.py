"""Residual streams near float16's limit: where half by hand is finite, autocast is."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned

import mpjax

NUM_LAYERS = 4
WIDTH = 64
NORMS = (nn.LayerNorm, nn.RMSNorm)
SCALE = 2.0**-6  # of the loss: what leaves float16's range is the stream alone


class Layer(nn.Module):
    """Adds `step` times the normalized stream to the stream."""

    step: float
    norm: Any
    dtype: Any = None

    @nn.compact
    def __call__(self, x, _):
        y = self.norm(dtype=self.dtype)(x)
        init = lambda key, shape, dtype: self.step * jnp.eye(*shape, dtype=dtype)
        return x + nn.Dense(WIDTH, kernel_init=init, dtype=self.dtype)(y), None


class Stream(nn.Module):
    """Layers, unrolled or in a scan; then the mean of a normalized dense layer."""

    step: float
    norm: Any
    scan: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype or x.dtype)
        fields = (self.step, self.norm, self.dtype)
        if self.scan:
            stacked = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=NUM_LAYERS,
            )
            x, _ = stacked(*fields)(x, None)
        else:
            for _ in range(NUM_LAYERS):
                x, _ = Layer(*fields)(x, None)
        y = nn.Dense(1, dtype=self.dtype)(self.norm(dtype=self.dtype)(x))
        return jnp.mean(y.astype(jnp.float32)) * SCALE, jnp.max(jnp.abs(x))


def run(model, x, policy=None):
    """Returns the loss, the largest of the stream, and the gradient."""
    fn = jax.value_and_grad(model.apply, has_aux=True)
    cast = fn if policy is None else mpjax.autocast(fn, policy)
    init = model.clone(dtype=None).init
    return jax.jit(lambda x: cast(init(jax.random.key(0), x), x))(x)


def stream_inputs(kind, norm, largest):
    """Returns inputs, and the step with which their stream grows up to `largest`."""
    x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    if kind == "outlier":
        # The other units are far below the mean, and the outlier far above it.
        x[:, 0] += 8
        x[:, 1:] -= 8 / WIDTH
    normalized = norm().apply(norm().init(jax.random.key(0), x), x)
    return x, largest / NUM_LAYERS / float(jnp.max(jnp.abs(normalized)))


def is_finite(tree):
    return all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("norm", thinned(NORMS, rest="slow"))
@pytest.mark.parametrize("kind", thinned(["even", "outlier"], rest="slow"))
def test_it_is_finite_where_it_is_by_hand(kind, norm, scan):
    x, step = stream_inputs(kind, norm, 6e4)
    make = functools.partial(Stream, step, norm, scan)
    (_, largest), _ = by_hand = run(make(jnp.float16), x)
    assert largest > 5e4
    assert is_finite(by_hand)
    cast = run(make(), x, "mixed_float16")
    assert is_finite(cast)


@pytest.mark.parametrize("norm", thinned(NORMS, rest="slow"))
def test_the_float32_carry_of_a_scan_goes_beyond_float16(norm):
    x, step = stream_inputs("even", norm, 1.5e5)
    make = functools.partial(Stream, step, norm, True)
    (_, largest), _ = run(make(jnp.float16), x)
    assert not jnp.isfinite(largest)
    (_, largest), _ = cast = run(make(), x, "mixed_float16")
    assert largest > 1.4e5
    assert is_finite(cast)


def test_a_stream_less_its_mean_goes_beyond_float16():
    """The stream is at most 5e4, and 1e5 above its mean in one unit."""

    class Normalized(nn.Module):
        dtype: Any = None

        @nn.compact
        def __call__(self, x):
            x, _ = Layer(1.0, nn.LayerNorm, self.dtype)(x, None)
            y = nn.Dense(1, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
            return jnp.mean(y.astype(jnp.float32)) * SCALE, jnp.max(jnp.abs(x))

    x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    x += np.where(np.arange(WIDTH) == 0, 5e4, -5e4).astype(np.float32)
    assert float(np.max(x - x.mean(axis=-1, keepdims=True))) > 9e4
    assert is_finite(run(Normalized(dtype=jnp.float16), x.astype(np.float16)))
    assert is_finite(run(Normalized(), x, "mixed_float16"))
