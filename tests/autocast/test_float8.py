"""Float8 matmuls against float64, and where they run."""

import functools
import itertools
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.collectives import MESHES, half_reductions, partitioned_text, sharded_step
from helpers.float8_tools import FORMATS, operand_formats, quantized, rounding_error
from jax.sharding import PartitionSpec as P

import mpjax
from experiments.models.small import CASES
from mpjax._autocast import float8, float8_devices
from mpjax._autocast.api import make_settings
from mpjax._autocast.pipeline import run_pipeline
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr, walk
from mpjax._xla_cpu import switch
from mpjax.sharding import auto_mesh, shard_batch

pytestmark = pytest.mark.filterwarnings("ignore:mixed_float8:UserWarning")

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[0], (32, 16))
W = jax.random.normal(KEYS[1], (4, 16, 16)) / 4
POLICY = "mixed_float8:all"
FORWARD, FORWARD_AND_BACKWARD = ("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2")


def in_float8(fn):
    return mpjax.autocast(fn, POLICY)


@functools.cache
def jitted_quantize(dtype):
    return jax.jit(lambda x: float8.quantize(x, dtype))


multiply = in_float8(jnp.matmul)


def relative(new, old):
    return float(np.linalg.norm(np.subtract(new, old)) / np.linalg.norm(old))


# Numbers.

exponents = st.integers(-149, 126)


@hypothesis.given(
    st.sampled_from(sorted(FORMATS)), exponents, st.integers(0, 2**32 - 1)
)
def test_quantized_numbers_are_the_nearest(dtype, exponent, seed):
    """From the largest magnitudes of float32 to below the smallest of bfloat16."""
    rng = np.random.default_rng(seed)
    spread = rng.integers(-24, 1, (8, 8))
    x = np.ldexp(rng.uniform(-2, 2, (8, 8)), exponent + spread).astype(np.float32)
    x8 = jitted_quantize(dtype)(x)
    got = np.ldexp(np.asarray(x8.values, np.float64), int(x8.exponent))
    flushed = 2.0**-126  # A CPU computes with no smaller number.
    assert (np.abs(got - x) <= np.maximum(rounding_error(x, dtype), flushed)).all()
    largest = np.abs(x).max() * 2.0 ** -int(x8.exponent)
    assert largest <= FORMATS[dtype][2]
    if np.abs(x).max() > 2.0**-100:
        assert largest > FORMATS[dtype][2] / 2


@pytest.mark.parametrize("dtype", FORMATS)
def test_zeros_nan_and_inf(dtype):
    x = np.float32([[0, 0], [0, 0]])
    x8 = float8.quantize(x, dtype)
    assert np.asarray(x8.values, np.float32).tolist() == [[0, 0], [0, 0]]
    x = np.float32([1, np.nan, np.inf, -np.inf, 3.4e38, -3.4e38])
    x8 = jitted_quantize(dtype)(x)
    assert np.isnan(np.asarray(x8.values, np.float32)).tolist() == [
        *(False, True, True, True, False, False)
    ]


@hypothesis.given(st.integers(-140, 120), st.integers(-140, 120), st.integers(0, 10**6))
def test_a_product_is_as_exact_as_its_formats(x_exponent, w_exponent, seed):
    hypothesis.assume(-120 <= x_exponent + w_exponent <= 110)
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.normal(size=(8, 24)), x_exponent).astype(np.float32)
    w = np.ldexp(rng.normal(size=(24, 8)), w_exponent).astype(np.float32)
    got = np.asarray(multiply(x, w), np.float64)
    true = x.astype(np.float64) @ w
    dx, dw = (rounding_error(a.astype(float), "float8_e4m3fn") for a in (x, w))
    # What a CPU flushes to zero.
    dx, dw = np.maximum(dx, 2.0**-126), np.maximum(dw, 2.0**-126)
    bound = dx @ np.abs(w) + np.abs(x) @ dw + dx @ dw
    bound = bound * (1 + 2.0**-8) + np.abs(true) * 2.0**-8 + 2.0**-126
    assert (np.abs(got - true) <= bound).all()


