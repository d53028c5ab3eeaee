"""Compares the arrays that a step saves with its temporaries on an H100; prints JSON.

    python tests/helpers/h100_saved.py       # needs pip install "jax[cuda13]", no GPU

Prints the sum of the saved arrays as a share of the temporaries, per model and policy.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.h100 import large_cases

import mpjax
from mpjax.cost import analyze


def full(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


class ResidualBlocks(nn.Module):
    """Three residual blocks with BatchNorm."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=False)(x)
        conv = lambda x: nn.Conv(64, (3, 3), use_bias=False)(x)
        x = nn.relu(norm(conv(x)))
        for _ in range(3):
            y = nn.relu(norm(conv(x)))
            x = nn.relu(x + norm(conv(y)))
        return nn.Dense(10)(x.mean((1, 2)))


def residual_convnet():
    model = ResidualBlocks()
    x, labels = full(256, 32, 32, 3), jax.ShapeDtypeStruct((256,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def loss(params, batch_stats, x, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, _ = model.apply(variables, x, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    return loss, variables["params"], variables["batch_stats"], x, labels


def scanned_mlp():
    """Four residual layers in a scan, at batch 8192."""

    def loss(params, x):
        def step(h, w):
            return h + jax.nn.gelu(h @ w["up"]) @ w["down"], None

        return jnp.mean(jax.lax.scan(step, x, params)[0] ** 2)

    params = {"up": full(4, 1024, 4096), "down": full(4, 4096, 1024)}
    return loss, params, full(8192, 1024)


def main():
    """Prints the shares."""
    cases = {
        **large_cases(),
        "residual_convnet": residual_convnet(),
        "scanned_mlp": scanned_mlp(),
    }
    shares = {}
    for name, (loss, *args) in cases.items():
        grad = jax.value_and_grad(loss)
        for policy in ("float32", "mixed_bfloat16"):
            saved = mpjax.autocast_report(grad, policy)(*args).saved_bytes()
            step = jax.jit(mpjax.autocast(grad, policy))
            cost = analyze(step, *args, device="h100")
            shares[f"{name} {policy}"] = saved / cost.temporary_bytes
    print(json.dumps(shares))


if __name__ == "__main__":
    main()
