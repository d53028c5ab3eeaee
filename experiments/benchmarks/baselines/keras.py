"""Keras 3 on JAX: the network of its guide, trained by `train_on_batch`.

`train_on_batch` waits for the loss of each step, as it does for every user of it.
"""

import functools
import importlib
import os
from typing import Any

import numpy as np

from experiments.benchmarks.baselines.baseline import Baseline, Case, Step
from experiments.benchmarks.workloads import LEARNING_RATE


def sequential(case: Case, *, policy: str) -> Step:
    """Builds two hidden layers and a softmax in float32, compiled with RMSprop."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    module: Any = importlib.import_module("keras")
    if module.backend.backend() != "jax":
        raise RuntimeError("Keras runs on another backend: set KERAS_BACKEND=jax.")
    layers = [case.params[name] for name in sorted(case.params)]
    activations = ["relu"] * (len(layers) - 1) + [None]
    dense = [
        module.layers.Dense(layer["bias"].size, activation=activation, dtype=policy)
        for layer, activation in zip(layers, activations, strict=True)
    ]
    softmax = module.layers.Activation("softmax", dtype="float32")
    model = module.Sequential([module.Input((784,)), *dense, softmax])
    for keras_layer, layer in zip(dense, layers, strict=True):
        keras_layer.set_weights(
            [np.asarray(layer["kernel"]), np.asarray(layer["bias"])]
        )
    optimizer = module.optimizers.RMSprop(LEARNING_RATE, rho=0.9, epsilon=1e-7)
    if policy == "mixed_float16":  # As Keras does by itself under a global policy.
        optimizer = module.optimizers.LossScaleOptimizer(optimizer)
    model.compile(loss="sparse_categorical_crossentropy", optimizer=optimizer)
    images, labels = case.batch["image"], case.batch["label"]

    def run(num_steps: int = 1) -> float:
        loss: Any = None
        for _ in range(num_steps):
            loss = model.train_on_batch(images, labels)
        return float(np.ravel(loss)[0])

    return Step(run)


def baselines() -> list[Baseline]:
    """Returns float32 and both mixed policies; float16 scales its loss."""
    needs = ("keras", "pip install keras")
    return [
        Baseline(
            f"Keras, {policy}",
            functools.partial(sequential, policy=policy),
            "Keras, float32",
            workloads=("mlp",),
            needs=needs,
        )
        for policy in ("float32", "mixed_float16", "mixed_bfloat16")
    ]
