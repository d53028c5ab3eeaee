"""What counting costs: at most 5 % of a loop if every 100th step counts."""

import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mpjax
from mpjax.numerics import probe, tap

INTERVAL = 100
SIZES = (784, 512, 512, 10)


def loss_fn(params, batch, key):
    x = batch
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x.astype(jnp.float32) ** 2), {}


def make(loss_fn, policy):
    tx = mpjax.with_loss_scale(optax.rmsprop(1e-3))
    keys = jax.random.split(jax.random.key(0), len(SIZES))
    params = [
        0.05 * jax.random.normal(key, shape)
        for key, shape in zip(keys, itertools.pairwise(SIZES), strict=False)
    ]
    step = mpjax.make_train_step(loss_fn, tx, policy=policy)
    return step, mpjax.TrainState.create(params=params, tx=tx)


def compile_both(policy, batch):
    plain, state = make(loss_fn, policy)
    tapped, counted_state = make(tap(loss_fn), policy)
    probed = probe(tapped)

    def counting(state, batch):
        return probed.when(state.step % INTERVAL == 0, state, batch)

    counting = jax.jit(counting, donate_argnums=0)
    return (
        (plain.lower(state, batch).compile(), state),
        (counting.lower(counted_state, batch).compile(), counted_state),
    )


@pytest.mark.slow
def test_the_state_of_a_counting_step_is_donated():
    batch = jax.random.uniform(jax.random.key(1), (64, 784))
    compiled = [step for step, _ in compile_both("mixed_float16", batch)]
    sizes = [step.memory_analysis().alias_size_in_bytes for step in compiled]
    assert sizes[0] > 5_000_000
    assert sizes[0] == pytest.approx(sizes[1], abs=64)


@pytest.mark.weekly
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_counting_in_every_100th_step_costs_at_most_5_percent(policy):
    """In processor seconds, which other load disturbs least."""
    batch = jax.random.uniform(jax.random.key(1), (1024, 784))
    (plain, plain_state), (counting, state) = compile_both(policy, batch)
    times = {"plain": [], "between": [], "counted": []}
    for i in range(2 * INTERVAL + 1):
        start = time.process_time()
        plain_state, _ = jax.block_until_ready(plain(plain_state, batch))
        middle = time.process_time()
        (state, _), _ = jax.block_until_ready(counting(state, batch))
        if i:  # The first run of a program is slower.
            times["plain"].append(middle - start)
            kind = "between" if i % INTERVAL else "counted"
            times[kind].append(time.process_time() - middle)
    plain_s, between_s, counted_s = (np.median(t) for t in times.values())
    mean_s = (counted_s + (INTERVAL - 1) * between_s) / INTERVAL
    print(f"{policy}: {mean_s / plain_s:.3f}, a counted step {counted_s / plain_s:.2f}")
    assert mean_s <= 1.05 * plain_s


def test_convolutions_counted_in_some_steps_have_the_form_that_xla_cpu_runs_fast():
    """XLA:CPU brings no convolution inside a conditional into it."""
    conv = lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    loss = lambda w, x: jnp.mean(conv(w, jnp.tanh(conv(w, x))) ** 2)
    w = jax.random.normal(jax.random.key(0), (3, 3, 4, 4))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 4))
    probed = probe(jax.value_and_grad(tap(loss)))
    text = jax.jit(probed.when).lower(True, w, x).compile().as_text()
    labels = re.findall(r" convolution\(.*dim_labels=(\w+->\w+)", text)
    assert len(labels) >= 10  # five of the function, and five to count
    assert set(labels) == {"b01f_01io->b01f"}

    _, sampled = probed.when(True, w, x)
    _, always = probed(w, x)
    jax.tree.map(np.testing.assert_array_equal, sampled, always)
    moved = probe(jax.value_and_grad(tap(loss)), ops=["transpose"])
    assert list(moved.when(True, w, x)[1]) == list(moved(w, x)[1])
