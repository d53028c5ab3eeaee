"""What autocast costs when a function is traced."""

import statistics
import time

import jax
import pytest

import mpjax
from experiments.models.small import CASES
from mpjax.autocast._rewrite import Rewriter
from mpjax.autocast._tables import make_table
from mpjax.policy import resolve

NUM_ROUNDS = 9
MAX_ROUNDS = 40


def timed(fn):
    """Seconds of this thread in a call, with nothing traced before, and its result."""
    jax.clear_caches()
    start = time.thread_time()
    result = fn()
    return time.thread_time() - start, result


@pytest.mark.parametrize("name", CASES)
def test_tracing_takes_at_most_twice_as_long(name):
    """The least of interleaved rounds, more of them where other work disturbs."""
    case = CASES[name]()
    times = []
    while len(times) < MAX_ROUNDS:
        plain = jax.value_and_grad(lambda p, x: case.loss(p, x))
        cast = mpjax.autocast(jax.value_and_grad(lambda p, x: case.loss(p, x)))
        without, _ = timed(lambda fn=plain: jax.jit(fn).trace(case.params, case.inputs))
        with_it, _ = timed(lambda fn=cast: jax.jit(fn).trace(case.params, case.inputs))
        times.append((with_it, without))
        least, least_without = map(min, zip(*times, strict=True))
        if len(times) >= NUM_ROUNDS and least <= 2 * least_without:
            return
    pytest.fail(f"{least} s, {least_without} s without autocast")


def test_the_rewrite_takes_little_of_that():
    """At most 15 % of `make_jaxpr`, for the transformer block and its gradient."""
    case = CASES["transformer_block"]()
    table = make_table((), ())
    ratios = []
    for _ in range(NUM_ROUNDS):
        fn = jax.value_and_grad(lambda p, x: case.loss(p, x))
        tracing, jaxpr = timed(
            lambda fn=fn: jax.make_jaxpr(fn)(case.params, case.inputs)
        )
        start = time.thread_time()
        rewritten, _ = Rewriter(resolve("mixed_bfloat16"), table).rewrite(jaxpr)
        ratios.append((time.thread_time() - start) / tracing)
        assert rewritten is not jaxpr
    assert statistics.median(ratios) <= 0.15
