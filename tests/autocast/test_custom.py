"""Functions with custom derivatives: nobody asks a rule for more than JAX would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned
from jax.custom_derivatives import SymbolicZero
from jax.experimental.ode import odeint

import mpjax

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
N = jnp.float32(2.0)


@jax.custom_vjp
def scaled_by_vjp(x, n):
    return jnp.tanh(x @ x) * n


def _forward(x, n):
    assert x.perturbed, "x is differentiated"
    assert not n.perturbed, "n is a constant"
    return scaled_by_vjp(x.value, n.value), (x.value, n.value)


def _backward(residuals, cotangent):
    x, n = residuals
    return jax.vjp(lambda x: jnp.tanh(x @ x) * n, x)[1](cotangent)[0], None


scaled_by_vjp.defvjp(_forward, _backward, symbolic_zeros=True)


@jax.custom_jvp
def scaled_by_jvp(x, n):
    return jnp.tanh(x @ x) * n


def _rule(primals, tangents):
    (x, n), (dx, dn) = primals, tangents
    assert isinstance(dn, SymbolicZero), "n is a constant"
    return jax.jvp(lambda x: jnp.tanh(x @ x) * n, (x,), (dx,))


scaled_by_jvp.defjvp(_rule, symbolic_zeros=True)


@jax.custom_vjp
def two_outputs(x):
    return x @ x, jnp.tanh(x)


two_outputs.defvjp(
    lambda x: (two_outputs(x), x),
    lambda x, g: (g[0] @ x.T + x.T @ g[0] + g[1] * (1 - jnp.tanh(x) ** 2),),
)


def solved(a):
    """A neural ODE, whose adjoint is a `custom_vjp` over times and weights."""
    times = jnp.linspace(0.0, 1.0, 3)
    return odeint(lambda h, t: jnp.tanh(h @ a), jnp.ones((2, 3)), times)[-1]


FUNCTIONS = {
    "custom_vjp": lambda x: scaled_by_vjp(x, N),
    "custom_jvp": lambda x: scaled_by_jvp(x, N),
    "custom_vjp in a scan": lambda x: jax.lax.scan(
        lambda h, n: (scaled_by_vjp(h, n), None), x, jnp.ones(3)
    )[0],
    "custom_vjp in a checkpoint": jax.checkpoint(lambda x: scaled_by_vjp(x, N)),
    "custom_vjp, mapped": lambda x: jax.vmap(scaled_by_vjp, (0, None))(
        jnp.stack([x, 2 * x]), N
    ),
    "one output of two": lambda x: two_outputs(x)[0],
    "an integer input": lambda x: scaled_by_vjp(x, jnp.int32(2)),
    "odeint": solved,
}


@pytest.mark.parametrize(
    "policy",
    ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", thinned(FUNCTIONS))
def test_constants_are_not_differentiated(name, policy):
    loss = lambda x: jnp.sum(FUNCTIONS[name](x) ** 2)
    right = jax.grad(loss)(X)
    bound = {"mixed_bfloat16": 0.05, "mixed_float16": 0.01}[policy]
    for found in (
        jax.grad(mpjax.autocast(loss, policy))(X),
        jax.jit(jax.grad(mpjax.autocast(loss, policy)))(X),
        mpjax.autocast(jax.grad(loss), policy)(X),
        jax.grad(loss)(X),  # no trace of the others is left in JAX's caches
    ):
        error = np.linalg.norm(found - right) / np.linalg.norm(right)
        assert error < bound


def test_what_is_differentiated_for_all_inputs_has_all_derivatives():
    fn = lambda x, y: two_outputs(x)[0] * two_outputs(y)[1]
    loss = lambda x, y: jnp.sum(fn(x, y))
    right = jax.grad(loss, (0, 1))(X, X.T)
    found = jax.grad(mpjax.autocast(loss), (0, 1))(X, X.T)
    for x, y in zip(found, right, strict=True):
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 0.02
