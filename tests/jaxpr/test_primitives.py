"""The tables of primitives: every name is real, and does what its table says.

A probe per name holds them to the installed jax: where it renames a primitive, or has
a new one, these tests fail.
"""

import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import primitive_probes as probes
from helpers.tools import thinned

import mpjax
from mpjax._jaxpr.core import check_jaxpr, dtype_of, is_inexact_aval, open_jaxpr, walk
from mpjax._jaxpr.primitives import PRIMITIVES, Kind

PROBES = (
    probes.LOW
    | probes.HIGH
    | probes.ARITHMETIC
    | probes.EXACT
    | probes.CALLS
    | probes.OPAQUE
)


def of_kind(*kinds, **facts):
    """The names in the table of some kinds, whose facts are these."""
    return {
        name
        for name, known in PRIMITIVES.items()
        if known.kind in kinds and known.is_known
        if all(getattr(known, fact) == value for fact, value in facts.items())
    }


CALLS = of_kind(Kind.CALL, Kind.COND, Kind.LOOP, Kind.CUSTOM)
TABLES = {
    "half": (of_kind(Kind.HALF), probes.LOW),
    "float32": (of_kind(Kind.FLOAT32), probes.HIGH),
    "arithmetic": (of_kind(Kind.PROMOTE, is_exact=False), probes.ARITHMETIC),
    "exact": (of_kind(Kind.PROMOTE, is_exact=True), probes.EXACT),
    "calls": (CALLS, probes.CALLS),
    "opaque": (of_kind(Kind.OPAQUE), probes.OPAQUE),
}

# In no table, so as traced. What no public function of jax makes:
INTERNAL = {
    "call",
    "custom_lin",
    "empty2",
    "eq_to",
    "le_to",
    "lt_to",
    "stage",
}
# And what holds a function, a mutable array, or no number:
UNLISTED = {
    "after_all",
    "create_token",
    "custom_linear_solve",
    "dce_sink",
    "get",
    "ragged_all_to_all",
    "reduce",
    "reduce_window",
    "select_and_scatter",
    "swap",
}

CAST = "convert_element_type"
HALF = np.dtype(jnp.bfloat16)
FULL = np.dtype(jnp.float32)
X = np.random.default_rng(0).uniform(0.2, 0.8, (4, 4)).astype(np.float32)
# Numbers of X's range go in, and numbers of its range come out.
MEANS = np.full((4, 4), 0.25, np.float32) + np.eye(4, dtype=np.float32) / 4 - 1 / 16


def installed(names):
    return sorted(name for name in names if probes.exists(name))


def names_in(fn, *args):
    return {eqn.primitive.name for eqn, _, _ in walk(jax.make_jaxpr(fn)(*args))}


@pytest.mark.parametrize("name", installed(PROBES))
def test_the_installed_jax_has_the_primitive(name):
    assert name in names_in(PROBES[name], X)


@pytest.mark.parametrize("table", TABLES)
def test_every_name_of_a_table_has_a_probe(table):
    names, functions = TABLES[table]
    assert names == set(functions)


def test_every_primitive_of_the_installed_jax_is_known():
    found = {
        getattr(module, name).name
        for module in (jax.extend.core.primitives, jax.lax)
        for name in dir(module)
        if name.endswith("_p")
    }
    assert len(found) > 150
    assert found - set(PROBES) - INTERNAL - UNLISTED == set()
    assert (INTERNAL | UNLISTED) & set(PROBES) == set()


def test_a_version_says_when_a_primitive_came_or_went():
    assert set(probes.SINCE) | set(probes.UNTIL) <= set(PROBES)
    absent = sorted(set(PROBES) - set(installed(PROBES)))
    lax_names = {n for n in dir(jax.lax) if not n.endswith("_p")}
    for name in absent:
        if name not in CALLS:
            assert name not in lax_names


def probed(fn, x):
    """`fn` on half, and what it returns taken by a matmul."""
    with jax.named_scope("first"):
        h = x @ MEANS
    with jax.named_scope("probe"):
        outputs = fn(h)
    return consumed(outputs)


def probed_in_full(fn, x):
    """`fn` on float32; its outputs are returned, and taken by a matmul."""
    with jax.named_scope("probe"):
        outputs = fn(x)
    return consumed(outputs), outputs


def consumed(outputs):
    total = 0.0
    with jax.named_scope("last"):
        for y in jax.tree.leaves(outputs):
            total += jnp.sum(y.reshape(1, -1) @ jnp.ones((y.size, 2)))
    return total


def rewritten(fn, which, policy="mixed_bfloat16"):
    """The checked, rewritten jaxpr of a probe."""
    closed = jax.make_jaxpr(mpjax.autocast(lambda x: which(fn, x), policy))(X)
    check_jaxpr(open_jaxpr(closed))
    return closed


def dtypes(closed, name, scope):
    """Per equation of a name in a scope, the dtypes of its floats: in, out."""
    found = [
        ({dtype_of(v) for v in atoms if is_inexact_aval(v.aval)})
        for eqn, where, _ in walk(closed)
        if eqn.primitive.name == name and scope in where.split("/")
        for atoms in (eqn.invars, eqn.outvars)
    ]
    return list(zip(found[::2], found[1::2], strict=True))


def check_values(fn, which):
    """Autocast changes a probe by roundings to bfloat16 only."""
    new = jax.tree.leaves(mpjax.autocast(lambda x: which(fn, x))(X))
    old = jax.tree.leaves(which(fn, X))
    for a, b in zip(new, old, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0.04, atol=0.04)