def test_the_bounds_are_those_of_float8():
    """In half the same product errs less than a tenth of it."""
    x, w = np.asarray(X), np.asarray(W[0])
    true = x.astype(np.float64) @ w
    dx, dw = (rounding_error(a, "float8_e4m3fn") for a in (x, w))
    bound = (dx @ np.abs(w) + np.abs(x) @ dw).mean()
    errors = [
        np.abs(np.asarray(mpjax.autocast(jnp.matmul, policy)(x, w)) - true).mean()
        for policy in (POLICY, "mixed_bfloat16")
    ]
    assert 0.02 * bound < errors[0] < 0.5 * bound
    assert errors[1] < 0.1 * errors[0]


@st.composite
def matmuls(draw):
    """Shapes and dimension numbers of a `dot_general`, axes in any order."""
    sizes = st.lists(st.integers(1, 4), min_size=1, max_size=2)
    batch, contracted = draw(st.lists(st.integers(1, 3), max_size=2)), draw(sizes)
    operands = []
    for free in (draw(sizes), draw(sizes)):
        kinds = [("b", i, n) for i, n in enumerate(batch)]
        kinds += [("c", i, n) for i, n in enumerate(contracted)]
        kinds += [("f", i, n) for i, n in enumerate(free)]
        operands.append(draw(st.permutations(kinds)))
    numbers = [
        tuple(
            tuple(
                next(a for a, axis in enumerate(axes) if axis[:2] == (kind, i))
                for i in range(len(sizes))
            )
            for axes in operands
        )
        for kind, sizes in (("c", contracted), ("b", batch))
    ]
    return [tuple(n for *_, n in axes) for axes in operands], tuple(numbers)


@pytest.mark.parametrize(
    "all_sizes", [True, pytest.param(False, marks=pytest.mark.slow)]
)
@hypothesis.settings(max_examples=4)
@hypothesis.given(matmuls(), st.integers(0, 10**6))
def test_derivatives_of_any_matmul(all_sizes, matmul, seed):
    """Small whole numbers are exact in float8, and so are these products of theirs."""
    shapes, numbers = matmul
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(-3, 4, shape).astype(np.float32) for shape in shapes)
    dot = lambda x, y: jax.lax.dot_general(x, y, numbers)
    g = rng.integers(-3, 4, jax.eval_shape(dot, x, y).shape).astype(np.float32)
    config = float8.Matmul(numbers, jnp.dtype(jnp.bfloat16), all_sizes)

    def matmul8(x, y):
        x8, y8 = (float8.quantize(a, jnp.float8_e4m3fn) for a in (x, y))
        return float8.float8_matmul(config, x, y, x8, y8)

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(fn, *args):
        value, pull_back = jax.vjp(fn, *args[:2])
        return value, *pull_back(args[2])

    halves = (a.astype(jnp.bfloat16) for a in (x, y, g))
    got = value_and_gradients(matmul8, *halves)
    for new, old in zip(got, value_and_gradients(dot, x, y, g), strict=True):
        np.testing.assert_array_equal(new, old)


# Where float8 is.


def plain(w, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ w[0]) @ w[1]) ** 2)


def scanned(w, x, wrap=lambda layer: layer):
    layer = wrap(lambda h, w: (jnp.tanh(h @ w), None))
    return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)


def rematerialized(w, x):
    return scanned(w, x, jax.checkpoint)


def recurrent(w, x):
    step = lambda h, _: (jnp.tanh(jnp.einsum("bi,ij->bj", h, w[0])), None)
    return jnp.mean(jax.lax.scan(step, x, None, length=4)[0] ** 2)


def mapped(w, x):
    return jnp.mean(jax.vmap(lambda w: jnp.tanh(x @ w) @ w)(w) ** 2)


def chosen(w, x):
    layer = lambda h: jnp.tanh(h @ w[0])
    return jnp.mean(jax.lax.cond(w[0, 0, 0] > 9, layer, lambda h: h @ w[1], x) ** 2)


def scaled(w, x):
    return jax.jit(plain)(w, x) * 1024


LOSSES = {
    fn.__name__: fn
    for fn in (plain, scanned, rematerialized, recurrent, mapped, chosen, scaled)
}
WAYS = {
    "autocast(grad)": lambda fn: in_float8(jax.grad(fn)),
    "grad(autocast)": lambda fn: jax.grad(in_float8(fn)),
    "jit(loss)": lambda fn: in_float8(jax.grad(jax.jit(fn))),
}


def slow(*values):
    return [pytest.param(x, marks=pytest.mark.slow) for x in values]


def weekly(*values):
    return [pytest.param(x, marks=pytest.mark.weekly) for x in values]


