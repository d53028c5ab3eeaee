"""What a scan stacks up for its backward pass: in half where that is as good."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tools import thinned

import mpjax
from experiments.models import small
from mpjax._jaxpr import scan_sizes, walk
from mpjax.autocast._residuals import are_bounded

WIDTH = 8
HALVES = ["bfloat16", "float16"]


def scans(fn, *args):
    found = walk(jax.make_jaxpr(fn)(*args))
    return [eqn for eqn, _, _ in found if eqn.primitive.name == "scan"]


def stacked(fn, *args):
    """The dtypes of what each scan stacks up, a sorted list per scan that does."""
    found = [eqn.outvars[scan_sizes(eqn)[1] :] for eqn in scans(fn, *args)]
    return [sorted(v.aval.dtype.name for v in results) for results in found if results]


def weights():
    return jax.random.normal(jax.random.key(0), (WIDTH, WIDTH)) / 3


def sequence(length=16):
    return jax.random.normal(jax.random.key(1), (length, 4, WIDTH))


def run(step, x):
    """The last state of `step(h, x_t) -> h` from zero on."""
    return jax.lax.scan(lambda h, x_t: (step(h, x_t), None), jnp.zeros(x.shape[1:]), x)[
        0
    ]


def gated(w, x, precision=None):
    """A recurrence with a gate, which the backward pass multiplies by."""

    def step(h, x_t):
        with jax.named_scope("gate"):
            g = jax.nn.sigmoid(jnp.dot(h, w, precision=precision) + x_t)
            return h * g + x_t

    return jnp.mean(run(step, x) ** 2)


def relative_error(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    error, norm = np.sum(
        [[np.sum(np.square(f - e)), np.sum(np.square(e))] for f, e in pairs], axis=0
    )
    return np.sqrt(error / norm)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("form", thinned(["plain", "vmap", "jit", "value_and_grad"]))
def test_factors_and_operands_are_kept_in_half(form, half):
    grad = jax.grad(jax.jit(gated) if form == "jit" else gated)
    if form == "value_and_grad":
        grad = jax.value_and_grad(gated)
    fn = mpjax.autocast(grad, f"mixed_{half}")
    if form == "vmap":
        fn = jax.vmap(fn, (0, None))
    w = weights()[None] if form == "vmap" else weights()
    # The state, which the gradient of w takes, and the gate's derivative; the gate
    # itself multiplies a cotangent at every step.
    assert stacked(fn, w, sequence()) == [[half, half, "float32"]]


def test_float16_is_for_what_is_in_its_range():
    def loss(w, x):
        def step(h, x_t):
            y = h @ w + x_t
            return jnp.tanh(h @ w.T) * y * y + jnp.tanh(y)

        return jnp.mean(run(step, x))

    args = weights() / 9, sequence()
    halves = [
        stacked(mpjax.autocast(jax.grad(loss), f"mixed_{h}"), *args) for h in HALVES
    ]
    num_kept = [dtypes.count("float32") for (dtypes,) in halves]
    assert num_kept[1] > num_kept[0]


def test_what_the_backward_pass_adds_or_transforms_stays_float32():
    def two_loops(w, x):
        def first(h, x_t):
            p = jax.nn.sigmoid(h @ w + x_t)
            return p, p

        def second(total, p):
            return total + jnp.log(1 - p) @ w, None

        start = jnp.zeros(x.shape[1:])
        return jax.lax.scan(second, start, jax.lax.scan(first, start, x)[1])[0]

    assert stacked(mpjax.autocast(two_loops), weights(), sequence()) == [["float32"]]


def test_a_loop_that_multiplies_but_is_no_backward_pass_gets_float32():
    def two_loops(w, x):
        def first(h, x_t):
            p = jax.nn.sigmoid(h @ w + x_t)
            return p, p

        def second(h, p):
            return h @ w * p, None

        start = jnp.zeros(x.shape[1:])
        return jax.lax.scan(second, start + 1, jax.lax.scan(first, start, x)[1])[0]

    assert stacked(mpjax.autocast(two_loops), weights(), sequence()) == [["float32"]]
    # Its forward-mode derivative is none either.
    tangent = lambda w, x: jax.jvp(lambda w: two_loops(w, x), (w,), (w,))[1]
    (dtypes,) = stacked(mpjax.autocast(tangent), weights(), sequence())
    assert set(dtypes) == {"float32"}


def test_a_softmax_in_a_loop_stays_float32():
    """Its backward pass counts on a sum of one."""

    def loss(w, x):
        return jnp.mean(run(lambda h, x_t: jax.nn.softmax(h @ w + x_t), x) ** 2)

    grad, args = jax.grad(loss), (weights(), sequence(64))
    cast = mpjax.autocast(grad)
    kept = stacked(cast, *args)[0]
    assert kept.count("float32") >= 2
    assert relative_error(jax.jit(cast)(*args), jax.jit(grad)(*args)) < 0.01


def test_a_rule_that_says_float32_is_kept_to():
    def loss(w, x):
        def step(h, x_t):
            i = x_t @ w
            with jax.named_scope("gate"):
                h = h * jax.nn.sigmoid(h @ w + i)
            return h + i

        return jnp.mean(run(step, x) ** 2)

    rules = mpjax.PolicyRules([("gate", "float32")], default="mixed_bfloat16")
    args = jax.grad(loss), weights(), sequence()
    (dtypes,) = stacked(mpjax.autocast(args[0]), *args[1:])
    assert dtypes.count("bfloat16") >= 2
    (dtypes,) = stacked(mpjax.autocast(args[0], rules=rules), *args[1:])
    assert set(dtypes) == {"float32"}


@pytest.mark.parametrize("name", ["mul", "scan"])
def test_what_the_user_puts_in_high_is_kept_to(name):
    fn = mpjax.autocast(jax.grad(gated), high=[name])
    (dtypes,) = stacked(fn, weights(), sequence())
    assert set(dtypes) == {"float32"}


def test_a_loop_without_a_half_matmul_is_left_alone():
    highest = jax.grad(functools.partial(gated, precision="highest"))
    args = weights(), sequence()
    assert set(stacked(mpjax.autocast(highest), *args)[0]) == {"float32"}
    expected = jax.jit(highest)(*args)
    np.testing.assert_array_equal(jax.jit(mpjax.autocast(highest))(*args), expected)

    loss = lambda x: jnp.sum(run(lambda h, x_t: h * jax.nn.sigmoid(h) + x_t, x))
    kept, _ = stacked(mpjax.autocast(jax.grad(lambda x: loss(x @ args[0]))), args[1])
    assert set(kept) == {"float32"}


def test_what_only_matmuls_take_and_make_is_half_and_loses_nothing():
    def outputs(w, x):
        step = lambda h, x_t: (jnp.tanh(h @ w + x_t),) * 2
        return jax.lax.scan(step, jnp.zeros(x.shape[1:]), x @ w)[1]

    args = weights(), sequence()
    half = mpjax.autocast(lambda w, x: outputs(w, x) @ w)
    full = mpjax.autocast(lambda w, x: (outputs(w, x) @ w, outputs(w, x)))
    assert stacked(half, *args) == [["bfloat16"]]
    assert ["float32"] in stacked(full, *args)
    np.testing.assert_array_equal(jax.jit(half)(*args), jax.jit(full)(*args)[0])
    (scan,) = scans(half, *args)
    assert scan.invars[-1].aval.dtype == jnp.bfloat16


def test_a_weight_is_cast_before_a_loop_that_is_differentiated_already():
    """Once, not at every step. One that is not, gathers its gradient in float32."""
    args = weights(), sequence()
    for scan in scans(mpjax.autocast(jax.grad(gated)), *args):
        assert scan.invars[0].aval.dtype == jnp.bfloat16
    (scan,) = scans(mpjax.autocast(gated), *args)
    assert scan.invars[0].aval.dtype == jnp.float32
    for scan in scans(jax.grad(mpjax.autocast(gated)), *args):
        assert all(v.aval.dtype == jnp.float32 for v in scan.outvars[:1])


@pytest.mark.parametrize("policy", ["dots_saveable", "nothing_saveable"])
def test_a_checkpoint_saves_matmuls_in_half(policy):
    """In a scan over layers and without."""
    w = jnp.stack([weights()] * 3)
    saved = getattr(jax.checkpoint_policies, policy)

    @functools.partial(jax.checkpoint, policy=saved)
    def layer(x, w):
        return x + jnp.tanh(x @ w), None

    def scanned(w, x):
        return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)

    def unrolled(w, x):
        for w_i in w:
            x, _ = layer(x, w_i)
        return jnp.mean(x**2)

    args = w, sequence()[0]
    expected = jax.grad(scanned)(*args)
    for loss in (scanned, unrolled):
        cast = mpjax.autocast(jax.grad(loss))
        assert relative_error(jax.jit(cast)(*args), expected) < 0.012
    kept = stacked(mpjax.autocast(jax.grad(scanned)), *args)[0]
    assert kept == ["bfloat16"] * (2 if policy == "dots_saveable" else 1)
    if policy == "dots_saveable":
        jaxpr = jax.make_jaxpr(mpjax.autocast(jax.grad(unrolled)))(*args)
        marks = [e for e, _, _ in walk(jaxpr) if e.primitive.name == "reduce_precision"]
        assert {v.aval.dtype.name for e in marks for v in e.outvars} == {"bfloat16"}


@pytest.mark.parametrize("policy", thinned(["mixed_bfloat16", "mixed_float16"]))
@pytest.mark.parametrize("transform", ["vmap", "remat", "twice", "hessian", "nested"])
def test_it_differentiates_under_transformations(policy, transform):
    w, x = weights(), sequence()
    grad = jax.grad(gated)
    if transform == "remat":
        grad = jax.grad(jax.checkpoint(gated))
    elif transform == "twice":
        grad = jax.grad(lambda w, x: jnp.sum(jax.grad(gated)(w, x) ** 2))
    elif transform == "hessian":
        grad = jax.jacfwd(grad)
    elif transform == "nested":
        total = lambda w, x: jax.lax.map(lambda x: gated(w, x), x).sum()
        grad, x = jax.grad(total), jnp.stack([x, x + 1])
    cast = mpjax.autocast(grad, policy)
    if transform == "vmap":
        grad, cast = (jax.vmap(f, (0, None)) for f in (grad, cast))
        w = jnp.stack([w, w / 2])
    error = relative_error(jax.jit(cast)(w, x), grad(w, x))
    assert error < (4e-2 if policy == "mixed_bfloat16" else 4e-3)


def lstm(length, width=32, batch=8, inputs=4):
    """A sequence's start is to be told at its end; chrono initialization.

    The forget gates are near 1 (Tallec and Ollivier, arXiv:1804.11188, section 2).
    """
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape) / shape[0] ** 0.5
    forget = jnp.log(jax.random.uniform(keys[2], (width,), minval=1, maxval=length - 1))
    params = {
        "w": normal(keys[0], inputs, 4 * width) / 2,
        "u": normal(keys[1], width, 4 * width) / 2,
        "b": jnp.concatenate([-forget, forget, jnp.zeros(2 * width)]),
        "out": normal(keys[4], width, 1),
    }
    x = jax.random.normal(keys[3], (length, batch, inputs))

    def loss(params, x):
        def step(state, x_t):
            h, c = state
            z = x_t @ params["w"] + h @ params["u"] + params["b"]
            i, f, g, o = jnp.split(z, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        start = (jnp.zeros((batch, width)),) * 2
        (h, _), _ = jax.lax.scan(step, start, x)
        return jnp.mean((h @ params["out"] - x[:20].sum((0, 2))[:, None] / 5) ** 2)

    return loss, params, x


@pytest.mark.parametrize("half", HALVES)
def test_forget_gates_near_one_do_not_compound(half):
    loss, params, x = lstm(784)
    cast = mpjax.autocast(jax.grad(loss), f"mixed_{half}")
    kept, *_ = stacked(cast, params, x)
    assert kept.count(half) > kept.count("float32")
    error = relative_error(jax.jit(cast)(params, x), jax.jit(jax.grad(loss))(params, x))
    assert error < {"bfloat16": 0.01, "float16": 0.002}[half]


def test_a_long_recurrence_keeps_its_gradient():
    """The error of factors that were rounded does not grow with the length."""
    case = small.bigru(length=400, width=16)
    args = case.loss, case.params, case.inputs
    truth = small.oracle(case)
    cast = small.autocast_gradient(*args, "mixed_bfloat16")
    by_hand = small.gradient(small.hand_cast(case.loss, "bfloat16"), *args[1:])
    error = small.relative_error(cast, truth)
    assert error < 6e-3
    assert error < 0.6 * small.relative_error(by_hand, truth)


def test_bounded_results_are_found_through_products_shapes_and_calls():
    def fn(x):
        s, t = jax.nn.sigmoid(x), jnp.tanh(x)
        two = jnp.real(jax.lax.complex(x, x) * 2j)
        return s, 1 - s, (s * t).T, s + 2.0, x * s, s - 3.0 * t, jnp.exp(s), two

    found = are_bounded(jax.make_jaxpr(fn)(jnp.zeros((2, 3))))
    assert found == [True, True, True, False, False, False, False, False]
