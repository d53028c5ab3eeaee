"""Loops in jitted functions: side by side, what they save is cut as that of any."""

import jax
import jax.numpy as jnp
import pytest
from autocast.loops import (
    CELLS,
    W,
    X,
    evaluate,
    gated,
    in_half,
    num_stacked_bytes,
    over,
    stacked,
)
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tools import assert_same_bits

from mpjax import autocast, full_precision
from mpjax._jaxpr import check_jaxpr, open_jaxpr, walk
from mpjax.autocast._stacks import with_fewer_stacks

POLICIES = ["float32", "mixed_bfloat16", "mixed_float16"]


def layers(run):
    """Two recurrent layers, `run` each."""

    def loss(w, x):
        return jnp.mean(run(w, run(w / 2, x)) ** 2)

    return loss


def sequence(w, x):
    step = lambda h, x: (gated(w, h, x)[0],) * 2
    return lax.scan(step, jnp.zeros(x.shape[1:]), x)[1]


def last(w, x):
    """A result that is an argument, and one that is a number."""
    h, _ = lax.scan(lambda h, x: gated(w, h, x), x[0], x)
    return h, x, 1.0


PAIRS = {
    **{name: (jax.jit(fn), fn) for name, fn in CELLS.items() if name != "jit"},
    "jit in jit": (
        lambda w, x: jax.jit(jax.jit(over(gated)))(w, x) + jnp.sum(w),
        lambda w, x: over(gated)(w, x) + jnp.sum(w),
    ),
    "called twice": (layers(jax.jit(sequence)), layers(sequence)),
    "forwarded": (
        lambda w, x: sum(jnp.sum(y) for y in jax.jit(last)(w, x)),
        lambda w, x: sum(jnp.sum(y) for y in last(w, x)),
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", PAIRS)
def test_they_are_cut_as_those_outside(name, policy):
    inside, outside = (
        in_half(jax.make_jaxpr(jax.value_and_grad(fn))(W, X), policy)
        for fn in PAIRS[name]
    )
    new = with_fewer_stacks(inside)
    check_jaxpr(open_jaxpr(new))
    assert stacked(new) == stacked(with_fewer_stacks(outside))
    assert_same_bits(evaluate(new, W, X), evaluate(inside, W, X))


@pytest.mark.parametrize("name", ["gated", "lstm", "called twice"])
def test_and_are_less_for_it(name):
    closed = jax.make_jaxpr(jax.grad(PAIRS[name][0]))(W, X)
    alone = jax.make_jaxpr(jax.grad(PAIRS[name][1]))(W, X)
    assert num_stacked_bytes(closed) == num_stacked_bytes(alone)
    assert num_stacked_bytes(with_fewer_stacks(closed)) < num_stacked_bytes(closed)


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
    new = with_fewer_stacks(closed)
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


MESH = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
KEPT = {
    "full_precision": full_precision(sequence),
    "autocast": autocast(sequence),
    "sharded": jax.jit(sequence, out_shardings=NamedSharding(MESH, P("data"))),
}


def num_calls(closed):
    return sum(eqn.primitive.name == "jit" for eqn in open_jaxpr(closed).eqns)


@pytest.mark.parametrize("name", KEPT)
def test_a_call_of_which_more_is_asked_stays(name):
    alone = lambda w, x: jnp.sum(KEPT[name](w, x))
    closed = jax.make_jaxpr(jax.grad(alone))(W, X)
    assert num_calls(closed) == 2
    assert with_fewer_stacks(closed) is closed
    beside = lambda w, x: alone(w, jax.jit(sequence)(w, x))
    closed = jax.make_jaxpr(jax.grad(beside))(W, X)
    new = with_fewer_stacks(closed)
    assert (num_calls(closed), num_calls(new)) == (4, 2)
    assert_same_bits(evaluate(new, W, X), evaluate(closed, W, X))


def test_what_has_nothing_to_gain_is_the_very_object():
    last = jax.jit(lambda c, y: lax.scan(lambda c, y: (c + y, None), c, y)[0])

    def lengths_differ(w, x):
        return last(x[0], jax.jit(sequence)(w, x)[1:])

    for fn in (jax.jit(sequence), lengths_differ, jax.jit(lambda w, x: x @ w[0])):
        closed = jax.make_jaxpr(fn)(W, X)
        assert with_fewer_stacks(closed) is closed
