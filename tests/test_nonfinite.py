"""When a loop should give up, and what it says."""

import jax.numpy as jnp
import numpy as np
import pytest

import mpjax


def row(finite, scale, **more):
    return {"grads_finite": jnp.array(finite), "loss_scale": jnp.float32(scale), **more}


def guard(max_consecutive_skipped=3, scale=None):
    scale = scale or mpjax.DynamicLossScale(min_loss_scale=4.0)
    return mpjax.NonFiniteGuard(scale, max_consecutive_skipped=max_consecutive_skipped)


def test_skips_above_the_minimum_do_not_count():
    watch = guard()
    for power in range(15, 2, -1):
        watch.check(row(False, 2.0**power))
    assert watch.num_consecutive_skipped == 0


def test_raises_after_exactly_the_given_number_of_skips_at_the_minimum():
    watch = guard()
    watch.check(row(False, 8))
    watch.check(row(False, 4))
    watch.check(row(True, 4))
    watch.check(row(False, 4))
    watch.check(row(False, 4))
    with pytest.raises(mpjax.NonFiniteTrainingError) as error:
        watch.check(row(False, 4, loss=jnp.float32(np.nan), grad_norm=np.inf))
    for word in ("3 steps", "(4)", "loss=nan", "grad_norm=inf", "Look for"):
        assert word in str(error.value)


def test_the_error_names_what_was_found():
    watch = guard(max_consecutive_skipped=2)
    calls = []
    find = lambda: calls.append(1) or "log at model.py:3"
    watch.check(row(False, 4), find)
    assert not calls
    with pytest.raises(
        mpjax.NonFiniteTrainingError, match=r"log at model\.py:3"
    ) as error:
        watch.check(row(False, 4), find)
    assert error.value.found == "log at model.py:3"


def test_stacked_metrics_of_a_scan():
    watch = guard()
    finite = jnp.array([False, True, False, False, False])
    loss = jnp.arange(5.0)
    with pytest.raises(mpjax.NonFiniteTrainingError, match=r"loss=4\.0"):
        watch.check(
            {"grads_finite": finite, "loss_scale": jnp.full(5, 4.0), "loss": loss}
        )


@pytest.mark.parametrize(
    ("scale", "at"), [(mpjax.NoOpLossScale(), 1), (mpjax.StaticLossScale(128.0), 128)]
)
def test_scales_that_never_move_are_always_at_the_minimum(scale, at):
    watch = guard(1, scale)
    with pytest.raises(mpjax.NonFiniteTrainingError):
        watch.check(row(False, at))


def test_the_number_of_skips_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1"):
        guard(0)
