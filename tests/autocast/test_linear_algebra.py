"""Linear algebra and its derivatives run as traced; its plain matmuls do not."""

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import pytest
from helpers.tools import thinned
from jax.scipy.sparse.linalg import bicgstab, cg, gmres

import mpjax
from mpjax._jaxpr.core import walk

B = np.cos(np.arange(36, dtype=np.float32)).reshape(6, 6)
FUNCTIONS = {
    "cholesky": jnp.linalg.cholesky,
    "cond": jnp.linalg.cond,
    "det": jnp.linalg.det,
    "eigh": jnp.linalg.eigh,
    "eigvalsh": jnp.linalg.eigvalsh,
    "inv": jnp.linalg.inv,
    "lstsq": lambda a: jnp.linalg.lstsq(a, B)[0],
    "nuclear norm": lambda a: jnp.linalg.norm(a, "nuc"),
    "pinv": jnp.linalg.pinv,
    "qr": jnp.linalg.qr,
    "slogdet": jnp.linalg.slogdet,
    "solve": lambda a: jnp.linalg.solve(a, B),
    "svd": jnp.linalg.svd,
    "tensorinv": lambda a: jnp.linalg.tensorinv(a.reshape(2, 3, 6), ind=2),
    "tensorsolve": lambda a: jnp.linalg.tensorsolve(a, B[0]),
    "cho_solve": lambda a: jsl.cho_solve(jsl.cho_factor(a), B),
    "expm": jsl.expm,
    "expm_frechet": lambda a: jsl.expm_frechet(a, a),
    "lu": jsl.lu,
    "lu_solve": lambda a: jsl.lu_solve(jsl.lu_factor(a), B),
    "solve_triangular": lambda a: jsl.solve_triangular(a, B),
    "cg": lambda a: cg(lambda x: a @ x, B[0])[0],
    "gmres": lambda a: gmres(lambda x: a @ x, B)[0],
    "bicgstab": lambda a: bicgstab(lambda x: a @ x, B[0])[0],
}
NO_DERIVATIVE = {
    "polar": jsl.polar,
    "schur": jsl.schur,
    "solve_sylvester": lambda a: jsl.solve_sylvester(a, a, B),
    "sqrtm": jsl.sqrtm,
}
MATMULS = {
    "matmul": lambda a: jnp.linalg.matmul(a, a),
    "matrix_power": lambda a: jnp.linalg.matrix_power(a, 3),
    "multi_dot": lambda a: jnp.linalg.multi_dot([a, a, a]),
    "tensordot": lambda a: jnp.linalg.tensordot(a, a, axes=1),
}


def positive_definite():
    x = np.random.default_rng(0).uniform(0.2, 0.9, (6, 6))
    return jnp.asarray(x @ x.T + np.eye(6), jnp.float32)


def total(fn):
    """Returns a scalar function that weighs every real entry of a result."""

    def sum_of_sines(a):
        leaves = [x for x in jax.tree.leaves(fn(a)) if jnp.isrealobj(x)]
        return sum(jnp.sum(jnp.sin(x * 0.3)) for x in leaves if x.dtype == jnp.float32)

    return sum_of_sines


def matmul_dtypes(fn, *args):
    eqns = [eqn for eqn, _, _ in walk(jax.make_jaxpr(fn)(*args))]
    return {e.outvars[0].aval.dtype for e in eqns if e.primitive.name == "dot_general"}


@pytest.mark.parametrize("name", FUNCTIONS | NO_DERIVATIVE)
def test_no_matmul_of_linear_algebra_or_its_derivative_is_half(name):
    fn = total((FUNCTIONS | NO_DERIVATIVE)[name])
    a = positive_definite()
    transforms = [lambda f: f]
    if name in FUNCTIONS:
        transforms += [jax.grad, lambda f: lambda a: jax.jvp(f, (a,), (B,))]
    for transform in transforms:
        dtypes = matmul_dtypes(mpjax.autocast(transform(fn)), a)
        assert jnp.dtype("bfloat16") not in dtypes


@pytest.mark.parametrize("name", thinned(["solve", "cg", "eigh", "pinv", "qr"]))
@pytest.mark.parametrize(
    "policy", thinned(["mixed_bfloat16", "mixed_float16"], rest="weekly")
)
def test_the_gradient_is_that_of_float32(name, policy):
    fn = total(FUNCTIONS[name])
    a = positive_definite()
    right = jax.jit(jax.grad(fn))(a)
    for found in (
        mpjax.autocast(jax.grad(fn), policy)(a),
        jax.grad(mpjax.autocast(fn, policy))(a),
        mpjax.autocast(jax.jit(jax.grad(jax.checkpoint(fn))), policy)(a),
    ):
        np.testing.assert_allclose(found, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", MATMULS)
def test_a_matmul_is_half_wherever_it_is_called(name):
    a = positive_definite()
    for fn in (MATMULS[name], jax.grad(total(MATMULS[name]))):
        assert jnp.dtype("bfloat16") in matmul_dtypes(mpjax.autocast(fn), a)


def test_what_surrounds_linear_algebra_is_half():
    """A matmul of the user's own, before and after a decomposition."""

    def fn(a):
        q, _ = jnp.linalg.qr(a @ B)
        return total(lambda a: a @ B)(q)

    text = str(mpjax.autocast_report(jax.grad(fn))(positive_definite()))
    assert "part of linear algebra or its derivative" in text
    assert jnp.dtype("bfloat16") in matmul_dtypes(
        mpjax.autocast(jax.grad(fn)), positive_definite()
    )