@pytest.mark.parametrize("name", thinned(installed(probes.HIGH)))
def test_high_runs_in_float32(name):
    fn = probes.HIGH[name]
    closed = rewritten(fn, probed)
    assert dtypes(closed, "dot_general", "first") == [({HALF}, {HALF})]
    found = dtypes(closed, name, "probe")
    assert found
    assert all(pair == ({FULL}, {FULL}) for pair in found)
    check_values(fn, probed)


@pytest.mark.parametrize(
    "name", thinned(installed((probes.ARITHMETIC | probes.EXACT).keys() - {CAST}))
)
def test_follow_runs_in_its_operands_dtype(name):
    fn = PROBES[name]
    closed = rewritten(fn, probed)
    assert dtypes(closed, "dot_general", "first") == [({HALF}, {HALF})]
    found = dtypes(closed, name, "probe")
    assert found
    assert all(pair == ({HALF}, {HALF}) for pair in found)
    check_values(fn, probed)

    if not PRIMITIVES[name].is_activation:
        found = dtypes(rewritten(fn, probed_in_full), name, "probe")
        assert found
        assert all(pair == ({FULL}, {FULL}) for pair in found)
    check_values(fn, probed_in_full)


@pytest.mark.parametrize("name", sorted(of_kind(Kind.PROMOTE, is_activation=True)))
def test_an_activation_of_float32_is_computed_in_float32(name):
    """Whoever takes its result; only that may be half."""
    for which in (probed_in_full, lambda fn, x: probed_in_full(fn, x)[0]):
        found = dtypes(rewritten(PROBES[name], which), name, "probe")
        assert [operands for operands, _ in found] == [{FULL}]


def test_a_cast_from_float32_to_float32_follows():
    fn = probes.EXACT[CAST]
    closed = rewritten(fn, probed)
    in_probe = [e for e, where, _ in walk(closed) if "probe" in where.split("/")]
    assert FULL not in {dtype_of(v) for e in in_probe for v in (*e.invars, *e.outvars)}
    dots = dtypes(closed, "dot_general", "first") + dtypes(
        closed, "dot_general", "last"
    )
    assert dots == [({HALF}, {HALF})] * 2
    check_values(fn, probed)
    assert dtypes(rewritten(fn, probed_in_full), CAST, "probe") == [({FULL}, {FULL})]


@pytest.mark.parametrize(
    "name", installed(probes.EXACT.keys() - {CAST, "select_and_scatter_add"})
)
def test_exact_is_exact(name):
    """Half in, half out, and not one number other than in float32."""
    half = jnp.asarray(X, HALF)
    fn = PROBES[name]
    for a, b in zip(
        jax.tree.leaves(fn(half)),
        jax.tree.leaves(fn(half.astype(FULL))),
        strict=True,
    ):
        assert a.dtype == HALF
        np.testing.assert_array_equal(a.astype(FULL), b)


@pytest.mark.parametrize("order", ["forward", "inside the gradient", "outside"])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", installed(probes.LOW))
def test_low_runs_in_half(name, policy, order):
    def loss(x):
        return jnp.sum(probes.LOW[name](x) ** 2)

    cast = lambda fn: mpjax.autocast(fn, policy)
    new, old = {
        "forward": (cast(loss), loss),
        "inside the gradient": (jax.grad(cast(loss)), jax.grad(loss)),
        "outside": (cast(jax.grad(loss)), jax.grad(loss)),
    }[order]
    closed = jax.make_jaxpr(new)(X)
    check_jaxpr(open_jaxpr(closed))
    half = jnp.dtype(mpjax.get_policy(policy).compute_dtype)
    eqns = [eqn for eqn, _, _ in walk(closed) if eqn.primitive.name == name]
    assert len(eqns) == (1 if order == "forward" else 3)
    for eqn in eqns:
        floats = [v for v in (*eqn.invars, *eqn.outvars) if is_inexact_aval(v.aval)]
        assert len(floats) == 3
        assert {dtype_of(v) for v in floats} == {half}
        assert eqn.params.get("preferred_element_type", half) == half
    assert new(X).dtype == FULL
    np.testing.assert_allclose(new(X), old(X), rtol=0.03)


@pytest.mark.parametrize("name", installed(probes.OPAQUE))
def test_opaque_runs_as_traced(name):
    """Fed by half, an opaque primitive has the very dtypes that it was traced with."""

    def scoped(x):
        h = x @ MEANS
        with jax.named_scope("probe"):
            return probes.OPAQUE[name](h)

    traced = jax.make_jaxpr(scoped)(X)
    closed = jax.make_jaxpr(mpjax.autocast(scoped))(X)
    check_jaxpr(open_jaxpr(closed))
    assert dtypes(closed, name, "probe") == dtypes(traced, name, "probe")
    assert dtypes(traced, name, "probe")


@pytest.mark.parametrize("name", installed(probes.CALLS))
def test_a_call_is_rewritten_inside(name):
    fn = probes.CALLS[name]
    closed = jax.make_jaxpr(mpjax.autocast(lambda x: fn(x @ MEANS)))(X)
    check_jaxpr(open_jaxpr(closed))
    dots = [eqn for eqn, _, _ in walk(closed) if eqn.primitive.name == "dot_general"]
    assert len(dots) >= (1 if name == "custom_jvp_call" else 2)
    assert {dtype_of(v) for eqn in dots for v in (*eqn.invars, *eqn.outvars)} == {HALF}
    new, old = mpjax.autocast(lambda x: fn(x @ MEANS))(X), fn(X @ MEANS)
    assert new.dtype == FULL
    np.testing.assert_allclose(new, old, rtol=0.04, atol=0.04)
