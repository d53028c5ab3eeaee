"""Rules by layer: the name scopes of each library, forward and backward.

Linen and Haiku name their layers. Elsewhere `jax.named_scope` does, and the name holds
through jit, scan, checkpoint and the gradient.
"""

import re

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers.layers import matmul_dtypes, normal

import mpjax

X = normal(32, 8)


class ScopedLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.tanh(nn.Dense(16)(x)))


def scoped_linen():
    model = ScopedLinen()
    return lambda p, x: model.apply(p, x), model.init(jax.random.key(0), X)


def scoped_haiku():
    forward = lambda x: hk.Linear(4)(jnp.tanh(hk.Linear(16)(x)))
    model = hk.without_apply_rng(hk.transform(forward))
    return model.apply, model.init(jax.random.key(0), X)


class ScopedNNX(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(8, 16, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        with jax.named_scope("encoder"):
            x = jnp.tanh(self.encoder(x))
        with jax.named_scope("head"):
            return self.head(x)


def scoped_nnx():
    graphdef, state = nnx.split(ScopedNNX(nnx.Rngs(0)))
    return lambda s, x: nnx.merge(graphdef, s, copy=True)(x), state


class ScopedEquinox(eqx.Module):
    encoder: eqx.nn.Linear
    head: eqx.nn.Linear

    def __call__(self, x):
        with jax.named_scope("encoder"):
            x = jnp.tanh(self.encoder(x))
        with jax.named_scope("head"):
            return self.head(x)


def scoped_equinox():
    keys = jax.random.split(jax.random.key(0))
    model = ScopedEquinox(
        eqx.nn.Linear(8, 16, key=keys[0]), eqx.nn.Linear(16, 4, key=keys[1])
    )
    return lambda m, x: jax.vmap(m)(x), model


def scoped_calls():
    """Scopes inside a scan, a checkpoint and a jit."""
    params = {"encoder": normal(3, 8, 8) / 3, "head": normal(8, 4) / 3}

    def layer(h, w):
        with jax.named_scope("encoder"):
            return jnp.tanh(h @ w), None

    @jax.jit
    def head(h, w):
        with jax.named_scope("head"):
            return h @ w

    def fn(params, x):
        h, _ = jax.lax.scan(jax.checkpoint(layer), x, params["encoder"])
        return jax.checkpoint(head)(h, params["head"])

    return fn, params


# The maker of the function, and the names of its two layers.
SCOPED = {
    "linen": (scoped_linen, "Dense_0", "Dense_1"),
    "haiku": (scoped_haiku, r"linear$", "linear_1"),
    "nnx": (scoped_nnx, "encoder", "head"),
    "equinox": (scoped_equinox, "encoder", "head"),
    "calls": (scoped_calls, "encoder", "head"),
}


def matmuls_under(rules, library, form):
    """Returns the dtypes of the matmuls in each of the two layers."""
    make, first, second = SCOPED[library]
    fn, params = make()
    loss = lambda p, x: jnp.mean(fn(p, x) ** 2)
    grad = {
        "outside": mpjax.autocast(jax.grad(loss), rules),
        "inside": jax.grad(mpjax.autocast(loss, rules)),
    }[form]
    found = matmul_dtypes(jax.make_jaxpr(grad)(params, X))
    per_layer = [
        [each for scope in found if re.search(name, scope) for each in found[scope]]
        for name in (first, second)
    ]
    assert sum(map(len, per_layer)) == sum(map(len, found.values()))
    assert min(map(len, per_layer)) >= 2
    return per_layer


@pytest.mark.parametrize("form", ["outside", "inside"])
@pytest.mark.parametrize("library", SCOPED)
def test_rules_by_layer(library, form):
    _, first, second = SCOPED[library]
    rules = mpjax.PolicyRules([(second, "float32")], default="mixed_bfloat16")
    encoder, head = matmuls_under(rules, library, form)
    assert all(dtypes == {"bfloat16"} for dtypes in encoder)
    assert all(dtypes == {"float32"} for dtypes in head)
    assert rules.unused_rules() == ()

    rules = mpjax.PolicyRules(
        [(first, "mixed_bfloat16"), (second, "mixed_float16"), ("haed", "float32")],
        default="float32",
    )
    encoder, head = matmuls_under(rules, library, form)
    assert all(dtypes == {"bfloat16"} for dtypes in encoder)
    assert all(dtypes == {"float16"} for dtypes in head)
    assert rules.unused_rules() == ("haed",)


def scopes(fn, *args):
    return set(matmul_dtypes(jax.make_jaxpr(fn)(*args)))


def test_which_libraries_name_their_layers():
    """Linen and Haiku by instance, Equinox by class, NNX not at all."""
    assert scopes(*scoped_linen(), X) == {"ScopedLinen/Dense_0", "ScopedLinen/Dense_1"}
    assert scopes(*scoped_haiku(), X) == {"linear", "linear_1"}
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    assert scopes(jax.vmap(mlp), X) == {"eqx.nn.MLP/eqx.nn.Linear"}
    graphdef, state = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    assert scopes(lambda s, x: nnx.merge(graphdef, s)(x), state, X) == {""}
