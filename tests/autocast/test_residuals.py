"""Residuals between scans: the fewest bytes that rematerialize the rest."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cells import (
    BATCH,
    CELLS,
    LENGTH,
    WIDTH,
    W,
    X,
    evaluate,
    gated,
    in_half,
    is_var,
    layer,
    num_stacked_bytes,
    over,
    scans,
    stacked,
)
from helpers.tools import assert_same_bits, thinned
from jax import lax, nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax import autocast
from mpjax._autocast.hoist import hoist_casts_out_of_scans
from mpjax._autocast.residuals import minimize_residuals
from mpjax._jaxpr import loops
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr
from mpjax._jaxpr.loops import Scan


def shrunk(closed):
    new = minimize_residuals(closed)
    check_jaxpr(open_jaxpr(new))
    return new


@pytest.mark.parametrize(
    "policy", thinned(["mixed_bfloat16", "mixed_float16", "float32"], 3)
)
@pytest.mark.parametrize("name", thinned(CELLS, 2))
def test_every_value_is_bitwise_the_same(name, policy):
    closed = in_half(jax.make_jaxpr(jax.value_and_grad(CELLS[name]))(W, X), policy)
    new = shrunk(closed)
    assert num_stacked_bytes(new) <= num_stacked_bytes(closed)
    assert_same_bits(evaluate(new, W, X), evaluate(closed, W, X))


def kept(name, policy="float32"):
    closed = in_half(jax.make_jaxpr(jax.grad(CELLS[name]))(W, X), policy)
    return stacked(shrunk(closed))[0], stacked(closed)[0]


def test_a_gate_keeps_only_itself():
    """Not `1 - z`, `z * (1 - z)` and `1 - tanh**2`."""
    array = f"float32[{LENGTH},{BATCH},{WIDTH}]"
    assert kept("gated") == ([array] * 3, [array] * 6)


def test_a_layer_keeps_values_that_rematerialize_the_rest():
    """A normalization keeps its deviations, gelu its half operand and the tanh."""
    new, old = kept("layers", "mixed_bfloat16")
    wide, narrow = f"[{LENGTH},{BATCH},{2 * WIDTH}]", f"[{LENGTH},{BATCH},{WIDTH}]"
    assert sum(x.endswith(wide) for x in old) >= 5
    assert sum(x.endswith(wide) for x in new) == 2
    assert f"bfloat16{wide}" in new
    assert [x for x in new if x.endswith(narrow)] == [f"bfloat16{narrow}"] * 2


# --- The optimum, found by trying every set.


@st.composite
def bodies(draw):
    """Draws operations on earlier results, and the results that are residuals."""
    index = st.integers(0, 20)
    names = st.sampled_from(["sin", "add", "neg", "half", "full", "sum", "scale"])
    steps = draw(st.lists(st.tuples(names, index, index), min_size=2, max_size=7))
    return steps, draw(st.sets(index, min_size=1, max_size=4))


OPERATIONS = {
    "sin": lambda a, b: lax.sin(a),
    "add": lambda a, b: a + b.astype(a.dtype),
    "neg": lambda a, b: -a,
    "half": lambda a, b: a.astype(jnp.bfloat16),
    "full": lambda a, b: a.astype(jnp.float32),
    "sum": lambda a, b: a + jnp.sum(b).astype(a.dtype),
    "scale": lambda a, b: a * 3,
}


def two_loops(program):
    steps, chosen = program

    def fn(c, x):
        def first(c, x):
            pool = [c, x * 2 if "scale" in dict.fromkeys(s[0] for s in steps) else x]
            for name, i, j in steps:
                pool.append(OPERATIONS[name](pool[i % len(pool)], pool[j % len(pool)]))
            return lax.sin(c + x), [pool[i % len(pool)] for i in sorted(chosen)]

        def second(c, ys):
            return c + sum(lax.sin(y.astype(jnp.float32)) for y in ys), None

        c, ys = lax.scan(first, c, x)
        return lax.scan(second, c, ys, reverse=True)[0]

    return fn


def least_bytes(closed):
    """Returns the fewest bytes of any set that rematerializes the residuals."""
    first = scans(closed)[0]
    body = open_jaxpr(first.params["jaxpr"])
    num_consts, num_carry = Scan(first).num_consts, Scan(first).num_carry
    free = {*body.invars[:num_consts], *body.invars[num_consts + num_carry :]}
    targets = {v for v in body.outvars[num_carry:] if is_var(v)}
    candidates = [v for e in body.eqns for v in e.outvars]
    candidates += body.invars[num_consts : num_consts + num_carry]

    def gives_all(chosen):
        known = free | set(chosen)
        for eqn in body.eqns:
            cheap = eqn.primitive.name not in ("sin", "reduce_sum", "jit")
            if cheap and all(not is_var(x) or x in known for x in eqn.invars):
                known |= set(eqn.outvars)
        return targets <= known

    def num_bytes(v):
        return LENGTH * v.aval.size * v.aval.dtype.itemsize

    sets = itertools.chain.from_iterable(
        itertools.combinations(candidates, n) for n in range(len(targets) + 1)
    )
    return min(sum(map(num_bytes, chosen)) for chosen in sets if gives_all(chosen))


@hypothesis.settings(max_examples=60)
@hypothesis.given(bodies())
def test_no_other_choice_takes_fewer_bytes(program):
    closed = jax.make_jaxpr(two_loops(program))(X[0], X)
    new = shrunk(closed)
    assert_same_bits(evaluate(new, X[0], X), evaluate(closed, X[0], X))
    first, second = scans(new)
    made = first.outvars[Scan(first).num_carry :]
    taken = {x for x in second.invars if is_var(x)}.intersection(made)
    found = sum(v.aval.size * v.aval.dtype.itemsize for v in taken)
    assert found == least_bytes(closed)


# --- What stays as it was.


def sigmoids(w, x):
    step = lambda h, x: (nn.sigmoid(h @ w + x),) * 2
    return lax.scan(step, jnp.zeros(x.shape[1:]), x)[1]


def test_residuals_with_other_uses_stay():
    def fn(w, x):
        def first(h, x):
            a = lax.sin(h @ w + x)
            b = 3 * a
            return a, (a, b, b + 1)

        def second(h, ys):
            a, b, c = ys
            return h * a + b * lax.sin(c), None

        h, (a, b, c) = lax.scan(first, jnp.zeros(x.shape[1:]), x)
        return lax.scan(second, h, (a, b, c))[0], b

    args = W[0][:, :WIDTH], X
    closed = jax.make_jaxpr(fn)(*args)
    new = shrunk(closed)
    # `b` is an output, and rematerializes `c`.
    assert [len(outs) for outs in stacked(closed)] == [3]
    assert [len(outs) for outs in stacked(new)] == [2]
    assert_same_bits(evaluate(new, *args), evaluate(closed, *args))


def with_unused(p):
    return lax.sin(p), (p, p * 2, p + 1)


def with_pieces(p):
    a, b = jnp.split(p, 2, -1)
    return p, (p, a, b, a * 2)


@jax.jit
def two(p):
    return p * 2, p + 1


def with_call(p):
    a, b = two(p)
    return p, (p, a, b, a * 2)


@pytest.mark.parametrize("make", [with_unused, with_pieces, with_call])
@pytest.mark.parametrize("used", thinned(["", "p", "pa", "ab"]))
def test_operations_of_several_results_and_unused_stacks(make, used):
    def fn(w, x):
        first = lambda h, x: make(lax.sin(h @ w + x))
        h, (p, a, *rest) = lax.scan(first, x[0], x)
        total = lambda h, ys: (h + sum(jnp.sum(lax.sin(y)) for y in ys), None)
        return lax.scan(total, h, (a, *rest))[0], *(
            {"p": p, "a": a, "b": rest}[n] for n in used
        )

    args = W[0][:, :WIDTH], X
    closed = jax.make_jaxpr(fn)(*args)
    new = shrunk(closed)
    assert num_stacked_bytes(new) <= num_stacked_bytes(closed)
    assert_same_bits(evaluate(new, *args), evaluate(closed, *args))


def test_with_jit_disabled_and_with_references():
    grad = jax.grad(CELLS["gated"])
    closed = jax.make_jaxpr(grad)(W, X)
    loops._count_params.cache_clear()
    with jax.disable_jit():
        assert minimize_residuals(closed) is not closed

    def with_reference(w, x):
        total = jax.new_ref(jnp.zeros(x.shape))

        def first(h, x):
            p = lax.sin(h @ w + x)
            return p, (p, p + 1, p + 2)

        def second(h, ys):
            reference, ys = ys
            reference[...] = ys[0]
            return h + lax.sin(ys[1]) * ys[2], None

        h, ys = lax.scan(first, x[0], x)
        return lax.scan(second, h, (total, ys))[0], total[...]

    args = W[0][:, :WIDTH], X
    closed = jax.make_jaxpr(with_reference)(*args)
    new = hoist_casts_out_of_scans(in_half(shrunk(closed), "mixed_bfloat16"))
    check_jaxpr(open_jaxpr(new))


def test_inputs_and_constants_of_the_first_serve_the_second_without_a_stack():
    def fn(gain, c, x):
        first = lambda c, x: (lax.sin(c), (x * gain, x * gain + 2))
        c, ys = lax.scan(first, c, x)
        second = lambda c, ys: (c * ys[0] + lax.sin(ys[1]), None)
        return lax.scan(second, c, ys, reverse=True)[0]

    args = W[0][0, :WIDTH], X[0], X
    closed = jax.make_jaxpr(fn)(*args)
    new = shrunk(closed)
    assert [len(outs) for outs in stacked(closed)] == [2]
    assert stacked(new) == []
    assert_same_bits(evaluate(new, *args), evaluate(closed, *args))


def test_without_gain_the_jaxpr_is_the_same_object():
    def lengths_differ(w, x):
        ys = sigmoids(w, x)
        return lax.scan(lambda c, y: (c + lax.sin(1 - y), None), x[0], ys[1:])[0]

    w = W[0][:, :WIDTH]
    for fn in (sigmoids, lengths_differ, lambda w, x: x @ w):
        closed = jax.make_jaxpr(fn)(w, X)
        assert minimize_residuals(closed) is closed
    # All float32: nothing to rewrite, and nothing is rewritten.
    grad = jax.grad(CELLS["gated"])
    closed = jax.make_jaxpr(autocast(grad, "float32"))(W, X)
    assert max(map(len, stacked(closed))) == 6


def test_the_same_function_gives_the_same_jaxpr():
    """So that a cache of compiled programs finds it."""
    grad = autocast(jax.grad(CELLS["layers"]))
    first, second = (str(jax.make_jaxpr(grad)(W, X)) for _ in range(2))
    jax.clear_caches()
    assert first == second == str(jax.make_jaxpr(grad)(W, X))


def test_a_batch_of_symbolic_size():
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((LENGTH, b, WIDTH), "float32")

    def grad(w, x):
        start = jnp.zeros(x.shape[1:])
        return jax.grad(
            lambda w: jnp.mean(lax.scan(functools.partial(gated, w), start, x)[0])
        )(w)

    exported = jax.export.export(jax.jit(autocast(grad)))(W, x)
    expected = jax.jit(autocast(grad))(W, X)
    np.testing.assert_allclose(exported.call(W, X), expected, rtol=1e-5)


def layers_gradient(x):
    """The gradient for the input: JAX refuses that for weights with explicit axes."""
    return jax.grad(lambda x: over(layer, x)(W, jnp.ones((LENGTH, WIDTH))))(x)


@pytest.mark.parametrize("axis_type", thinned(["Auto", "Explicit", "Manual"], 3))
def test_on_several_devices(axis_type):
    fn, x = autocast(layers_gradient), X[:4, 0]
    expected = jax.jit(fn)(x)
    kind = AxisType.Explicit if axis_type == "Explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), (kind,), devices=jax.devices()[:2])
    if axis_type == "Manual":
        rows = P("data")  # The loss is a mean, here over each half.
        half = lambda x: autocast(layers_gradient)(x) / 2
        fn = jax.shard_map(half, mesh=mesh, in_specs=rows, out_specs=rows)
    else:
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
    closed = jax.make_jaxpr(fn)(x)
    check_jaxpr(open_jaxpr(closed))
    first, *_ = scans(closed)
    assert sum(v.aval.shape[-1] == 2 * WIDTH for v in first.outvars) == 2
    # Each is some 2 % away from float32, and not in the same way.
    limit = 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(jax.jit(fn)(x), expected, atol=limit)


@pytest.mark.weekly
def test_it_differentiates_again():
    twice = lambda grad: jax.grad(lambda w: jnp.sum(grad(w, X) ** 2))
    grad = jax.grad(CELLS["gated"])
    expected = twice(grad)(W)
    np.testing.assert_allclose(
        twice(autocast(grad))(W), expected, atol=0.05 * abs(expected).max()
    )
