"""Planted faults: operation, line and cause of each; healthy code gives None."""

import inspect
import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import faults
from helpers.faults import FAULTS, W, X, gradient, inside_jit, log_of_negative
from helpers.tools import thinned
from jax import lax, nn

import mpjax
from mpjax.numerics import _causes as causes
from mpjax.numerics import find_nonfinite


def original(fn):
    return inspect.unwrap(fn)


def marked_line(fn):
    lines, start = inspect.getsourcelines(original(fn))
    (line,) = [start + i for i, text in enumerate(lines) if "# here" in text]
    return line


@pytest.mark.parametrize("jitted", thinned([True, False]), ids=["jit", ""])
@pytest.mark.parametrize(
    "fault", thinned(FAULTS, 3), ids=lambda f: original(f.fn).__name__
)
def test_a_planted_fault_is_found(fault, jitted):
    fn = jax.jit(fault.fn) if jitted else fault.fn
    found = find_nonfinite(fn)(*fault.args)
    assert found is not None
    assert (found.primitive, found.cause) == (fault.primitive, fault.cause), str(found)
    assert f"faults.py:{marked_line(fault.fn)}" in found.source
    assert found.iterations == fault.iterations
    assert found.is_backward == fault.is_backward
    assert found.num_nan + found.num_inf > 0
    text = str(found)
    assert text.startswith(fault.cause)
    assert found.remedy
    assert text.endswith(found.remedy)
    assert (", backward pass" in text) == fault.is_backward


def test_a_difference_of_half_results_names_the_matmul():
    """Also where the difference is clipped, and its derivative divides by zero."""
    args = faults.NEAR, faults.CENTERS
    for fn, primitive in (
        (faults.distances, "sqrt"),
        (faults.gradient_of_clipped_distances, "div"),
    ):
        found = find_nonfinite(fn)(*args)
        assert (found.primitive, found.cause) == (primitive, causes.CANCELLATION)
        assert found.matmul.startswith("dot_general at faults.py:")
        assert found.matmul in str(found)
        assert "full_precision" in found.remedy
        full = find_nonfinite(mpjax.full_precision(original(fn)))(*args)
        assert full is None


def test_there_are_enough():
    assert len(FAULTS) >= 25


@pytest.mark.parametrize(("value", "what"), [(np.nan, "1 NaN"), (-np.inf, "1 Inf")])
def test_an_input_is_named_with_its_index(value, what):
    batch = {"image": X.copy(), "label": np.arange(3)}
    batch["image"][1, 2] = value
    loss = lambda params, batch, *, scale: (
        scale * jnp.sum(nn.relu(batch["image"] @ params["w"] + params["b"]) ** 2)
    )
    params = {"w": W, "b": np.zeros(4, np.float32)}
    found = find_nonfinite(gradient(loss))(params, batch, scale=1.0)
    assert found.cause == causes.INPUT
    assert found.leaf == "args[1]['image']"
    assert found.index == (1, 2)
    assert found.dtype == "float32"
    assert what in str(found)
    assert "args[1]['image']" in str(found)
    named = find_nonfinite(lambda *, x: x * 2)(x=batch["image"])
    assert named.leaf == "kwargs['x']"


def masked_softmax(x):
    mask = jnp.array([True, False, True, True])
    return jnp.sum(nn.softmax(jnp.where(mask, x, -jnp.inf)) ** 2)


def safe_log(x):
    return jnp.sum(jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1)), 0))


def masked_nan(x):
    return jnp.where(x > 0, jnp.log(x), 0)


def log_space(x):
    def body(alpha, x):
        return jnp.logaddexp(alpha, jnp.roll(alpha, 1)) + x, alpha.max()

    start = jnp.full(4, -jnp.inf).at[0].set(0.0)
    return lax.scan(body, start, x)[0][0]


def vanishing(x):
    return jnp.exp(jnp.log(x * 0))


def attention(x):
    causal = jnp.tril(jnp.ones((3, 3), bool))
    return jnp.sum(
        nn.dot_product_attention(
            x[None, :, None],
            x[None, :, None],
            x[None, :, None],
            mask=causal[None, None],
        )
    )


