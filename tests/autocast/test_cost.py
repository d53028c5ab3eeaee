"""The cost of autocast when a function is traced."""

import statistics
import time

import jax
import pytest
from helpers.tools import thinned

import mpjax
from experiments.models.small import CASES
from mpjax._autocast.api import make_settings
from mpjax._autocast.pipeline import rewrite_in_half

NUM_ROUNDS = 9
MAX_ROUNDS = 36
FRAMES_PER_ROUND = 25


def timed(fn, num_frames=0):
    """Returns this thread's seconds in a call, nothing traced before, and its result.

    Python keeps its frames in chunks: a frequent call, at the depth where a chunk ends,
    gets and frees memory every time. A call timed at one depth alone can be at such
    a depth and take three times as long; at nine depths, 25 frames apart, some are not.
    """
    jax.clear_caches()
    if num_frames:
        return below(num_frames, lambda: timed(fn))
    start = time.thread_time()
    result = fn()
    return time.thread_time() - start, result


def below(num_frames, fn):
    """Calls a function below `num_frames` more frames."""
    return below(num_frames - 1, fn) if num_frames else fn()


@pytest.mark.parametrize("name", thinned(CASES, 4, rest="weekly"))
def test_tracing_takes_at_most_twice_as_long(name):
    """The minimum over interleaved rounds; more rounds if other load disturbs them."""
    case = CASES[name]()
    times = []
    while len(times) < MAX_ROUNDS:
        plain = jax.value_and_grad(lambda p, x: case.loss(p, x))
        cast = mpjax.autocast(jax.value_and_grad(lambda p, x: case.loss(p, x)))
        depth = FRAMES_PER_ROUND * (len(times) % NUM_ROUNDS)
        without, with_it = (
            timed(lambda fn=fn: jax.jit(fn).trace(case.params, case.inputs), depth)[0]
            for fn in (plain, cast)
        )
        times.append((with_it, without))
        least, least_without = map(min, zip(*times, strict=True))
        if len(times) >= NUM_ROUNDS and least <= 2 * least_without:
            return
    pytest.fail(f"{least} s, {least_without} s without autocast")


def test_the_rewrite_takes_little_of_the_tracing_time():
    """At most 15 % of `make_jaxpr`, for the transformer block and its gradient."""
    case = CASES["transformer_block"]()
    settings = make_settings("mixed_bfloat16", (), ())
    ratios = []
    for _ in range(NUM_ROUNDS):
        fn = jax.value_and_grad(lambda p, x: case.loss(p, x))
        tracing, jaxpr = timed(
            lambda fn=fn: jax.make_jaxpr(fn)(case.params, case.inputs)
        )
        start = time.thread_time()
        rewritten = rewrite_in_half(jaxpr, settings)
        ratios.append((time.thread_time() - start) / tracing)
        assert rewritten is not jaxpr
    assert statistics.median(ratios) <= 0.15
