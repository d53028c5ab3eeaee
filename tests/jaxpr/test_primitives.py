"""The table of primitives: every name is real, and does what the table says.

A probe per name checks the table against the installed jax: if jax renames a primitive,
or adds one, these tests fail.
"""

import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import primitive_probes as probes
from helpers.tools import thinned

import mpjax
from mpjax._autocast.kinds import CONTAINERS
from mpjax._jaxpr.core import (
    bind,
    check_jaxpr,
    dtype_of,
    eval_jaxpr,
    inner_jaxprs,
    is_inexact_aval,
    open_jaxpr,
    walk,
)
from mpjax._jaxpr.flops import count_flops
from mpjax._jaxpr.primitives import PRIMITIVES, Flops, Kind

PROBES = (
    probes.HALF
    | probes.FLOAT32
    | probes.ARITHMETIC
    | probes.EXACT
    | probes.CALLS
    | probes.OPAQUE
)


def of_kind(*kinds, **facts):
    """Returns the names in the table of some kinds, with some facts."""
    return {
        name
        for name, known in PRIMITIVES.items()
        if known.kind in kinds and known.is_known
        if all(getattr(known, fact) == value for fact, value in facts.items())
    }


CALLS = of_kind(*CONTAINERS)
TABLES = {
    "half": (of_kind(Kind.HALF), probes.HALF),
    "float32": (of_kind(Kind.FLOAT32), probes.FLOAT32),
    "arithmetic": (of_kind(Kind.PROMOTE, is_exact=False), probes.ARITHMETIC),
    "exact": (of_kind(Kind.PROMOTE, is_exact=True), probes.EXACT),
    "calls": (CALLS, probes.CALLS),
    "opaque": (of_kind(Kind.OPAQUE), probes.OPAQUE),
}

# Not in the table, so as traced. Primitives that no public function of jax makes:
INTERNAL = {
    "call",
    "custom_lin",
    "eq_to",
    "le_to",
    "lt_to",
    "stage",
}
# Primitives that hold a function, a mutable array, or no number:
UNLISTED = {
    "after_all",
    "create_token",
    "dce_sink",
    "get",
    "ragged_all_to_all",
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
    """Returns `fn` of half operands, with a matmul of its results."""
    with jax.named_scope("first"):
        h = x @ MEANS
    with jax.named_scope("probe"):
        outputs = fn(h)
    return consumed(outputs)


def probed_in_full(fn, x):
    """Returns `fn` of float32 operands; its outputs are returned and enter a matmul."""
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
    """Returns the rewritten jaxpr of a probe, checked."""
    closed = jax.make_jaxpr(mpjax.autocast(lambda x: which(fn, x), policy))(X)
    check_jaxpr(open_jaxpr(closed))
    return closed


def dtypes(closed, name, scope):
    """Returns the floating dtypes, in and out, per equation of a name in a scope."""
    found = [
        ({dtype_of(v) for v in atoms if is_inexact_aval(v.aval)})
        for eqn, where, _ in walk(closed)
        if eqn.primitive.name == name and scope in where.split("/")
        for atoms in (eqn.invars, eqn.outvars)
    ]
    return list(zip(found[::2], found[1::2], strict=True))


def check_values(fn, which):
    """Asserts that autocast changes a probe by roundings to bfloat16 only."""
    new = jax.tree.leaves(mpjax.autocast(lambda x: which(fn, x))(X))
    old = jax.tree.leaves(which(fn, X))
    for a, b in zip(new, old, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=0.04, atol=0.04)


@pytest.mark.parametrize("name", thinned(installed(probes.FLOAT32), 6))
def test_kind_float32_runs_in_float32(name):
    fn = probes.FLOAT32[name]
    closed = rewritten(fn, probed)
    assert dtypes(closed, "dot_general", "first") == [({HALF}, {HALF})]
    found = dtypes(closed, name, "probe")
    assert found
    assert all(pair == ({FULL}, {FULL}) for pair in found)
    check_values(fn, probed)


@pytest.mark.parametrize(
    "name", thinned(installed((probes.ARITHMETIC | probes.EXACT).keys() - {CAST}), 6)
)
def test_kind_promote_runs_in_its_operands_dtype(name):
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
    """Whatever its consumers are; only the result may be half."""
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
    """Half goes in, half comes out, and every number is the same as in float32."""
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
@pytest.mark.parametrize("name", installed(probes.HALF))
def test_kind_half_runs_in_half(name, policy, order):
    def loss(x):
        return jnp.sum(probes.HALF[name](x) ** 2)

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
def test_kind_opaque_runs_as_traced(name):
    """With half operands, an opaque primitive keeps the dtypes of its trace."""

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


# The other facts, each seen on the equation of a probe.


def with_fact(fact):
    """Returns the installed primitives that have a fact and a probe."""
    names = {name for name, facts in PRIMITIVES.items() if getattr(facts, fact)}
    return installed(names & set(PROBES))


def equation(name):
    """Returns a primitive's first equation in the trace of its probe, at any depth."""
    eqns = (eqn for eqn, _, _ in walk(jax.make_jaxpr(PROBES[name])(X)))
    return next(eqn for eqn in eqns if eqn.primitive.name == name)


def operands(eqn, value=None):
    """Returns numbers for an equation's operands: all different, or all the same."""
    found = []
    for i, x in enumerate(eqn.invars):
        shape, dtype = x.aval.shape, x.aval.dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            found.append(jnp.zeros(shape, dtype))
            continue
        numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape) + 1.5 + 100 * i
        numbers = numbers if value is None else np.full(shape, value)
        found.append(jnp.asarray(numbers, dtype))
    return found


