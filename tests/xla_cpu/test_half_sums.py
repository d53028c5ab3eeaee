"""Half sums of float32 operands are rounded once on a CPU, and as by hand elsewhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax

RNG = np.random.default_rng(0)
X, Y, W = (RNG.normal(size=(8, 8)).astype(np.float32) for _ in range(3))


def loss(x, y, w):
    """The sum goes on to a matmul, and is read in float32 as well."""
    total = jnp.exp(x) + jnp.exp(y)
    return total @ w, jnp.exp(total)


def lowered(fn, platform, *args):
    return jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "f32"), ("cuda", "bf16"), ("tpu", "bf16")]
)
def test_a_cpu_alone_adds_in_float32(platform, dtype):
    text = lowered(mpjax.autocast(loss, "mixed_bfloat16"), platform, X, Y, W)
    assert re.findall(r"stablehlo.add .*: tensor<8x8x(\w+)>", text) == [dtype]


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once(half):
    identity = np.eye(8, dtype=np.float32)
    found, _ = mpjax.autocast(loss, f"mixed_{half}")(X, Y, identity)
    exact = np.exp(X.astype(np.float64)) + np.exp(Y.astype(np.float64))
    spacing = float(jnp.finfo(half).eps) * 2.0 ** np.floor(np.log2(exact))
    assert (np.abs(found - exact) <= 0.5001 * spacing).all()


def test_what_the_user_wrote_in_half_stays_as_it_is():
    def fn(x, y):
        return x.astype(jnp.bfloat16) + y.astype(jnp.bfloat16)

    text = lowered(mpjax.autocast(fn, "mixed_bfloat16"), "cpu", X, Y)
    assert re.findall(r"stablehlo.add .*: tensor<8x8x(\w+)>", text) == ["bf16"]


@pytest.mark.parametrize("transform", [jax.grad, jax.hessian])
def test_it_has_derivatives(transform):
    def scalar(x, y):
        product, exp = loss(x, y, W)
        return jnp.mean(product) + jnp.mean(exp)

    small = X[:2] / 4, Y[:2] / 4
    found = transform(mpjax.autocast(scalar, "mixed_bfloat16"))(*small)
    true = transform(scalar)(*small)
    assert np.linalg.norm(found - true) < 0.02 * np.linalg.norm(true)
