"""The form of bfloat16 matmuls: same values, and what XLA:CPU makes of them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from mpjax._jaxpr import walk

CASES = {
    "weight gradient": ("km,kn->mn", (64, 32), (64, 48)),
    "attention": ("bhqk,bqhd->bkhd", (2, 4, 16, 16), (2, 16, 4, 8)),
    "batch not first": ("qbm,qbn->bmn", (16, 3, 24), (16, 3, 32)),
    "forward": ("btm,mn->btn", (2, 16, 32), (32, 24)),
}
PIPELINE = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)


def operands(name):
    equation, *shapes = CASES[name]
    keys = jax.random.split(jax.random.key(0), 2)
    halves = [
        jax.random.normal(key, shape).astype(jnp.bfloat16).astype(jnp.float32)
        for key, shape in zip(keys, shapes, strict=True)
    ]
    return lambda x, y: jnp.einsum(equation, x, y), halves


@pytest.mark.parametrize("name", CASES)
def test_the_value_is_that_of_the_float64_matmul_rounded_once(name):
    fn, args = operands(name)
    expected = np.einsum(CASES[name][0], *(np.asarray(x, np.float64) for x in args))
    for transform in (lambda f: f, jax.jit):
        out = np.asarray(transform(mpjax.autocast(fn, "mixed_bfloat16"))(*args))
        error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
        assert error < 2.0**-8


@pytest.mark.parametrize("name", CASES)
def test_gradients_taken_outside_are_as_good(name):
    fn, args = operands(name)
    weights = np.cos(np.arange(jax.eval_shape(fn, *args).size, dtype=np.float32))
    loss = lambda f: lambda x, y: jnp.vdot(f(x, y).ravel(), weights)
    expected = jax.grad(loss(fn), (0, 1))(*args)
    found = jax.jit(jax.grad(loss(mpjax.autocast(fn, "mixed_bfloat16")), (0, 1)))(*args)
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 6e-3


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_bfloat16_matmuls_contract_an_axis_of_one_and_others_do_not(policy):
    fn, args = operands("weight gradient")
    jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(*args)
    (dot,) = [e for e, _, _ in walk(jaxpr) if e.primitive.name == "dot_general"]
    (contracted, _), _ = dot.params["dimension_numbers"]
    sizes = [dot.invars[0].aval.shape[axis] for axis in contracted]
    assert sorted(sizes) == ([1, 64] if policy == "mixed_bfloat16" else [64])


def test_it_can_be_mapped_and_scanned():
    fn, (x, y) = operands("weight gradient")
    cast = mpjax.autocast(fn, "mixed_bfloat16")
    many = jax.vmap(cast, (0, None))(jnp.stack([x, 2 * x]), y)
    np.testing.assert_allclose(many[1], 2 * many[0])
    _, outs = jax.lax.scan(lambda c, x: (c, cast(x, y)), 0, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(outs, many)


@pytest.mark.skipif(not PIPELINE, reason="XLA:CPU has no such library before")
def test_the_weight_gradient_runs_in_bfloat16_on_a_cpu():
    fn, args = operands("weight gradient")
    halves = [jnp.tile(x, (8, 16)) for x in args]
    cast = jax.jit(mpjax.autocast(fn, "mixed_bfloat16"))
    text = cast.lower(*halves).compile().as_text()
    assert re.findall(r"= (\w+)\[[^=]* dot\(", text) == ["bf16"]