def results(eqn, values):
    return [np.asarray(x) for x in bind(eqn, *values)]


def floats(values):
    return [np.asarray(x) for x in values if jnp.issubdtype(x.dtype, jnp.floating)]


# Collectives are evaluated inside a shard_map only; `test_exact_is_exact` covers
# them.
OF_DEVICES = {"all_gather", "all_gather_invariant", "all_to_all", "pvary"}


@pytest.mark.parametrize("name", sorted(set(with_fact("moves_data")) - OF_DEVICES))
def test_what_moves_data_gives_numbers_of_its_first_operand(name):
    eqn = equation(name)
    values = operands(eqn)
    for out in results(eqn, values):
        assert out.size
        assert set(out.ravel().tolist()) <= set(np.asarray(values[0]).ravel().tolist())
    for out in results(eqn, operands(eqn, 0.3)):
        np.testing.assert_array_equal(out, np.float32(0.3))


def test_views_and_slices_are_kinds_of_moving_data():
    for facts in PRIMITIVES.values():
        assert facts.moves_data or not facts.is_view
        assert facts.is_exact or not (facts.moves_data or facts.shrinks)
        assert facts.flops is not Flops.PER_OUTPUT or not facts.moves_data


@pytest.mark.parametrize("name", with_fact("shrinks"))
def test_what_shrinks_gives_less_than_it_takes(name):
    eqn = equation(name)
    assert max(v.aval.size for v in eqn.outvars) < eqn.invars[0].aval.size


