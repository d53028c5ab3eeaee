"""Gradient errors against float64, beside hand-cast models; every matmul in half."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned

import mpjax
from experiments.models.small import (
    CASES,
    autocast_gradient,
    gradient,
    hand_cast,
    inner_autocast_gradient,
    oracle,
    relative_error,
)
from mpjax._jaxpr.core import inner_jaxprs, walk
from mpjax._tree import is_half

POLICIES = {
    "mixed_bfloat16": (jnp.bfloat16, 1.0),
    "mixed_float16": (jnp.float16, 2.0**10),
}
MATMULS = ("dot_general", "conv_general_dilated")
NUM_SEEDS = {"mlp": 5, "ctc": 3, "convnet": 3}


@functools.cache
def case_of(name, seed=0):
    """Returns the case of a seed with the loss of seed 0, which is compiled already."""
    case = CASES[name](seed)
    return dataclasses.replace(case, loss=case_of(name).loss) if seed else case


@functools.cache
def truth(name, seed):
    return oracle(case_of(name, seed))


@pytest.mark.parametrize("policy", thinned(POLICIES, rest="weekly"))
@pytest.mark.parametrize("name", thinned(CASES, 8, rest="weekly"))
def test_gradients_are_no_worse_than_hand_cast(name, policy):
    """The geometric mean over seeds of the ratio, with 2 % for chance."""
    dtype, scale = POLICIES[policy]
    ratios = []
    for seed in range(NUM_SEEDS.get(name, 1)):
        case = case_of(name, seed)
        args = (case.params, case.inputs)
        by_hand = gradient(hand_cast(case.loss, dtype), *args, scale=scale)
        cast = autocast_gradient(case.loss, *args, policy, scale=scale)
        inner = inner_autocast_gradient(case.loss, *args, policy, scale=scale)
        expected = truth(name, seed)
        error = relative_error(by_hand, expected)
        # In half, not float32 in disguise.
        assert error > 1e-4
        assert relative_error(cast, expected) > 1e-4
        ratios.append([relative_error(g, expected) / error for g in (cast, inner)])
    outer, inner = np.exp(np.mean(np.log(ratios), axis=0))
    assert outer <= 1.02
    # XLA:CPU leaves out the rounding of a weight gradient that it computes in float32,
    # as it does by hand; a bfloat16 matmul does round it.
    assert inner <= 1.15


@pytest.mark.parametrize("policy", thinned(POLICIES))
def test_a_weight_used_512_times_accumulates_its_gradient_in_float32(policy):
    dtype, scale = POLICIES[policy]
    case = case_of("rnn")
    args = (case.params, case.inputs)
    by_hand = gradient(hand_cast(case.loss, dtype), *args, scale=scale)
    cast = autocast_gradient(case.loss, *args, policy, scale=scale)
    errors = [relative_error(g["w"], truth("rnn", 0)["w"]) for g in (cast, by_hand)]
    assert errors[0] <= errors[1] / 3


@pytest.mark.parametrize("policy", thinned(POLICIES))
def test_cotangents_of_looked_up_rows_add_up_in_float32(policy):
    """A matmul makes a table, one row of which is looked up 5000 times."""
    ids = jnp.zeros(5000, jnp.int32)
    loss = lambda w: jnp.sum((w @ w)[ids])
    grads = [
        g(jnp.eye(8)) for g in (jax.grad(loss), jax.grad(mpjax.autocast(loss, policy)))
    ]
    np.testing.assert_allclose(grads[1], grads[0], rtol=4e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("form", ["autocast(grad)", "grad(autocast)"])
@pytest.mark.parametrize("name", thinned(CASES))
def test_every_matmul_is_half_forward_and_backward(name, form, policy):
    dtype, _ = POLICIES[policy]
    case = case_of(name)
    fn = mpjax.autocast(jax.value_and_grad(case.loss), policy)
    if form == "grad(autocast)":
        fn = jax.value_and_grad(mpjax.autocast(case.loss, policy))
    lowered = jax.jit(fn).trace(case.params, case.inputs)
    found = [eqn for eqn, _, _ in walk(lowered.jaxpr) if _is_matmul(eqn)]
    for eqn in found:
        dtypes = {x.aval.dtype for x in (*eqn.invars, *eqn.outvars)}
        assert len(dtypes) == 1
    # All but the gathers by matmul of the CTC loss, which full_precision keeps.
    kept = [
        id(inner)
        for eqn, _, _ in walk(lowered.jaxpr)
        if str(eqn.params.get("name")).startswith("mpjax_full_precision")
        for jaxpr in inner_jaxprs(eqn)
        for inner, _, _ in walk(jaxpr)
    ]
    full = [eqn for eqn in found if not is_half(eqn.outvars[0].aval)]
    assert all(id(eqn) in kept for eqn in full)
    assert bool(full) == (name == "ctc")
    halves = [eqn for eqn in found if is_half(eqn.outvars[0].aval)]
    assert {eqn.outvars[0].aval.dtype for eqn in halves} == {jnp.dtype(dtype)}
    forward = sum(
        _is_matmul(eqn) and is_half(eqn.outvars[0].aval)
        for eqn, _, _ in walk(
            jax.jit(mpjax.autocast(case.loss, policy))
            .trace(case.params, case.inputs)
            .jaxpr
        )
    )
    assert len(halves) >= 2 * forward > 0
    for operands in _operands(lowered.lower().as_text()):
        assert len(operands) == 1


def _is_matmul(eqn):
    return eqn.primitive.name in MATMULS


def _operands(text):
    """Returns the element types of each matmul's operands and result in StableHLO."""
    lines = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
    assert lines
    for line in lines:
        types = line.rpartition(" : ")[2]
        yield set(re.findall(r"tensor<(?:\d+x)*(\w+)>", types))
