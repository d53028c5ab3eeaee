"""How to train with each library under autocast, and what autocast refuses.

The recipes are complete: a model, a step, a loss that falls. Each puts autocast around
the gradient of a pure function and passes the model's state through it.
"""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import TraceContextError
from helpers.layers import matmul_dtypes, normal
from helpers.tools import assert_same_bits, thinned

import mpjax

X = normal(32, 8)
Y = np.sin(X @ normal(8, 4, seed=1) / 3)
POLICIES = ["mixed_bfloat16", "mixed_float16"]


def train(step, state, num_steps=20):
    """Returns the last state, the losses, and the jaxpr of the step."""
    closed = jax.make_jaxpr(step)(state, X, Y)
    step = jax.jit(step)
    losses = []
    for _ in range(num_steps):
        state, loss = step(state, X, Y)
        losses.append(float(loss))
    return state, losses, closed


def pytree_recipe(policy):
    """Parameters in a dict."""

    def loss_fn(params, x, y):
        h = jax.nn.relu(x @ params["w0"] + params["b0"])
        prediction = h @ params["w1"]
        return jnp.mean((prediction - y) ** 2), {"mean": prediction.mean()}

    params = {"w0": normal(8, 16) / 3, "b0": jnp.zeros(16), "w1": normal(16, 4) / 4}
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.adam(1e-2)
    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn, has_aux=True), policy)

    def step(state, x, y):
        params, opt_state = state
        (loss, _), grads = grad_fn(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return train(step, (params, tx.init(params)))


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(4)(nn.Dropout(0.1, deterministic=not train)(nn.relu(x)))


def linen_recipe(policy):
    """`apply` with mutable statistics; a key per step for the dropout."""
    model, tx = LinenModel(), optax.adam(1e-2)
    variables = model.init(jax.random.key(0), X, train=False)
    params, batch_stats = variables["params"], variables["batch_stats"]

    def loss_fn(params, batch_stats, key, x, y):
        prediction, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.mean((prediction - y) ** 2), updated["batch_stats"]

    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn, has_aux=True), policy)

    def step(state, x, y):
        params, batch_stats, opt_state, key = state
        key, dropout_key = jax.random.split(key)
        (loss, batch_stats), grads = grad_fn(params, batch_stats, dropout_key, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, batch_stats, opt_state, key), loss

    return train(step, (params, batch_stats, tx.init(params), jax.random.key(1)))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.encoder(x))
        return self.head(self.dropout(nnx.relu(x)))


def nnx_recipe(policy):
    """Split outside, merge inside with `copy=True`, return the new state."""
    graphdef, params, rest = nnx.split(NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    tx = optax.adam(1e-2)

    def loss_fn(params, rest, x, y):
        model = nnx.merge(graphdef, params, rest, copy=True)
        loss = jnp.mean((model(x) - y) ** 2)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn, has_aux=True), policy)

    def step(state, x, y):
        params, rest, opt_state = state
        (loss, rest), grads = grad_fn(params, rest, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), rest, opt_state), loss

    return train(step, (params, rest, tx.init(params)))


def equinox_model():
    return eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))


def equinox_recipe(policy):
    """The arrays are the parameters; the rest is closed over."""
    params, static = eqx.partition(equinox_model(), eqx.is_inexact_array)
    tx = optax.adam(1e-2)

    def loss_fn(params, x, y):
        prediction = jax.vmap(eqx.combine(params, static))(x)
        return jnp.mean((prediction - y) ** 2), None

    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn, has_aux=True), policy)

    def step(state, x, y):
        params, opt_state = state
        (loss, _), grads = grad_fn(params, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (eqx.apply_updates(params, updates), opt_state), loss

    return train(step, (params, tx.init(params)))


def equinox_module_recipe(policy):
    """The whole module goes in and comes out: its functions are static."""
    model, tx = equinox_model(), optax.adam(1e-2)

    def loss_fn(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    grad_fn = mpjax.autocast(eqx.filter_value_and_grad(loss_fn), policy)

    @eqx.filter_jit
    def step(model, opt_state, x, y):
        loss, grads = grad_fn(model, x, y)
        updates, opt_state = tx.update(grads, opt_state)
        return eqx.apply_updates(model, updates), opt_state, loss

    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    arrays, static = eqx.partition(model, eqx.is_array)
    closed = jax.make_jaxpr(lambda a: grad_fn(eqx.combine(a, static), X, Y)[0])(arrays)
    losses = []
    for _ in range(20):
        model, opt_state, loss = step(model, opt_state, X, Y)
        losses.append(float(loss))
    return eqx.filter(model, eqx.is_array), losses, closed


def haiku_recipe(policy):
    """`transform_with_state`: `apply` takes the state and returns the new one."""

    def forward(x):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16)(x), is_training=True)
        return hk.Linear(4)(hk.dropout(hk.next_rng_key(), 0.1, jax.nn.relu(x)))

    model, tx = hk.transform_with_state(forward), optax.adam(1e-2)
    params, model_state = model.init(jax.random.key(0), X)

    def loss_fn(params, model_state, key, x, y):
        prediction, model_state = model.apply(params, model_state, key, x)
        return jnp.mean((prediction - y) ** 2), model_state

    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn, has_aux=True), policy)

    def step(state, x, y):
        params, model_state, opt_state, key = state
        key, dropout_key = jax.random.split(key)
        (loss, model_state), grads = grad_fn(params, model_state, dropout_key, x, y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, model_state, opt_state, key), loss

    return train(step, (params, model_state, tx.init(params), jax.random.key(1)))


