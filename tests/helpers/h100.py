"""Compiles models for an H100, which the machine need not have; prints JSON.

    python tests/helpers/h100.py mixed_bfloat16       # needs pip install "jax[cuda13]"

tests/autocast/test_h100.py runs it in a process of its own: the settings must precede
JAX.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[2]))
import mpjax
from experiments.models import small as models
from mpjax.cost import get_device
from mpjax.cost._compile import compile_for

POLICIES = {"mixed_bfloat16": jnp.bfloat16, "mixed_float16": jnp.float16}
_DEFINITION = re.compile(r"^\s*(?:ROOT )?(%?[\w.-]+) = \(?(\w+)\[", re.MULTILINE)
_MATMUL = re.compile(
    r"= [^=\n]* (?:dot|convolution)\((.*?)\)"
    r"|= [^=\n]* custom-call\((.*?)\), [^\n]*custom_call_target=\"__cu(?:blas|dnn)"
)


def large_cases():
    """Returns the Keras guide's MLP at batch 8192, a transformer block, the convnet."""
    full = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = lambda n: jax.ShapeDtypeStruct((n,), jnp.int32)
    dense = lambda m, n: {"w": full(m, n), "b": full(n)}
    norm = lambda n: {"scale": full(n), "bias": full(n)}
    width = length = 1024
    return {
        "mlp": (
            models.mlp().loss,
            [dense(784, 4096), dense(4096, 4096), dense(4096, 10)],
            {"x": full(8192, 784), "label": labels(8192)},
        ),
        "transformer_block": (
            models.transformer_block().loss,
            {
                "qkv": full(width, 3, 16, width // 16),
                "out": full(16, width // 16, width),
                "norm_0": norm(width),
                "norm_1": norm(width),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            },
            {"x": full(8, length, width), "target": full(8, length, width)},
        ),
        "convnet": (
            models.convnet().loss,
            {
                "conv_0": full(3, 3, 3, 64),
                "conv_1": full(3, 3, 64, 128),
                "norm_0": norm(64),
                "norm_1": norm(128),
                "dense": dense(8192, 10),
            },
            {"x": full(512, 32, 32, 3), "label": labels(512)},
        ),
    }


def operand_dtypes(text):
    """Returns the operand dtypes of all matmuls and convolutions in compiled HLO."""
    found = []
    for computation in text.split("\n\n"):
        dtype_of = dict(_DEFINITION.findall(computation))
        for match in _MATMUL.finditer(computation):
            operands = [x.strip() for x in (match[1] or match[2]).split(",")][:2]
            found.append(sorted({dtype_of[name] for name in operands}))
    return found


def main(policy):
    """Prints, per model, temporaries in bytes and the matmuls' dtypes."""
    compile_for_h100 = functools.partial(compile_for, get_device("h100"))
    result = {}
    for name, (loss, params, inputs) in large_cases().items():
        full = compile_for_h100(jax.value_and_grad(loss), params, inputs)
        forms = {
            "hand_cast": jax.value_and_grad(models.hand_cast(loss, POLICIES[policy])),
            "autocast(grad)": mpjax.autocast(jax.value_and_grad(loss), policy),
            "grad(autocast)": jax.value_and_grad(mpjax.autocast(loss, policy)),
        }
        compiled = {
            form: compile_for_h100(fn, params, inputs) for form, fn in forms.items()
        }
        row = {form: _temporaries(x) for form, x in compiled.items()}
        row["float32"] = _temporaries(full)
        row["matmuls"] = operand_dtypes(compiled["autocast(grad)"].as_text())
        result[name] = row
    print(json.dumps({"jax": jax.__version__, "rows": result}))


def _temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    main(sys.argv[1])
