"""The passes of autocast, one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cells import CELLS, W, X, evaluate
from helpers.tools import assert_same_bits

import mpjax
from experiments.models.small import CASES
from mpjax._autocast.api import make_settings
from mpjax._autocast.pipeline import PASSES, rewrite_in_half, run_pipeline
from mpjax._jaxpr.core import check_jaxpr, dtype_of, inner_jaxprs, open_jaxpr, walk
from mpjax._xla_cpu import switch

SETTINGS = make_settings("mixed_bfloat16", (), ())
# Passes that change no value, not even in its last bit, on any device.
AFTER_THE_REWRITE = [name.__name__ for name in PASSES[1:4]]


def traced_gradient(name):
    case = CASES[name]()
    return jax.make_jaxpr(jax.value_and_grad(jax.jit(case.loss)))(
        case.params, case.inputs
    )


def stages(jaxpr):
    """Returns the jaxpr after each pass, by the name of the pass."""
    found = {"as traced": jaxpr}
    for run in PASSES:
        jaxpr = run(jaxpr, SETTINGS) if run is rewrite_in_half else run(jaxpr)
        found[run.__name__] = jaxpr
    return found


def types(jaxpr):
    body = open_jaxpr(jaxpr)
    return [(v.aval.shape, dtype_of(v)) for v in (*body.invars, *body.outvars)]


@pytest.mark.parametrize("name", CASES)
def test_each_pass_leaves_a_valid_jaxpr_of_the_same_type(name):
    found = stages(traced_gradient(name))
    for jaxpr in found.values():
        check_jaxpr(open_jaxpr(jaxpr))
        assert types(jaxpr) == types(found["as traced"])
    *_, last = found.values()
    assert str(run_pipeline(found["as traced"], SETTINGS)) == str(last)


@pytest.mark.parametrize("name", CELLS)
def test_the_passes_after_the_rewrite_change_no_bit(name):
    jaxpr = jax.make_jaxpr(jax.value_and_grad(jax.jit(CELLS[name])))(W, X)
    found = stages(jaxpr)
    expected = evaluate(found["rewrite_in_half"], W, X)
    for each in AFTER_THE_REWRITE:
        assert_same_bits(evaluate(found[each], W, X), expected)


def test_every_pass_has_something_to_do_somewhere():
    changed = set()
    for case in ("bigru", "convnet", "transformer", "tied"):
        found = list(stages(traced_gradient(case)).items())
        for (_, old), (name, new) in itertools.pairwise(found):
            changed |= set() if new is old else {name}
    # In bfloat16 there is nothing to quantize: tests/autocast/test_float8.py.
    assert changed == {run.__name__ for run in PASSES} - {"quantize_matmuls"}


def test_a_second_run_of_a_form_finds_nothing_to_do():
    *_, last = stages(traced_gradient("convnet")).values()
    for run in PASSES[3:]:
        assert run(last) is last


def test_with_nothing_to_make_half_no_pass_runs():
    half = jnp.ones((4, 4), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda a, b: (a @ b).T)(half, half)
    assert run_pipeline(jaxpr, SETTINGS) is jaxpr


def test_no_pass_looks_into_full_precision():
    kept = mpjax.full_precision(lambda x: (x @ x).T)

    def fn(x, h):
        return x @ x, kept(h)

    x, h = jnp.ones((4, 4)), jnp.ones((4, 4), jnp.bfloat16)
    old = jax.make_jaxpr(fn)(x, h)
    new = run_pipeline(old, SETTINGS)
    assert new is not old
    inside = [
        [str(inner) for eqn in open_jaxpr(jaxpr).eqns for inner in inner_jaxprs(eqn)]
        for jaxpr in (old, new)
    ]
    assert inside[0] == inside[1] != []


def dots(jaxpr):
    return [eqn for eqn, _, _ in walk(jaxpr) if eqn.primitive.name == "dot_general"]


def test_one_switch_turns_the_forms_of_xla_cpu_off(monkeypatch):
    jaxpr = traced_gradient("mlp")
    with_forms = dots(run_pipeline(jaxpr, SETTINGS))
    assert any(eqn.invars[0].aval.ndim > 2 for eqn in with_forms)
    monkeypatch.setattr(switch, "is_on", False)
    without = dots(run_pipeline(jaxpr, SETTINGS))
    assert len(without) == len(with_forms) > 0
    assert {dtype_of(eqn.outvars[0]) for eqn in without} == {np.dtype(jnp.bfloat16)}
    assert all(eqn.invars[0].aval.ndim == 2 for eqn in without)


def test_what_the_user_wrote_in_half_keeps_its_form():
    """Beside a matmul that autocast makes half, and transposed as a gradient is."""
    images = jnp.ones((2, 3, 5, 5), jnp.bfloat16)
    kernel = jnp.ones((4, 3, 2, 2), jnp.bfloat16)

    def explicit(h, images, kernel):
        return (h.T @ h).T, (h @ h).T, jax.lax.conv(images, kernel, (1, 1), "SAME")

    def fn(x, *half):
        return x @ x, explicit(*half)

    x, h = jnp.ones((4, 4)), jnp.ones((4, 4), jnp.bfloat16)
    new = open_jaxpr(run_pipeline(jax.make_jaxpr(fn)(x, h, images, kernel), SETTINGS))
    old = open_jaxpr(jax.make_jaxpr(explicit)(h, images, kernel))
    names = {"dot_general", "conv_general_dilated", "transpose"}
    kept = [(e.primitive, e.params) for e in old.eqns if e.primitive.name in names]
    found = [(e.primitive, e.params) for e in new.eqns if e.primitive.name in names]
    assert len(found) == len(kept) + 1
    assert [x for x in found if x in kept] == kept


def test_a_transposed_number_is_no_matmul():
    fn = lambda x, w: (x @ w).sum() + jax.lax.transpose(2.0, ())
    assert float(mpjax.autocast(fn)(jnp.ones((2, 3)), jnp.ones((3, 4)))) == 26


@pytest.mark.parametrize("name", ["transpose", "slice", "optimization_barrier"])
def test_constants_that_are_moved_promote_as_arrays_do(name):
    """Only what JAX itself puts around a number is followed as a constant."""
    moved = {
        "transpose": lambda c: c.T,
        "slice": lambda c: jax.lax.slice(c, (0, 0), (4, 4)),
        "optimization_barrier": jax.lax.optimization_barrier,
    }[name]

    def fn(x):
        h = x @ x - moved(jnp.full((4, 4), 0.1))
        return h @ x, jnp.exp(h)

    jaxpr = run_pipeline(jax.make_jaxpr(fn)(jnp.ones((4, 4))), SETTINGS)
    (sub,) = [eqn for eqn, _, _ in walk(jaxpr) if eqn.primitive.name == "sub"]
    assert dtype_of(sub.outvars[0]) == np.float32