def usual(cases, *usual_ones):
    """Returns cases, all but the usual ones marked as slow."""
    return [
        pytest.param(*case, marks=() if case in usual_ones else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize(
    ("way", "name"),
    usual(
        itertools.product(WAYS, LOSSES),
        ("autocast(grad)", "plain"),
        ("autocast(grad)", "rematerialized"),
        ("grad(autocast)", "scanned"),
        ("jit(loss)", "recurrent"),
    ),
)
def test_every_matmul_is_float8_and_every_cotangent_e5m2(name, way):
    loss = LOSSES[name]
    grad = WAYS[way](loss)
    true = jax.grad(loss)(W, X)
    assert 0.005 < relative(grad(W, X), true) < 0.12
    formats = operand_formats(jax.jit(grad), W, X)
    assert {tuple(sorted(x[:2])) for x in formats} == {FORWARD, FORWARD_AND_BACKWARD}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", "scanned", *weekly(*sorted({*LOSSES} - {"plain", "scanned"}))]
)
def test_both_ways_round_alike(name):
    loss = LOSSES[name]
    # Weights of a loop are quantized from float32 before it, or from half in it; these
    # are in half already. Cotangents between two layers are half or float32, rounded
    # once or twice.
    weights = W.astype(jnp.bfloat16).astype(jnp.float32)
    first, second, _ = (way(loss)(weights, X) for way in WAYS.values())
    assert relative(first, second) < 0.04


@jax.custom_vjp
def scores(q, k):
    return jnp.tanh(q @ k.T)


def _pull_back_scores(saved, g):
    q, k = saved
    s = jnp.tanh((q * 0.5) @ (k * 2.0).T)
    d = g * (1 - s * s)
    return d @ k, d.T @ q


scores.defvjp(lambda q, k: (scores(q, k), (q, k)), _pull_back_scores)


def test_what_a_custom_rule_computes_again_is_no_cotangent():
    loss = lambda w, x: jnp.mean(scores(x, w[0]) @ w[1])
    for fn, num_forward in (
        (in_float8(jax.grad(loss)), 3),
        (jax.grad(in_float8(loss)), 2),
    ):
        formats = [x[:2] for x in operand_formats(fn, W, X)]
        assert all("e4m3fn" in x for x in formats)
        # Of a rule that runs alone it is not known which arguments are cotangents.
        assert [x for x in formats if x == FORWARD] == [FORWARD] * num_forward
        assert relative(fn(W, X), jax.grad(loss)(W, X)) < 0.12


def test_cotangents_that_are_arguments():
    def pull_back(w, x, g):
        return jax.vjp(lambda w, x: jnp.tanh(x @ w[0]), w, x)[1](g)

    formats = operand_formats(in_float8(pull_back), W, X, X)
    assert sorted(tuple(sorted(x[:2])) for x in formats) == [
        FORWARD,
        FORWARD_AND_BACKWARD,
        FORWARD_AND_BACKWARD,
    ]


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit])
def test_a_tensor_is_measured_and_quantized_once(wrap):
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w[0]) + jnp.tanh(x @ w[1]))

    grad = wrap(in_float8(jax.grad(loss)))
    eqns = [eqn for eqn, _, _ in walk(jax.make_jaxpr(grad)(W, X))]
    measured = [
        e.invars[0].aval.shape for e in eqns if e.primitive.name == "reduce_max"
    ]
    # The inputs and both cotangents; both weights.
    assert sorted(measured) == [(16, 16)] * 2 + [(32, 16)] * 3
    found = quantized(grad, W, X)
    assert [(shape, dtype) for shape, dtype, _ in found] == [
        ((32, 16), "float8_e4m3fn"),
        ((16, 16), "float8_e4m3fn"),
        ((16, 16), "float8_e4m3fn"),
        ((32, 16), "float8_e5m2"),
        ((32, 16), "float8_e5m2"),
    ]


@pytest.mark.parametrize("wrap", [lambda fn: fn, *slow(jax.jit, jax.checkpoint)])
def test_weights_are_quantized_before_a_loop(wrap):
    def loss(w, x):
        return jnp.mean(jnp.tanh(wrap(jnp.matmul)(x, w)) ** 2)

    def microbatches(w, xs):
        step = lambda total, x: (total + jax.grad(loss)(w, x), None)
        return jax.lax.scan(step, jnp.zeros_like(w), xs)[0]

    xs = X.reshape(4, 8, 16)
    fn = in_float8(microbatches)
    times = {shape: n for shape, _, n in quantized(fn, W[0], xs)}
    assert times == {(16, 16): 1, (8, 16): 4}
    assert relative(fn(W[0], xs), microbatches(W[0], xs)) < 0.12