RECIPES = {
    "pytree": pytree_recipe,
    "linen": linen_recipe,
    "nnx": nnx_recipe,
    "equinox": equinox_recipe,
    "equinox_module": equinox_module_recipe,
    "haiku": haiku_recipe,
}
HAS_BATCH_NORM = ("linen", "nnx", "haiku")


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("name", thinned(RECIPES))
def test_a_recipe_trains(name, policy):
    state, losses, closed = RECIPES[name](policy)
    _, full_losses, _ = RECIPES[name]("float32")
    assert losses[-1] < 0.5 * losses[0]
    assert losses != full_losses
    np.testing.assert_allclose(losses, full_losses, rtol=0.05)
    dtypes = [each for found in matmul_dtypes(closed).values() for each in found]
    assert len(dtypes) >= 4
    assert all(each == {policy.removeprefix("mixed_")} for each in dtypes)
    for leaf in jax.tree.leaves(state):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == jnp.float32
    if name in HAS_BATCH_NORM:
        statistics = jax.tree.leaves(state[1])
        assert any(
            np.abs(np.asarray(x)).max() > 0.05 for x in statistics if x.size == 16
        )


MODULES = {
    "Module": lambda: NNXModel(nnx.Rngs(0)),
    "Rngs": lambda: nnx.Rngs(0),
    "Optimizer": lambda: nnx.Optimizer(
        NNXModel(nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param
    ),
}
PLACES = {
    "alone": lambda fn, module: fn(module),
    "in a dict": lambda fn, module: fn({"a": [module, X]}),
    "by keyword": lambda fn, module: fn(X, extra={"m": module}),
}


@pytest.mark.parametrize("wrap", [mpjax.autocast, mpjax.full_precision])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", MODULES)
def test_an_nnx_object_among_the_arguments_is_refused(kind, place, wrap):
    """Its updates would be lost."""

    def never(*args, **kwargs):
        raise AssertionError("called")

    with pytest.raises(TypeError, match=r"nnx\.split(.|\n)*nnx\.merge"):
        PLACES[place](wrap(never), MODULES[kind]())


def test_what_nnx_splits_into_is_not_refused():
    graphdef, state = nnx.split(NNXModel(nnx.Rngs(0)))
    fn = lambda s, x: nnx.merge(graphdef, s, copy=True)(x)
    y = mpjax.autocast(fn)(state, X)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, fn(state, X), rtol=0.05, atol=0.05)


def test_an_nnx_module_closed_over_is_not_written_silently():
    """NNX itself refuses to write statistics from inside another trace."""
    model = NNXModel(nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.BatchStat))
    with pytest.raises(TraceContextError, match="different trace level"):
        mpjax.autocast(lambda x: model(x))(X)
    assert_same_bits(nnx.state(model, nnx.BatchStat), before)


class LinenInside(nn.Module):
    """Autocast around a layer, inside of the module that owns it."""

    @nn.compact
    def __call__(self, x):
        x = mpjax.autocast(lambda x: nn.Dense(4)(x))(x)
        return nn.LayerNorm()(x)


def test_around_init_it_works():
    """The parameters are bitwise the same as without autocast."""
    key = jax.random.key(0)
    init = functools.partial(LinenModel().init, train=False)
    params = mpjax.autocast(init, "mixed_float16")(key, X)
    assert_same_bits(params, jax.jit(init)(key, X))


def test_inside_a_module_nothing_is_created_silently():
    """As with `jax.jit`, parameters created inside cannot be used outside."""
    variables = LinenInside().init(jax.random.key(0), X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        variables["params"]["Dense_0"]["kernel"] + 1

    model = hk.transform(lambda x: mpjax.autocast(lambda x: hk.Linear(4)(x))(x))
    params = model.init(jax.random.key(0), X)
    with pytest.raises(jax.errors.UnexpectedTracerError):
        params["linear"]["w"] + 1


def test_inside_a_module_that_has_its_parameters_it_works():
    kernel = jnp.asarray(normal(8, 4, seed=1))
    params = {
        "Dense_0": {"kernel": kernel, "bias": jnp.zeros(4)},
        "LayerNorm_0": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
    }
    apply = lambda x: LinenInside().apply({"params": params}, x)
    (dtypes,) = matmul_dtypes(jax.make_jaxpr(apply)(X)).values()
    assert dtypes == [{"bfloat16"}]
    truth = nn.LayerNorm().apply({"params": params["LayerNorm_0"]}, X @ kernel)
    np.testing.assert_allclose(apply(X), truth, atol=0.05)