HEALTHY = {
    "masked softmax": gradient(masked_softmax),
    "safe log": gradient(safe_log),
    "masked nan": masked_nan,
    "log space": log_space,
    "exp of -inf": vanishing,
    "attention": gradient(attention),
    "integers": lambda x: jnp.argsort(x),
    "nothing": lambda x: (),
    "autocast": mpjax.autocast(gradient(lambda x: jnp.sum(jnp.tanh(x @ W))), "float16"),
    "keys": lambda x: jax.random.normal(jax.random.key(0), x.shape) + x,
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_function_gives_none(name):
    assert find_nonfinite(HEALTHY[name])(X) is None
    assert find_nonfinite(jax.jit(HEALTHY[name]))(X) is None


def test_a_mask_is_not_blamed_for_what_goes_wrong_beside_it():
    def fn(x):
        masked = jnp.where(jnp.array([True, False, True, True]), x, -jnp.inf)
        big = jnp.exp(masked * 1000)  # here
        return big / big.sum()

    found = find_nonfinite(fn)(X)
    assert (found.primitive, found.cause) == ("exp", causes.UNKNOWN) or (
        found.cause == causes.OVERFLOW
    )


def test_a_constant_that_is_returned():
    found = find_nonfinite(lambda x: (x, jnp.full(2, jnp.inf)))(X)
    assert found.cause == causes.CONSTANT
    assert "constant gave 1 Inf" in str(found)


def test_in_a_model_the_scope_tells_the_layer():
    class Model(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x):
            x = flax.linen.Dense(8, name="encoder")(x)
            x = flax.linen.LayerNorm(name="norm")(x)
            return flax.linen.Dense(3, name="head")(x)

    model = Model()
    params = jax.jit(model.init)(jax.random.key(0), X)
    params["params"]["head"]["kernel"] *= 1e4
    loss = lambda p: jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(
            model.apply(p, 100 * X).astype(jnp.float32), jnp.array([0, 1, 2])
        )
    )
    fn = mpjax.autocast(
        lambda p: 1e6 * loss(p) + 0 * p["params"]["head"]["bias"].sum(), "mixed_float16"
    )
    found = find_nonfinite(jax.value_and_grad(fn))(params)
    assert found is not None
    assert "head" in found.scope
    assert found.cause == causes.HALF_OVERFLOW
    assert found.dtype == "float16"


def test_a_train_step_and_its_donated_state():
    def loss_fn(params, batch, key):
        return jnp.sum(jnp.log(batch @ params)), {}

    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params=W, tx=tx, key=jax.random.key(0))
    step = mpjax.make_train_step(loss_fn, tx)
    found = find_nonfinite(step)(state, X)
    assert (found.primitive, found.cause) == ("log", causes.OUT_OF_DOMAIN)
    assert not any(x.is_deleted() for x in jax.tree.leaves(state.params))
    healthy = mpjax.make_train_step(lambda p, b, k: (jnp.sum(b @ p), {}), tx)
    assert find_nonfinite(healthy)(state, X) is None


def test_bad_input():
    with pytest.raises(TypeError, match="outside"):
        jax.jit(lambda x: find_nonfinite(jnp.log)(x) is None)(X)
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="NNX"):
        find_nonfinite(lambda m, x: m(x))(layer, np.ones((1, 2)))


def test_the_modes_of_jax_that_check_do_not_disturb_it():
    with jax.debug_nans(True):
        found = find_nonfinite(log_of_negative)(X)
    assert found.primitive == "log"
    with jax.disable_jit():
        assert find_nonfinite(inside_jit)(X).primitive == "log"


def test_each_cause_has_a_remedy():
    names = [n for n in vars(causes) if re.fullmatch("[A-Z][A-Z_]+", n)]
    assert {getattr(causes, n) for n in names} == set(causes._REMEDIES)


def test_a_loss_that_overflows_in_its_backward_pass_is_told_of_the_loss_scale():
    """The sum that autocast rounds once on a CPU keeps the scope of its equation."""
    x = jax.random.normal(jax.random.key(0), (16, 8))
    labels = jnp.arange(16) % 4

    def loss_fn(w):
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ w, labels)
        return 2.0**24 * losses.mean()

    grad_fn = mpjax.autocast(jax.value_and_grad(loss_fn), "mixed_float16")
    found = find_nonfinite(grad_fn)(jnp.ones((8, 4)))
    assert found.is_backward
    assert "lower the loss scale" in found.remedy
    forward = find_nonfinite(mpjax.autocast(jnp.matmul, "mixed_float16"))
    found = forward(1e6 * x, jnp.ones((8, 4)))
    assert not found.is_backward
    assert "loss scale does not matter" in found.remedy


def test_a_matmul_of_weights_that_have_grown():
    found = find_nonfinite(jnp.matmul)(jnp.full((2, 2), 1e30), jnp.full((2, 2), 1e30))
    assert "learning rate" in found.remedy


def test_a_state_whose_memory_a_step_reused_is_named():
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params={"w": jnp.ones(3)}, tx=tx)
    train_step = mpjax.make_train_step(lambda p, b, key: jnp.sum(p["w"] * b), tx)
    train_step(state, jnp.ones(3))
    with pytest.raises(ValueError, match="this state was given to a step before"):
        find_nonfinite(train_step)(state, jnp.ones(3))
