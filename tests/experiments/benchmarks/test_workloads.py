"""The workloads that no other test trains: speech."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import workloads


@pytest.mark.weekly
def test_the_speech_workload_has_utterances_to_align_and_a_finite_gradient():
    workload = workloads.speech(1.0, num_units=16, num_layers=1, num_channels=2)
    params = jax.jit(workload.init_params)(jax.random.key(0))
    batch = workload.make_batch(jax.random.key(1), 8)
    assert batch["features"].shape == (8, 100, 40)
    assert 60 <= batch["num_frames"].min() <= batch["num_frames"].max() <= 100
    assert 4 <= batch["num_labels"].min() <= batch["num_labels"].max() <= 8

    @jax.jit
    @jax.value_and_grad
    def loss_and_grads(params):
        return workload.loss_fn(params, batch, jax.random.key(2))[0]

    loss, grads = loss_and_grads(params)
    # 27 equally likely symbols in 30 to 50 outputs, of which a label may take several:
    # each of some 15 choices costs log(27) or so.
    assert 15 * np.log(27) < loss < 50 * np.log(27)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_the_large_speech_workload_has_50_million_parameters():
    params = jax.eval_shape(workloads.speech_large().init_params, jax.random.key(0))
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6) == 50
