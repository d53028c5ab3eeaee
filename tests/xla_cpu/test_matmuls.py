"""The form of bfloat16 matmuls: the values, and how XLA:CPU runs them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tools import thinned

import mpjax
from mpjax._jaxpr.core import walk

CASES = {
    "weight gradient": ("km,kn->mn", (64, 32), (64, 48)),
    "input gradient": ("mk,nk->mn", (32, 48), (64, 48)),
    "dense": ("mk,kn->mn", (64, 32), (32, 24)),
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


@pytest.mark.parametrize("name", thinned(CASES))
def test_the_value_is_that_of_the_float64_matmul_rounded_once(name):
    fn, args = operands(name)
    expected = np.einsum(CASES[name][0], *(np.asarray(x, np.float64) for x in args))
    for transform in (lambda f: f, jax.jit):
        out = np.asarray(transform(mpjax.autocast(fn, "mixed_bfloat16"))(*args))
        error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
        assert error < 2.0**-8


@pytest.mark.parametrize("name", thinned(CASES))
def test_gradients_taken_outside_are_as_good(name):
    fn, args = operands(name)
    weights = np.cos(np.arange(jax.eval_shape(fn, *args).size, dtype=np.float32))
    loss = lambda f: lambda x, y: jnp.vdot(f(x, y).ravel(), weights)
    expected = jax.grad(loss(fn), (0, 1))(*args)
    found = jax.jit(jax.grad(loss(mpjax.autocast(fn, "mixed_bfloat16")), (0, 1)))(*args)
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(x - y) / np.linalg.norm(y) < 6e-3


def test_a_long_weight_gradient_taken_outside_is_not_summed_in_bfloat16():
    keys = jax.random.split(jax.random.key(0), 3)
    x, g = (jax.random.normal(key, (2048, 64)) for key in keys[:2])
    w = jax.random.normal(keys[2], (64, 64))
    for fn in (lambda w: x @ w, lambda w: x @ w.T, lambda w: x[None] @ w):
        loss = lambda w, fn=fn: jnp.sum(mpjax.autocast(fn)(w) * g)
        exact = lambda w, fn=fn: jnp.sum(fn(w) * g)
        found, expected = jax.jit(jax.grad(loss))(w), jax.grad(exact)(w)
        assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 6e-3


@pytest.mark.parametrize(
    ("name", "contracted", "free"),
    [
        ("weight gradient", [1, 64], [[32], [48]]),
        ("input gradient", [48], [[1, 32], [64]]),
        ("dense", [1, 32], [[1, 64], [24]]),
        ("forward", [1, 32], [[2, 16], [24]]),
    ],
)
def test_bfloat16_matmuls_have_axes_of_one_and_others_do_not(name, contracted, free):
    fn, args = operands(name)
    for policy in ("mixed_bfloat16", "mixed_float16"):
        jaxpr = jax.make_jaxpr(mpjax.autocast(fn, policy))(*args)
        (dot,) = [e for e, _, _ in walk(jaxpr) if e.primitive.name == "dot_general"]
        axes, _ = dot.params["dimension_numbers"]
        shapes = [x.aval.shape for x in dot.invars]
        found = sorted(shapes[0][axis] for axis in axes[0])
        is_free = [[i not in own for i in range(8)] for own in axes]
        kept = [
            [n for n, keep in zip(shape, own, strict=False) if keep]
            for shape, own in zip(shapes, is_free, strict=True)
        ]
        if policy == "mixed_bfloat16":
            assert (found, kept) == (contracted, free)
        else:
            assert 1 not in (*found, *kept[0], *kept[1])


def test_it_can_be_mapped_and_scanned():
    fn, (x, y) = operands("weight gradient")
    cast = mpjax.autocast(fn, "mixed_bfloat16")
    many = jax.vmap(cast, (0, None))(jnp.stack([x, 2 * x]), y)
    np.testing.assert_allclose(many[1], 2 * many[0])
    _, outs = jax.lax.scan(lambda c, x: (c, cast(x, y)), 0, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(outs, many)


@pytest.mark.skipif(not PIPELINE, reason="XLA:CPU has no such library before")
@pytest.mark.parametrize("form", ["autocast(grad)", "grad(autocast)"])
@pytest.mark.parametrize("shape", [(256, 512), (2, 128, 512)])
def test_a_cpu_runs_every_matmul_of_a_step_by_its_bfloat16_library(form, shape):
    def loss(params, x):
        return jnp.sum(jnp.tanh(x @ params[0]) @ params[1])

    params = jnp.zeros((512, 384)), jnp.zeros((384, 128))
    fn = mpjax.autocast(jax.grad(loss))
    if form == "grad(autocast)":
        fn = jax.grad(mpjax.autocast(loss))
    text = jax.jit(fn).lower(params, jnp.zeros(shape)).compile().as_text()
    entry = text[text.index("ENTRY") :]
    assert " dot(" not in entry
    assert {*re.findall(r"= (\w+)\[[^=]* dot\(", text)} == {"bf16"}
    if form == "autocast(grad)":
        # Only layers' inputs are transposed, for weights' gradients; no weight is.
        transposed = re.findall(r"%\w*copy\S* = bf16\[([\d,]+)\]", entry)
        assert sorted(transposed) == ["384,256", "512,256"]


def test_a_step_can_be_exported_for_any_batch():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    step = jax.jit(mpjax.autocast(jax.grad(loss)))
    w = jax.random.normal(jax.random.key(0), (512, 8))
    (size,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((size, 512), jnp.float32)
    exported = jax.export.export(step)(jax.ShapeDtypeStruct(w.shape, w.dtype), x)
    for batch_size in (1, 64):
        x = jax.random.normal(jax.random.key(1), (batch_size, 512))
        np.testing.assert_allclose(exported.call(w, x), step(w, x), atol=0.05)