@pytest.mark.parametrize("name", with_fact("is_call"))
def test_a_call_gives_what_is_inside_it(name):
    eqn = equation(name)
    jaxpr = inner_jaxprs(eqn)[0]
    values = operands(eqn)
    inside = eval_jaxpr(open_jaxpr(jaxpr), getattr(jaxpr, "consts", ()), *values)
    for a, b in zip(results(eqn, values), inside, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("name", with_fact("reduces_by_jaxpr"))
def test_what_reduces_by_a_jaxpr_has_one_of_scalars_or_none(name):
    for jaxpr in inner_jaxprs(equation(name)):
        assert {v.aval.shape for v in open_jaxpr(jaxpr).invars} == {()}


@pytest.mark.parametrize("name", with_fact("is_addition"))
def test_an_addition_adds_or_subtracts(name):
    eqn = equation(name)
    a, b = (np.asarray(x) for x in operands(eqn))
    (out,) = results(eqn, [a, b])
    np.testing.assert_array_equal(out, a - b if name == "sub" else a + b)


@pytest.mark.parametrize("name", with_fact("adds_up"))
def test_a_sum_adds_up_several_numbers(name):
    eqn = equation(name)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    arrays = [np.asarray(x) for x in operands(eqn)]
    ones = [np.ones_like(x) if is_float(x) else x for x in arrays]
    (total,), (twice,) = (
        results(eqn, [k * x if is_float(x) else x for x in ones]) for k in (1, 2)
    )
    assert total.max() > 1
    np.testing.assert_array_equal(twice, 2 * total)


@pytest.mark.parametrize("name", with_fact("sums_axes") + with_fact("accumulates"))
def test_a_reduction_combines_all_along_its_axes(name):
    eqn = equation(name)
    (out,) = results(eqn, operands(eqn))
    assert (out.size < eqn.invars[0].aval.size) == PRIMITIVES[name].sums_axes
    ones = operands(eqn, 1.0)
    (out,) = results(eqn, ones)
    num = ones[0].size // out.size if PRIMITIVES[name].sums_axes else ones[0].shape[-1]
    of_ones = {"reduce_prod": 1, "cumprod": 1, "cumlogsumexp": 1 + np.log(num)}
    np.testing.assert_allclose(out.max(), of_ones.get(name, num), rtol=1e-6)


@pytest.mark.parametrize("name", with_fact("pole"))
def test_a_pole_gives_inf_where_all_else_is_one(name):
    eqn = equation(name)
    if name == "integer_pow":
        eqn = eqn.replace(params=eqn.params | {"y": -1})
    index, value = PRIMITIVES[name].pole
    values = operands(eqn, 1.0 if name != "pow" else -1.0)
    assert np.isfinite(floats(results(eqn, values))[0]).all()
    values[index] = jnp.full_like(values[index], value)
    assert not np.isfinite(floats(results(eqn, values))[0]).any()


@pytest.mark.parametrize("name", with_fact("outside_domain"))
def test_outside_of_its_domain_a_function_is_nan(name):
    eqn = equation(name)
    probed = np.array([-2.5, -1.5, -0.5, 0.25, 0.5, 1.5, 2.5], np.float32)
    outside = PRIMITIVES[name].outside_domain(probed)
    assert outside.any()
    for x, is_outside in zip(probed, outside, strict=True):
        values = operands(eqn, 0.5)
        values[0] = jnp.full_like(values[0], x)
        (out,) = results(eqn, values)
        assert np.isnan(out).all() == is_outside, x


@pytest.mark.parametrize("name", with_fact("float16_limit"))
def test_float16_overflows_just_beyond_the_limit(name):
    eqn, limit = equation(name), float(PRIMITIVES[name].float16_limit)
    if name == "pow":
        return  # The limit is float16's own.
    fn = lambda x: np.asarray(bind(eqn, jnp.full((4, 4), x, jnp.float16))[0])
    assert np.isfinite(fn(limit - 0.1)).all()
    assert np.isinf(fn(limit + 1)).all()


def test_flops_are_counted_by_the_table():
    for name, facts in PRIMITIVES.items():
        if name not in PROBES or facts.is_matmul or not probes.exists(name):
            continue
        eqn = equation(name)
        if not eqn.outvars:
            continue
        sizes = {
            Flops.NONE: 0,
            Flops.PER_OUTPUT: eqn.outvars[0].aval.size,
            Flops.PER_INPUT: eqn.invars[0].aval.size if eqn.invars else 0,
        }
        assert count_flops(eqn) == sizes[facts.flops], name
