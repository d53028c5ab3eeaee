"""The contents of `autocast_report`, as a table and as data."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import primitive_probes
from jax.extend.core import Primitive

import mpjax
from experiments.models.small import CASES

STRUCT = jax.ShapeDtypeStruct((64, 64), jnp.float32)
MATMUL_FLOPS = 2 * 64**3


def records(report, primitive):
    return [r for r in report.records if r.primitive == primitive]


def test_flops_per_dtype_against_a_count_by_hand():
    case = CASES["mlp"]()
    report = mpjax.autocast_report(jax.value_and_grad(case.loss), "mixed_float16")(
        case.params, case.inputs
    )
    forward = 2 * 128 * (64 * 256 + 256 * 256 + 256 * 10)
    # Backward: twice as much, without the gradient of the inputs.
    expected = 3 * forward - 2 * 128 * 64 * 256
    flops = sum(r.flops for r in records(report, "dot_general"))
    assert flops == expected
    assert {r.dtype for r in records(report, "dot_general")} == {"float16"}
    by_dtype = report.flops_by_dtype()
    assert list(by_dtype) == ["float16", "float32"]
    assert sum(by_dtype.values()) == sum(r.flops for r in report.records)
    assert by_dtype["float16"] >= expected


def test_convolution_flops():
    def conv(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", feature_group_count=2)

    x = jax.ShapeDtypeStruct((8, 4, 16, 16), jnp.float32)
    w = jax.ShapeDtypeStruct((6, 2, 3, 3), jnp.float32)
    (record,) = records(mpjax.autocast_report(conv)(x, w), "conv_general_dilated")
    assert record.flops == 2 * (8 * 6 * 8 * 8) * (2 * 3 * 3)


def test_loops_count_every_trip():
    def f(x, w):
        step = lambda h, _: (jnp.tanh(h @ w), None)
        return jax.lax.scan(step, x, None, length=7)[0]

    (record,) = records(mpjax.autocast_report(f)(STRUCT, STRUCT), "dot_general")
    assert (record.num_calls, record.flops) == (7, 7 * MATMUL_FLOPS)


def softmax_loss(x, w):
    with jax.named_scope("head"):
        return jax.nn.logsumexp(x @ w, -1).sum()


def test_sensitive_ops_with_reason_scope_and_source():
    report = mpjax.autocast_report(softmax_loss)(STRUCT, STRUCT)
    (dot,) = records(report, "dot_general")
    assert (dot.dtype, dot.reason, dot.scope) == ("bfloat16", "", "head")
    assert dot.source.startswith("test_report.py:")
    assert "softmax_loss" in dot.source
    (exp,) = records(report, "exp")
    assert (exp.dtype, exp.scope) == ("float32", "head")
    assert "half" in exp.reason
    assert exp in report.left_in_float32()
    assert dot not in report.left_in_float32()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x, w: jnp.matmul(x, w, precision="highest"), "precision=HIGHEST"),
        (lambda x, w: jnp.einsum("i,j->ij", x[0], w[0]), "no more than one element"),
        (mpjax.full_precision(jnp.matmul), "inside full_precision"),
        (mpjax.autocast(jnp.matmul, "float32"), "inside another autocast"),
    ],
)
def test_why_a_matmul_stays_in_float32(fn, reason):
    (record,) = records(mpjax.autocast_report(fn)(STRUCT, STRUCT), "dot_general")
    assert record.dtype == "float32"
    assert reason in record.reason


def test_a_default_is_no_rule():
    """Whoever forgot the default learns that no rule matched."""
    rules = mpjax.PolicyRules([("head", "mixed_bfloat16")], default="float32")
    (dot,) = records(
        mpjax.autocast_report(lambda x, w: x @ w, rules)(STRUCT, STRUCT), "dot_general"
    )
    assert (dot.dtype, dot.reason) == ("float32", "the default says float32")


def test_rules_and_what_matched_nothing():
    rules = mpjax.PolicyRules(
        [("head", "float32"), ("haed", "float16")], default="mixed_bfloat16"
    )
    report = mpjax.autocast_report(softmax_loss, rules, high=["exp", "expp"])(
        STRUCT, STRUCT
    )
    (dot,) = records(report, "dot_general")
    assert (dot.dtype, dot.reason) == ("float32", "a rule says float32")
    assert report.unused_rules == ("haed",)
    assert report.unused_names == ("expp",)
    assert "haed" in str(report)
    assert "expp" in str(report)


def test_reasons_of_operations_that_promote():
    def f(x, w):
        y = jnp.where(x > 0, x @ w, -1e30)  # float16 has no such number
        return jnp.exp((x @ w) * 2).sum() + (y @ w).sum()

    report = mpjax.autocast_report(f, "mixed_float16")(STRUCT, STRUCT)
    (select,) = records(report, "select_n")
    assert "-1e+30" in select.reason
    (mul,) = records(report, "mul")
    assert mul.reason == "every consumer wants float32"


def test_a_primitive_that_is_not_understood():
    strange = Primitive("strange")
    strange.def_abstract_eval(lambda x: x)
    report = mpjax.autocast_report(lambda x, w: strange.bind(x @ w))(STRUCT, STRUCT)
    (record,) = report.not_understood()
    assert (record.primitive, record.dtype) == ("strange", "float32")
    assert "strange" in str(report)


def test_data_goes_through_json_and_nothing_is_computed():
    def f(x, w):
        loss = optax.l2_loss(x @ w).mean()
        jax.debug.callback(lambda _: pytest.fail("computed"), loss)
        return loss

    report = mpjax.autocast_report(f)(np.ones((64, 64), np.float32), STRUCT)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["flops_by_dtype"]["bfloat16"] == MATMUL_FLOPS
    assert {"primitive", "dtype", "reason", "scope", "source"} <= set(
        data["records"][0]
    )


def test_plain_table_and_rich_table(capsys):
    rich_console = pytest.importorskip("rich.console")
    report = mpjax.autocast_report(softmax_loss)(STRUCT, STRUCT)
    report.print()
    plain = capsys.readouterr().out
    assert plain == f"{report}\n"
    header, rule, first, *_ = plain.splitlines()[1:]
    assert header.split()[:3] == ["primitive", "dtype", "MFLOP"]
    assert header.split()[3:] == ["calls", "scope", "source", "why"]
    assert set(rule) == {"-", " "}
    assert first.split()[:3] == ["dot_general", "bfloat16", "0.524"]
    assert "\x1b" not in plain
    console = rich_console.Console(width=200, force_terminal=True)
    with console.capture() as captured:
        console.print(report)
    assert "dot_general" in captured.get()
    assert "\x1b" in captured.get()


def test_an_empty_report():
    report = mpjax.autocast_report(lambda x: x + 1)(3)
    assert report.flops_by_dtype() == {}
    assert "no floating-point" in str(report)


@jax.custom_batching.custom_vmap
def with_own_vmap(x):
    return x @ x


@with_own_vmap.def_vmap
def _(axis_size, in_batched, x):
    return jnp.einsum("bij,bjk->bik", x, x), True


def with_own_transposition(x):
    return jax.custom_derivatives.linear_call(
        lambda r, v: r @ v, lambda r, v: r.T @ v, x, x
    )


@pytest.mark.parametrize("fn", [with_own_vmap, with_own_transposition])
def test_calls_with_rules_of_their_own_are_rewritten_inside(fn):
    x = jax.random.normal(jax.random.key(0), (8, 8))
    report = mpjax.autocast_report(fn)(x)
    assert report.flops_by_dtype() == {"bfloat16": 2 * 8**3}
    assert report.not_understood() == ()
    np.testing.assert_allclose(mpjax.autocast(fn)(x), fn(x), rtol=0.05, atol=0.05)
    assert "bf16" in jax.jit(mpjax.autocast(fn)).lower(x).as_text()


def test_their_rule_gets_the_traced_dtypes():
    """Under a vmap outside, the user's own rule runs, in float32."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    found = jax.vmap(mpjax.autocast(with_own_vmap))(x)
    np.testing.assert_allclose(found, jax.vmap(with_own_vmap)(x), rtol=1e-5, atol=1e-5)


opaque_call = Primitive("call_of_a_library")
opaque_call.def_abstract_eval(lambda x, *, body: x.update(weak_type=False))
opaque_call.def_impl(lambda x, *, body: jax.core.eval_jaxpr(body.jaxpr, (), x)[0])


@pytest.mark.parametrize(
    ("inside", "is_listed"), [(jnp.tanh, False), (lambda x: x @ x, True)]
)
def test_a_librarys_call_is_listed_where_a_matmul_is_lost(inside, is_listed):
    x = jnp.ones((4, 4))
    body = jax.make_jaxpr(inside)(x)
    report = mpjax.autocast_report(lambda x: opaque_call.bind(x, body=body))(x)
    assert bool(report.not_understood()) == is_listed
    assert ("the matmuls inside run as traced" in str(report)) == is_listed


@pytest.mark.parametrize(
    "name", ["custom_linear_solve", "reduce_window", "empty2", "pallas_call"]
)
def test_what_jax_makes_is_understood(name):
    x = jax.random.uniform(jax.random.key(0), (4, 4))
    report = mpjax.autocast_report(primitive_probes.OPAQUE[name])(x)
    assert report.not_understood() == ()