@pytest.mark.parametrize("wrap", [*slow(lambda fn: fn), jax.checkpoint])
def test_weights_of_layers_are_quantized_once_for_both_loops(wrap):
    def microbatches(w, xs):
        grad = jax.grad(lambda w, x: scanned(w, x, wrap))
        step = lambda total, x: (total + grad(w, x), None)
        return jax.lax.scan(step, jnp.zeros_like(w), xs)[0]

    # Each layer has its own scale.
    w = W * 4.0 ** np.arange(4)[:, None, None] / 16
    xs = X.reshape(4, 8, 16)
    fn = in_float8(microbatches)
    found = quantized(fn, w, xs)
    assert [x for x in found if x[0][-2:] == (16, 16)] == [
        ((4, 16, 16), "float8_e4m3fn", 1)
    ]
    assert {times for shape, _, times in found if shape == (8, 16)} == {16}
    assert relative(fn(w, xs), microbatches(w, xs)) < 0.12


@pytest.mark.weekly
def test_derivatives_of_derivatives():
    inner = lambda w: jnp.sum(in_float8(jax.grad(plain))(w, X) ** 2)
    outer = lambda w: jnp.sum(jax.grad(plain)(w, X) ** 2)
    assert relative(jax.grad(inner)(W), jax.grad(outer)(W)) < 0.2
    whole = in_float8(jax.grad(outer))
    assert relative(whole(W), jax.grad(outer)(W)) < 0.2
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(in_float8(plain), (W, X), (W, X))


def test_a_batch_of_weights():
    fn = jax.vmap(in_float8(jax.grad(plain)), (None, 0))
    xs = X.reshape(4, 8, 16)
    assert relative(fn(W, xs), jax.vmap(jax.grad(plain), (None, 0))(W, xs)) < 0.12


@pytest.mark.parametrize(
    "name",
    ["mlp", *slow(*(x for x in CASES if x != "mlp"))],
)
def test_the_jaxpr_is_valid(name):
    case = CASES[name]()
    jaxpr = jax.make_jaxpr(jax.value_and_grad(case.loss))(case.params, case.inputs)
    new = run_pipeline(jaxpr, make_settings(POLICY, (), ()))
    check_jaxpr(open_jaxpr(new))


def test_rules_keep_a_layer_in_half_and_the_report_says_why_a_matmul_is():
    def loss(w, x):
        with jax.named_scope("body"):
            x = jnp.tanh(x @ w[0])
        with jax.named_scope("head"):
            x = x @ w[1]
        kernel = jnp.ones((1, 1, 3, 3))
        return jnp.sum(jax.lax.conv(x[None, None], kernel, (1, 1), "SAME") ** 2)

    rules = mpjax.PolicyRules([("head", "mixed_bfloat16")], default=POLICY)
    report = mpjax.autocast_report(jax.grad(loss), rules)(W, X)
    found = {
        (r.scope, r.dtype, r.reason)
        for r in report.records
        if r.primitive in ("dot_general", "conv_general_dilated")
    }
    assert found == {
        ("body", "float8", ""),
        ("head", "bfloat16", ""),
        ("", "bfloat16", "conv_general_dilated has no float8 kernel"),
    }
    lines = {x.source for x in report.saved if x.dtype == "float8_e4m3fn"}
    assert all("test_float8.py" in line for line in lines)
    assert lines


def test_each_rule_says_whether_all_sizes_are_float8():
    def loss(w, x):
        with jax.named_scope("body"):
            x = jnp.tanh(x @ w[0])
        return jnp.sum(x @ w[1])

    rules = mpjax.PolicyRules([("body", POLICY)], default="mixed_float8")
    ways = mpjax.autocast(jax.grad(loss), rules), jax.grad(mpjax.autocast(loss, rules))
    for grad in ways:
        formats = sorted(tuple(sorted(x[:2])) for x in operand_formats(grad, W, X))
        # Forward, and the gradients of the input and of the weight; grad(autocast)
        # computes that of the first layer's input, too.
        assert formats[:4] == [("bfloat16", "bfloat16")] * 3 + [FORWARD]
        assert set(formats[4:]) == {FORWARD_AND_BACKWARD}


