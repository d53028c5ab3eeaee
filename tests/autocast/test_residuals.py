"""What a scan stacks up for its backward pass: in half where that is as good."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments.models import small
from mpjax._jaxpr import scan_sizes, walk
from mpjax.autocast._residuals import are_bounded

WIDTH = 8


def stacked(fn, *args):
    """The dtypes of what each scan stacks up, a sorted list per scan that does."""
    found = []
    for eqn, _, _ in walk(jax.make_jaxpr(fn)(*args)):
        if eqn.primitive.name == "scan":
            results = eqn.outvars[scan_sizes(eqn)[1] :]
            found.append(sorted(v.aval.dtype.name for v in results))
    return [dtypes for dtypes in found if dtypes]


def weights():
    return jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / 3


def sequence():
    return jax.random.normal(jax.random.key(1), (16, 4, WIDTH))


def gated(w, x, after=lambda h, g: h * g, scope="gate"):
    """A recurrence with a gate, which the backward pass multiplies by."""

    def step(h, x_t):
        with jax.named_scope(scope):
            g = jax.nn.sigmoid(h @ w + x_t)
            h = after(h, g) + x_t
        return h, None

    return jnp.mean(jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0] ** 2)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_factors_are_kept_in_half(half):
    fn = mpjax.autocast(jax.grad(gated), f"mixed_{half}")
    (dtypes,) = stacked(fn, weights(), sequence())
    # The state h may be beyond float16's range; the gate and its derivative are not.
    kept = [half] * 3 if half == "bfloat16" else ["float16", "float16", "float32"]
    assert dtypes == kept


def test_what_the_backward_pass_adds_or_transforms_stays_float32():
    def after(h, g):
        return h * jnp.log(1 + g)

    fn = mpjax.autocast(jax.grad(lambda w, x: gated(w, x, after)))
    (dtypes,) = stacked(fn, weights(), sequence())
    assert "float32" in dtypes

    def two_loops(w, x):
        def first(h, x_t):
            p = jax.nn.sigmoid(h @ w + x_t)
            return p, p

        def second(total, p):
            return total + jnp.log(1 - p), None

        _, ps = jax.lax.scan(first, jnp.zeros(x.shape[1:]), x)
        return jax.lax.scan(second, jnp.zeros(x.shape[1:]), ps)[0]

    assert stacked(mpjax.autocast(two_loops), weights(), sequence()) == [["float32"]]


def test_a_rule_that_says_float32_is_kept_to():
    def loss(w, x):
        def step(h, x_t):
            i = x_t @ w
            with jax.named_scope("gate"):
                g = jax.nn.sigmoid(h @ w + i)
                h = h * g
            return h + i, None

        return jnp.mean(jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0] ** 2)

    rules = mpjax.PolicyRules([("gate", "float32")], default="mixed_bfloat16")
    args = jax.grad(loss), weights(), sequence()
    assert stacked(mpjax.autocast(args[0]), *args[1:]) == [["bfloat16"] * 3]
    assert stacked(mpjax.autocast(args[0], rules=rules), *args[1:]) == [["float32"] * 3]


@pytest.mark.parametrize("name", ["mul", "scan"])
def test_what_the_user_puts_in_high_is_kept_to(name):
    fn = mpjax.autocast(jax.grad(gated), high=[name])
    (dtypes,) = stacked(fn, weights(), sequence())
    # Of products and loops in float32, what matmuls take alone may still be half.
    assert dtypes.count("float32") >= 2


def test_a_loop_without_a_matmul_is_left_alone():
    def loss(x):
        def step(h, x_t):
            g = jax.nn.sigmoid(h)
            return h * g + x_t, None

        return jnp.sum(jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[0])

    fn = jax.grad(lambda x: loss(x @ weights()))
    assert all(
        set(dtypes) == {"float32"} for dtypes in stacked(mpjax.autocast(fn), sequence())
    )


def test_what_only_matmuls_take_is_stacked_in_half_and_loses_nothing():
    w, x = weights(), sequence()

    def run(w, x):
        step = lambda h, x_t: (jnp.tanh(h @ w + x_t),) * 2
        return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)[1]

    half = mpjax.autocast(lambda w, x: run(w, x) @ w)
    full = mpjax.autocast(lambda w, x: (run(w, x) @ w, run(w, x)))
    assert stacked(half, w, x) == [["bfloat16"]]
    assert ["float32"] in stacked(full, w, x)
    np.testing.assert_array_equal(jax.jit(half)(w, x), jax.jit(full)(w, x)[0])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("transform", ["vmap", "remat", "twice"])
def test_it_differentiates_under_transformations(policy, transform):
    w, x = weights(), sequence()
    loss = jax.checkpoint(gated) if transform == "remat" else gated
    grad = jax.grad(loss)
    if transform == "twice":
        grad = jax.grad(lambda w, x: jnp.sum(jax.grad(gated)(w, x) ** 2))
    cast = mpjax.autocast(grad, policy)
    if transform == "vmap":
        grad, cast = (jax.vmap(f, (0, None)) for f in (grad, cast))
        w = jnp.stack([w, w / 2])
    found, expected = jax.jit(cast)(w, x), grad(w, x)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (4e-2 if policy == "mixed_bfloat16" else 4e-3)


def test_a_long_recurrence_keeps_its_gradient():
    """The error of factors that were rounded does not grow with the length."""
    for length in (50, 400):
        case = small.bigru(length=length, width=32)
        truth = small.oracle(case)
        args = case.loss, case.params, case.inputs
        cast = small.autocast_gradient(*args, "mixed_bfloat16")
        by_hand = small.gradient(
            small.hand_cast(case.loss, "bfloat16"), case.params, case.inputs
        )
        error = small.relative_error(cast, truth)
        assert error < 6e-3
        assert error < 0.6 * small.relative_error(by_hand, truth)


def test_bounded_results_are_found_through_products_shapes_and_calls():
    def fn(x):
        s, t = jax.nn.sigmoid(x), jnp.tanh(x)
        return s, 1 - s, (s * t).T, s + 2.0, x * s, s - 3.0 * t, jnp.exp(s)

    found = are_bounded(jax.make_jaxpr(fn)(jnp.zeros((2, 3))))
    assert found == [True, True, True, False, False, False, False]
