"""Functions that autocast traces in half: `half_precision`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.primitive_probes import BF16, F16, F32, outputs
from helpers.tools import over_devices, thinned
from jax import lax
from jax.experimental import pallas as pl

import mpjax
from mpjax import PolicyRules, autocast, full_precision, half_precision, numerics
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr

X = jnp.linspace(-1, 1, 32).reshape(4, 8)
W = jnp.linspace(-0.5, 0.5, 64).reshape(8, 8)
RULES = PolicyRules([("head", "float32")], default="mixed_bfloat16")
REFUSAL = "Q must be fp16/bf16/fp8_e4m3fn/fp8_e5m2, got float32"


def kernel(x, w):
    """What autocast alone would run in float32: a tangent."""
    return jnp.tan(x @ w)


def picky_kernel(x, w):
    if x.dtype == F32:
        raise NotImplementedError(REFUSAL)
    return kernel(x, w)


half = half_precision(kernel)
picky = half_precision(picky_kernel)


def tangents(fn, *args):
    """Returns the dtype of each tangent of a function."""
    closed = jax.make_jaxpr(fn)(*args)
    check_jaxpr(open_jaxpr(closed))
    return outputs(closed, "tan")


@jax.custom_vjp
def with_own_vjp(x, w):
    return picky(x, w)


def forward(x, w):
    return picky(x, w), (x, w)


def backward(saved, g):
    x, w = saved
    return picky(g, w.T), x.T @ picky(x, w)


with_own_vjp.defvjp(forward, backward)


@jax.custom_jvp
def with_own_jvp(x, w):
    return picky(x, w)


@with_own_jvp.defjvp
def rule(primals, tangents):
    out = picky(*primals)
    return out, out * (tangents[0] @ primals[1])


DEPTHS = {
    "plain": picky,
    "jit": lambda x, w: jax.jit(lambda x: picky(x, w))(x),
    "scan": lambda x, w: lax.scan(lambda c, _: (picky(c, w), None), x, length=2)[0],
    "remat": jax.checkpoint(lambda x, w: picky(jnp.sin(x), w)),
    "custom_vjp": with_own_vjp,
    "custom_jvp": with_own_jvp,
    "cond": lambda x, w: lax.cond(x.sum() > 9, lambda x: x, lambda x: picky(x, w), x),
    "vmap": lambda x, w: jax.vmap(picky, (0, None))(x[:, None], w)[:, 0],
    "while": lambda x, w: lax.fori_loop(0, 2, lambda _, x: picky(x, w), x),
    "nested": half_precision(lambda x, w: picky(x, w).astype(x.dtype)),
    "autocast": autocast(picky),
}


@pytest.mark.parametrize("depth", thinned(DEPTHS, 4, rest="slow"))
@pytest.mark.parametrize("policy", ["mixed_bfloat16", RULES], ids=["policy", "rules"])
def test_at_any_depth_a_function_gets_half_arguments(depth, policy):
    fn = DEPTHS[depth]
    loss = lambda x, w: fn(x, w).sum()
    found = tangents(autocast(loss, policy), X, W)
    assert found
    assert set(found) == {BF16}
    if depth == "while":
        return
    inside, around = jax.grad(loss, (0, 1)), jax.grad(autocast(loss, policy), (0, 1))
    for grad in (autocast(inside, policy), around):
        found = tangents(grad, X, W)
        assert found
        assert set(found) == {BF16}
        assert {g.dtype for g in jax.eval_shape(grad, X, W)} == {F32}


def test_results_are_those_of_casts_by_hand():
    by_hand = lambda x, w: kernel(x.astype(BF16), w.astype(BF16)).astype(F32)
    assert jax.jit(by_hand)(X, W).tobytes() == autocast(half)(X, W).tobytes()
    value = lambda fn: jax.value_and_grad(lambda x, w: (fn(x, w) ** 2).sum(), (0, 1))
    old, new = jax.jit(value(by_hand))(X, W), autocast(value(half))(X, W)
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-3)


def test_traces_inside_and_outside_of_autocast_never_mix():
    one, other = jax.jit(lambda x: half(x, W)), jax.jit(lambda x: half(x, W))
    for fn, first in ((one, F32), (other, BF16)):
        plain, cast = partial(tangents, fn, X), partial(tangents, autocast(fn), X)
        calls = [(plain, F32), (cast, BF16)]
        for _ in range(2):
            for call, dtype in sorted(calls, key=lambda pair: pair[1] != first):
                assert call() == [dtype]
        assert tangents(autocast(fn, "mixed_float16"), X) == [F16]
        assert tangents(autocast(fn, "float32"), X) == [F32]
        assert plain() == [F32]


def test_other_arguments_pass():
    seen = {}

    def look(x, **kwargs):
        seen.update({name: getattr(v, "dtype", v) for name, v in kwargs.items()})
        return x, kwargs["count"], kwargs["short"]

    key = jax.random.key(0)
    given = {"count": jnp.arange(3), "key": key, "short": jnp.ones(2, F16)}
    static = {"scale": 0.5, "is_causal": True, "name": "q", "mask": None}
    fn = half_precision(partial(look, **static))
    out = jax.eval_shape(autocast(lambda x, given: fn(x, **given)), X, given)
    assert seen == {"count": jnp.int32, "key": key.dtype, "short": F16, **static}
    assert [x.dtype for x in out] == [F32, jnp.int32, F16]
    # With nothing to cast, outputs stay as they are.
    out = jax.eval_shape(autocast(half), X.astype(BF16), W.astype(BF16))
    assert out.dtype == BF16


@pytest.mark.weekly
def test_float64_passes():
    with jax.enable_x64(True):
        x = jnp.ones((2, 2), jnp.float64)
        closed = jax.make_jaxpr(autocast(half))(x, x)
        assert outputs(closed, "tan") == [jnp.float64]


def test_full_precision_is_stronger():
    assert tangents(autocast(full_precision(half)), X, W) == [F32]
    inside = half_precision(lambda x, w: full_precision(jnp.tan)(x @ w))
    assert tangents(autocast(inside), X, W) == [BF16]
    assert tangents(half, X, W) == [F32]
    assert tangents(autocast(autocast(half, "float32")), X, W) == [F32]
    assert tangents(autocast(autocast(half), "float32"), X, W) == [BF16]


@jax.jit
def block(x, w):
    return half(x, w)


def two_scopes(x, w):
    with jax.named_scope("body"):
        x = block(x, w)
    with jax.named_scope("head"):
        return block(x, w)


SCOPED = {
    "plain": two_scopes,
    "remat": jax.checkpoint(two_scopes),
    "scan": lambda x, w: lax.scan(lambda c, _: (two_scopes(c, w), c), x, length=2)[0],
    "vmap": jax.vmap(two_scopes, (0, None)),
}


@pytest.mark.parametrize("form", thinned(SCOPED, len(SCOPED), rest="slow"))
def test_rules_choose_the_dtype_by_scope(form):
    loss = lambda x, w: SCOPED[form](x, w).sum()
    assert tangents(autocast(loss, RULES), X, W) == [BF16, F32]
    exact = jax.jit(jax.grad(loss, (0, 1)))(X, W)
    grads = (
        autocast(jax.grad(loss, (0, 1)), RULES),
        jax.grad(autocast(loss, RULES), (0, 1)),
    )
    for grad in grads:
        assert tangents(grad, X, W)[:2] == [BF16, F32]
        text = str(jax.make_jaxpr(grad)(X, W))
        assert "cond[" not in text
        for new, old in zip(jax.jit(grad)(X, W), exact, strict=True):
            assert new.dtype == F32
            assert jnp.linalg.norm(new - old) < 0.02 * jnp.linalg.norm(old)


def test_a_rule_cannot_ask_for_what_a_function_refuses():
    def in_head(x, w):
        with jax.named_scope("head"):
            return picky(x, w)

    with pytest.raises(ValueError, match=r"scope 'head' computes in float32, but the"):
        autocast(in_head, RULES)(X, W)
    assert tangents(autocast(picky, RULES), X, W) == [BF16]
    assert tangents(autocast(half_precision(lambda x, w: picky(x, w)), RULES), X, W)


def test_an_error_that_asks_for_half_names_half_precision():
    for run in (autocast, mpjax.autocast_report):
        with pytest.raises(NotImplementedError, match=REFUSAL) as error:
            run(jax.jit(picky_kernel))(X, W)
        notes = [n for n in error.value.__notes__ if "mpjax.half_precision(fn)" in n]
        assert len(notes) == 1
    with pytest.raises(NotImplementedError, match=REFUSAL) as error:
        autocast(picky_kernel, "float32")(X, W)
    assert "half_precision" not in str(getattr(error.value, "__notes__", ()))


OTHERS = {
    "carry": lambda x: lax.scan(lambda c, _: (c.astype(BF16), c), x, length=2),
    "dtypes": lambda x: lax.add(x, x.astype(BF16)),
    "shape": lambda x: x @ x,
    "own": lambda x: exec("raise ValueError('float16 is not float32')"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_errors_get_no_note(name):
    with pytest.raises(Exception, match=r".") as error:
        autocast(OTHERS[name])(X)
    assert "half_precision" not in str(getattr(error.value, "__notes__", ()))


def double(x):
    """A Pallas kernel that refuses float32."""

    def body(x_ref, out_ref):
        assert x_ref.dtype == BF16
        out_ref[...] = x_ref[...] * 2

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(body, out_shape=shape, interpret=True)(x)


def test_a_pallas_kernel():
    with pytest.raises(AssertionError):
        autocast(double)(X)
    fn = autocast(lambda x: half_precision(double)(x) @ W)
    closed = jax.make_jaxpr(fn)(X)
    assert outputs(closed, "pallas_call") == [BF16]
    np.testing.assert_allclose(fn(X), 2 * X @ W, atol=0.03)


TX = mpjax.with_loss_scale(optax.sgd(0.1), mpjax.NoOpLossScale())


def loss_fn(params, batch, key):
    del key
    with jax.named_scope("in"):
        x = batch["x"] @ params["w"]
    out = picky(x, params["w"])
    return jnp.mean((out.sum(-1) - batch["label"]) ** 2)


def train(make_step=lambda step: step, **options):
    """Returns the parameters after one step, and the tangents' dtypes in the step."""
    params = {"w": jnp.eye(4) / 2}
    state = mpjax.TrainState.create(params=params, tx=TX, key=jax.random.key(0))
    options = {"policy": "mixed_bfloat16", "donate": False} | options
    step = make_step(mpjax.make_train_step(loss_fn, TX, **options))
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(16, 4)), "label": rng.normal(size=16)}
    batch = jax.tree.map(jnp.float32, batch)
    state, metrics = step(state, batch)
    assert metrics["grads_finite"]
    found = outputs(jax.make_jaxpr(step)(state, batch), "tan")
    return state.params["w"], set(found)


MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
STEPS = {
    "microbatches": {"num_microbatches": 4},
    "checkpoint": {"checkpoint_policy": "dots_saveable"},
    "mesh": {"mesh": MESH},
    "shard_map": {
        "axis_name": "data",
        "make_step": partial(over_devices, mesh=MESH, check_vma=True),
    },
    "rules": {"policy": PolicyRules([("in", "float32")], default="mixed_bfloat16")},
    "casts": {"autocast": False},
}


@pytest.mark.parametrize("form", thinned(STEPS, len(STEPS), rest="slow"))
def test_train_steps(form):
    old, found = train()
    assert found == {BF16}
    new, found = train(**STEPS[form])
    assert found == {BF16}
    assert new.dtype == F32
    np.testing.assert_allclose(new, old, atol=0.02)


@pytest.mark.weekly
def test_an_eval_step():
    state = mpjax.TrainState.create(params={"w": W}, tx=TX)
    predict = lambda params, batch: picky(batch, params["w"])
    step = mpjax.make_eval_step(predict, policy="mixed_bfloat16")
    assert tangents(step, state, X) == [BF16]
    assert step(state, X).dtype == F32


def test_the_report_says_where_operations_run():
    report = mpjax.autocast_report(jax.grad(lambda x, w: picky(x, w).sum()))(X, W)
    assert {r.dtype for r in report.records if r.flops > 1000} == {"bfloat16"}
    matmuls = [r for r in report.records if r.primitive == "dot_general"]
    assert [r.dtype for r in matmuls] == ["bfloat16"] * len(matmuls)
    assert report.not_understood() == ()
    inside = half_precision(lambda x: jnp.sin(x.astype(F32)))
    (row,) = (r for r in mpjax.autocast_report(inside)(X).records if r.flops)
    assert (row.dtype, row.reason) == ("float32", "inside half_precision")
    report = mpjax.autocast_report(two_scopes, RULES)(X, W)
    rows = {r.scope: r.dtype for r in report.records if r.primitive == "tan"}
    assert rows == {"body": "bfloat16", "head": "float32"}
    assert report.unused_rules == ()


def test_the_numerics_see_inside():
    fn = autocast(lambda x: half_precision(lambda x: jnp.log(x))(x) + 1)
    assert "bfloat16[4,8]" in str(numerics.find_nonfinite(fn)(X))
    _, histograms = numerics.probe(fn, ops=["log"])(abs(X) + 1)
    assert list(histograms) == ["log"]
    (finding,) = numerics.precision_report(fn)(X).findings
    assert (finding.primitive, finding.dtype) == ("log", "bfloat16")


@pytest.mark.weekly
@pytest.mark.parametrize("is_disabled", [False, True])
def test_disable_jit(is_disabled):
    with jax.disable_jit(is_disabled):
        fn = autocast(lambda x, w: jax.jit(picky)(x, w) @ w)
        out = fn(X, W)
        old = half(X, W) @ W
    np.testing.assert_allclose(out, old, atol=0.02)
    assert out.dtype == F32


def test_what_is_no_function_or_a_module_is_refused():
    with pytest.raises(TypeError, match="half_precision takes the function first"):
        half_precision(X)
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    call = half_precision(lambda model, x: model(x))
    call(model, X)
    with pytest.raises(TypeError, match="NNX object"):
        autocast(lambda x: call(model, x))(X)