def test_small_matmuls_stay_half_with_a_reason():
    report = mpjax.autocast_report(plain, "mixed_float8")(W, X)
    matmuls = [r for r in report.records if r.primitive == "dot_general"]
    assert {r.dtype for r in matmuls} == {"bfloat16"}
    assert all(r.reason.startswith("too small or narrow") for r in matmuls)
    formats = operand_formats(mpjax.autocast(plain, "mixed_float8"), W, X)
    assert {x[:2] for x in formats} == {("bfloat16", "bfloat16")}
    report = mpjax.autocast_report(plain, POLICY)(W, X)
    matmuls = [r for r in report.records if r.primitive == "dot_general"]
    assert {(r.dtype, r.reason) for r in matmuls} == {("float8", "")}


@pytest.mark.parametrize(
    ("m", "k", "n", "batch", "pays"),
    [
        (8192, 4096, 4096, 1, True),
        (8192, 768, 3072, 1, True),
        (8192, 4096, 10, 1, False),  # Narrow: the weights of a classifier.
        (1, 4096, 4096, 1, False),  # A single token.
        (2048, 64, 2048, 128, False),  # The scores of attention.
        (128, 128, 128, 1, False),
        (2048, 2048, 2048, 8, True),  # Experts.
        (0, 128, 128, 1, False),
    ],
)
def test_what_pays_by_the_roofline_of_an_h100(m, k, n, batch, pays):
    numbers = (((2,), (1,)), ((0,), (0,)))
    assert float8._pays([(batch, m, k), (batch, k, n)], numbers) is pays
    # Counted in seconds.
    flops, bandwidth = 989e12, 3.35e12
    operands, results = batch * (m * k + k * n), batch * m * n
    half = max(2 * results * k / flops, 2 * (operands + results) / bandwidth)
    eighth = max(results * k / flops, (operands + 2 * results) / bandwidth)
    measured_and_rounded = 5 * operands / bandwidth / 2
    assert (eighth + measured_and_rounded < half) is pays


# Training.


def test_a_step_with_nan_or_inf_is_skipped():
    tx = mpjax.with_loss_scale(optax.sgd(0.1), mpjax.NoOpLossScale())
    step = mpjax.make_train_step(
        lambda w, x, key: plain(w, x), tx, policy=POLICY, donate=False
    )
    state = mpjax.TrainState.create(params=W, tx=tx, key=jax.random.key(0))
    for bad in (np.nan, np.inf, -np.inf):
        new, metrics = step(state, X.at[3, 5].set(bad))
        assert not metrics["grads_finite"]
        np.testing.assert_array_equal(new.params, state.params)
    new, metrics = step(state, X)
    assert metrics["grads_finite"]
    assert metrics["loss_scale"] == 1
    assert (new.params != state.params).any()


def test_nan_stays_in_its_row():
    x = X.at[3, 5].set(jnp.inf).at[7, 0].set(jnp.nan)
    out = in_float8(jnp.matmul)(x, W[0])
    assert sorted(set(np.argwhere(np.isnan(out))[:, 0].tolist())) == [3, 7]


