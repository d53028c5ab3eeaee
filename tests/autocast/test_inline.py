"""Loops in jitted functions: inlined, their residuals are minimized like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cells import (
    CELLS,
    WIDTH,
    W,
    X,
    evaluate,
    gated,
    in_half,
    num_stacked_bytes,
    over,
    stacked,
)
from helpers.tools import assert_same_bits, thinned
from jax import lax, nn
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mpjax import autocast, full_precision
from mpjax._autocast.inline import inline_calls_with_scans, returns_constants
from mpjax._autocast.residuals import minimize_residuals
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr, walk

POLICIES = ["mixed_bfloat16", "float32"]


def layers(run):
    """Returns the loss of two recurrent layers, each computed by `run`."""

    def loss(w, x):
        return jnp.mean(run(w, run(w / 2, x)) ** 2)

    return loss


def sequence(w, x):
    step = lambda h, x: (gated(w, h, x)[0],) * 2
    return lax.scan(step, x[0], x)[1]


def last(w, x):
    """Returns an argument and a number among its results."""
    h, _ = lax.scan(lambda h, x: gated(w, h, x), x[0], x)
    return h, x, 1.0


MASK = np.tri(len(X), WIDTH, dtype=np.float32)


def masked(w, x, mask=MASK):
    def step(h, x):
        x, m = x
        h = m * gated(w, h, x)[0] + (1 - m) * h
        return h, h * nn.sigmoid(m * h)

    h, ys = lax.scan(step, x[0], (x, mask))
    return ys + h * mask[0]


PAIRS = {
    **{name: (jax.jit(fn), fn) for name, fn in CELLS.items() if name != "jit"},
    "jit in jit": (
        lambda w, x: jax.jit(jax.jit(over(gated)))(w, x) + jnp.sum(w),
        lambda w, x: over(gated)(w, x) + jnp.sum(w),
    ),
    "called twice": (layers(jax.jit(sequence)), layers(sequence)),
    "a constant taken apart": (layers(jax.jit(masked)), layers(masked)),
    "an argument taken apart": (
        lambda w, x: layers(jax.jit(functools.partial(masked, mask=abs(x[:, 0]))))(
            w, x
        ),
        lambda w, x: layers(functools.partial(masked, mask=abs(x[:, 0])))(w, x),
    ),
    "forwarded": (
        lambda w, x: sum(jnp.sum(y) for y in jax.jit(last)(w, x)),
        lambda w, x: sum(jnp.sum(y) for y in last(w, x)),
    ),
}


def cut(closed):
    """Runs both passes: inlines calls, then minimizes residuals."""
    return minimize_residuals(inline_calls_with_scans(closed))


@pytest.mark.parametrize("policy", thinned(POLICIES))
@pytest.mark.parametrize("name", PAIRS)
def test_residuals_in_jits_are_those_without_jits(name, policy):
    inside, outside = (
        in_half(jax.make_jaxpr(jax.value_and_grad(fn))(W, X), policy)
        for fn in PAIRS[name]
    )
    new = cut(inside)
    check_jaxpr(open_jaxpr(new))
    assert stacked(new) == stacked(cut(outside))
    assert_same_bits(evaluate(new, W, X), evaluate(inside, W, X))


@pytest.mark.parametrize("name", ["gated", "lstm", "called twice"])
def test_residuals_in_jits_shrink(name):
    closed = jax.make_jaxpr(jax.grad(PAIRS[name][0]))(W, X)
    alone = jax.make_jaxpr(jax.grad(PAIRS[name][1]))(W, X)
    assert num_stacked_bytes(closed) == num_stacked_bytes(alone)
    assert num_stacked_bytes(cut(closed)) < num_stacked_bytes(closed)


def test_through_autocast_compiled():
    grads = [jax.grad(fn) for fn in PAIRS["called twice"]]
    jitted, plain = (jax.jit(autocast(grad)) for grad in grads)
    assert_same_bits(jitted(W, X), plain(W, X))
    memory = [fn.lower(W, X).compile().memory_analysis() for fn in (jitted, plain)]
    assert memory[0].temp_size_in_bytes == memory[1].temp_size_in_bytes


def test_name_scopes_and_source_lines_survive():
    @jax.jit
    def encoder(w, x):
        with jax.named_scope("encoder"):
            return sequence(w, x)

    def loss(w, x):
        with jax.named_scope("model"):
            return jnp.sum(encoder(w, x))

    closed = jax.make_jaxpr(jax.grad(loss))(W, X)
    new = cut(closed)
    assert new is not closed
    lines = [
        [
            (scope, eqn.source_info.traceback)
            for eqn, scope, _ in walk(each)
            if eqn.primitive.name == "scan"
        ]
        for each in (closed, new)
    ]
    assert lines[0] == lines[1]
    assert {scope for scope, _ in lines[0]} == {"model/encoder"}


def effectful(w, x):
    jax.debug.print("{}", x[0, 0, 0])
    return sequence(w, x)


def counted(w, x):
    total = jax.new_ref(jnp.zeros(x.shape[1:]))

    def step(h, x):
        h, _ = gated(w, h, x)
        total[...] += lax.stop_gradient(h)
        return h, h

    ys = lax.scan(step, jnp.zeros(x.shape[1:]), x)[1]
    return ys + total[...]


def annotated(w, x):
    with set_xla_metadata(inlineable="false"):
        return jax.jit(sequence)(w, x)


MESH = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
KEPT = {
    "full_precision": full_precision(sequence),
    "autocast": autocast(sequence),
    "sharded": jax.jit(sequence, out_shardings=NamedSharding(MESH, P("data"))),
    "effectful": jax.jit(effectful),
    "counted": jax.jit(counted),
    "annotated": annotated,
}


def num_calls(closed):
    return sum(eqn.primitive.name == "jit" for eqn in open_jaxpr(closed).eqns)


@pytest.mark.parametrize("name", KEPT)
def test_a_call_with_effects_or_annotations_stays(name):
    alone = lambda w, x: jnp.sum(KEPT[name](w, x))
    closed = jax.make_jaxpr(jax.grad(alone))(W, X)
    assert num_calls(closed) == 2
    assert cut(closed) is closed
    beside = lambda w, x: alone(w, jax.jit(sequence)(w, x))
    closed = jax.make_jaxpr(jax.grad(beside))(W, X)
    new = cut(closed)
    check_jaxpr(open_jaxpr(new))
    # The backward pass of a function that prints does not print.
    num_left = 1 if name == "effectful" else 2
    assert (num_calls(closed), num_calls(new)) == (4, num_left)


def test_calls_that_pass_on_no_stacked_array_stay():
    """Many calls of one function share its one jaxpr."""
    softer = jax.jit(lambda w, x: x + jnp.tanh(sequence(w, x)))

    def loss(w, x):
        for _ in range(3):
            x = softer(w, x)
        return jnp.sum(lax.map(jnp.sin, x) + lax.map(jnp.cos, x))

    closed = jax.make_jaxpr(loss)(W, X)
    assert num_calls(closed) >= 3
    assert inline_calls_with_scans(closed) is closed


def test_a_constant_appears_once():
    """For calls of one function, and for its forward and backward pass."""
    layer = jax.jit(masked)

    def loss(w, x):
        for _ in range(4):
            x = layer(w, x)
        return jnp.sum(x)

    new = cut(jax.make_jaxpr(jax.grad(loss))(W, X))
    assert sum(map(returns_constants, open_jaxpr(new).eqns)) == 1


def test_with_a_collective_inside():
    def synced(w, x):
        h = lax.pmean(sequence(w, x), "data")
        return sequence(w, h - lax.pmean(h, "data"))

    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=devices)
    both = P(), P(None, "data")

    def closed(run):
        loss = lambda w, x: lax.pmean(jnp.sum(run(w, x) ** 2), "data")
        fn = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=both, out_specs=P())
        return cut(jax.make_jaxpr(fn)(W, x))

    x = np.concatenate([X, X[:, :1]], 1)
    inside, outside = closed(jax.jit(synced)), closed(synced)
    check_jaxpr(open_jaxpr(inside))
    assert stacked(inside) == stacked(outside)


def test_without_gain_the_jaxpr_is_the_same_object():
    last = jax.jit(lambda c, y: lax.scan(lambda c, y: (c + y, None), c, y)[0])

    def lengths_differ(w, x):
        return last(x[0], jax.jit(sequence)(w, x)[1:])

    for fn in (jax.jit(sequence), lengths_differ, jax.jit(lambda w, x: x @ w[0])):
        closed = jax.make_jaxpr(fn)(W, X)
        assert cut(closed) is closed
