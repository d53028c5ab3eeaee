"""Compiles roundings of weights for an H100, which the machine need not have.

    python tests/helpers/h100_rounding.py             # needs pip install "jax[cuda13]"

Prints as JSON the text of each compiled function, by name.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).parents[2]))
import mpjax
from experiments.harness.float16_updates import with_float16_updates
from mpjax.cost import get_device
from mpjax.cost._compile import compile_for

FULL = jax.ShapeDtypeStruct((256,), jnp.float32)
HALF = jax.ShapeDtypeStruct((256,), jnp.float16)


def float16_update(update, param):
    """A float16 weight updated in float16, as the train step does it."""
    tx = with_float16_updates(optax.identity())
    update, _ = tx.update(update, tx.init(param), param)
    return (param + update).astype(param.dtype)


def cast_update(update, param):
    """The same by casts, which XLA leaves out: shows that the others are needed."""
    update = update.astype(jnp.float16).astype(jnp.float32)
    return (param + update).astype(param.dtype)


def stochastic(x, y):
    """Stochastic rounding of x."""
    del y
    return mpjax.stochastic_round(x, jnp.float16, jax.random.key(0))


if __name__ == "__main__":
    functions = (float16_update, cast_update, stochastic)
    device = get_device("h100")
    texts = {
        f.__name__: compile_for(device, f, FULL, HALF).as_text() for f in functions
    }
    print(json.dumps({"rows": texts}))