def test_zeros_have_finite_gradients():
    for way in WAYS.values():
        grads = way(plain)(jnp.zeros_like(W), X)
        assert (np.asarray(grads) == 0).all()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("check_vma", "is_outside"),
    [
        (True, True),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(False, True, marks=pytest.mark.slow),
    ],
)
def test_devices_of_a_shard_map_share_the_scale(check_vma, is_outside):
    mesh = auto_mesh(jax.make_mesh((8,), ("data",)))
    x = X * 2.0 ** np.arange(32)[:, None]  # Each device has other magnitudes.
    wrap = lambda fn: jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    local = lambda w, x: jnp.tanh(x @ w[0])
    fn = in_float8(wrap(local)) if is_outside else wrap(in_float8(local))
    np.testing.assert_array_equal(jax.jit(fn)(W, x), in_float8(local)(W, x))
    assert "pmax" in str(jax.make_jaxpr(fn)(W, x))

    def loss(w, x):
        mean = lambda w, x: jax.lax.pmean(plain(w, x), "data")
        return jax.shard_map(
            mean,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )(w, x)

    way = WAYS["autocast(grad)" if is_outside else "grad(autocast)"]
    assert (
        relative(jax.jit(way(loss))(W, X), WAYS["autocast(grad)"](plain)(W, X)) < 0.04
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_devices_of_a_mesh_share_the_scale():
    mesh = auto_mesh(jax.make_mesh((8,), ("data",)))
    x = X * 2.0 ** np.arange(32)[:, None]
    fn = in_float8(lambda w, x: jnp.tanh(x @ w[0]))
    np.testing.assert_array_equal(jax.jit(fn)(W, shard_batch(x, mesh)), fn(W, x))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("dense", "data x fsdp"),
        pytest.param("scan, remat", "fsdp", marks=pytest.mark.slow),
        pytest.param("rnn", "data", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_added_up_over_devices_in_float32(name, mesh, tmp_path):
    mesh = jax.make_mesh(*MESHES[mesh])
    step, state, batch = sharded_step(name, mesh, policy=POLICY)
    formats = operand_formats(step, state, batch)
    assert {tuple(sorted(x[:2])) for x in formats} == {FORWARD, FORWARD_AND_BACKWARD}
    assert half_reductions(partitioned_text(step, state, batch, folder=tmp_path)) == []


def test_evaluation_is_float8_too():
    tx = mpjax.with_loss_scale(optax.sgd(0.1), mpjax.NoOpLossScale())
    state = mpjax.TrainState.create(params=W, tx=tx, key=jax.random.key(0))
    evaluate = mpjax.make_eval_step(lambda w, x: x @ w[0], policy=POLICY)
    assert [x[:2] for x in operand_formats(evaluate, state, X)] == [FORWARD]
    assert evaluate(state, X).dtype == jnp.float32


def test_numerics_and_flops_are_those_of_float8():
    report = mpjax.numerics.precision_report(in_float8(jax.grad(plain)))(W, X)
    flops = dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), 0)
    for record in report.records:
        if record.primitive == "dot_general":
            flops[record.dtype] += record.flops
    # Two matmuls forward; of three backward each takes a cotangent.
    one = 2 * 32 * 16 * 16
    assert flops == {"float8_e4m3fn": 2 * one, "float8_e5m2": 3 * one}
    assert report.findings == ()


# Devices.


@pytest.mark.parametrize("form", ["on", "off"])
def test_a_cpu_adds_up_in_float32(monkeypatch, form):
    """Without its form, XLA:CPU adds up some float8 products in half."""
    monkeypatch.setattr(switch, "is_on", form == "on")
    x, y = (jax.random.normal(k, (512, 8)).astype(jnp.float8_e5m2) for k in KEYS[:2])
    numbers = (((0,), (0,)), ((), ()))
    config = float8.Matmul(numbers, jnp.dtype(jnp.float32), all_sizes=True)
    x8, y8 = (float8.Quantized(a, jnp.int32(0)) for a in (x, y))
    got = jax.jit(lambda *args: float8._multiply(config, *args))(x8, y8)
    x, y = (np.asarray(a, np.float64) for a in (x, y))
    scale = np.abs(x).T @ np.abs(y)
    assert (np.abs(got - x.T @ y) <= 1e-6 * scale).all()


@pytest.mark.parametrize(
    ("device", "has_float8"),
    [
        (("cpu", "cpu", None), False),
        (("gpu", "Tesla T4", "7.5"), False),
        (("gpu", "NVIDIA A100-SXM4-40GB", "8.0"), False),
        (("gpu", "NVIDIA L4", "8.9"), True),
        (("gpu", "NVIDIA H100 80GB HBM3", "9.0"), True),
        (("gpu", "NVIDIA B200", "10.0"), True),
        (("gpu", "AMD Instinct MI300X", "gfx942"), False),
        (("gpu", "AMD Instinct MI355X", "gfx950"), True),
        (("tpu", "TPU v6 lite", None), False),
        (("tpu", "TPU7x", None), True),
    ],
)
def test_devices_with_float8(device, has_float8):
    assert float8_devices.multiplies_float8(*device) is has_float8


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a CPU has no float8")
def test_one_warning_on_a_device_without(monkeypatch):
    float8_devices._warn.cache_clear()
    with (
        float8_devices.tracing_for(another_device=True),
        warnings.catch_warnings(action="error"),
    ):
        in_float8(jnp.matmul)(X, W[0])
    with pytest.warns(UserWarning, match="cpu does not multiply float8"):
        in_float8(jnp.matmul)(X, W[1])
    with warnings.catch_warnings(action="error"):
        in_float8(jnp.matmul)(X, W[2])
