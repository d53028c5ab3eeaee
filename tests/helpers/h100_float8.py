"""Compiles steps in float8 and in bfloat16 for a GPU; prints JSON.

    python tests/helpers/h100_float8.py h100       # needs pip install "jax[cuda13]"

tests/autocast/test_h100_float8.py runs it in a process of its own: the settings must
precede JAX.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.float8_tools import operand_formats
from helpers.h100 import operand_dtypes

from experiments.benchmarks import workloads
from experiments.benchmarks._memory_float8 import make_steps
from experiments.benchmarks.real_models import REAL_MODELS
from mpjax.cost import analyze, get_device
from mpjax.cost._compile import compile_for

NAMES = ("gpt2", "gpt2_scan_remat", "llama")


def cases():
    """Yields the models, of full width and with two layers, by name."""
    yield "mlp", workloads.mlp()
    yield "transformer_block", workloads.transformer_block()
    for name in NAMES:
        yield name, REAL_MODELS[name]("full", num_layers=2)


def main(device, *names):
    """Prints, per model and policy, the cost of a train step and its matmuls' dtypes.

    Args:
      device: as `mpjax.cost.get_device` takes it.
      *names: of models; all if there are none.
    """
    rows = {}
    for name, workload in cases():
        if names and name not in names:
            continue
        steps, *args = make_steps(name, workload)
        for dtype, step in zip(("bfloat16", "float8"), steps.values(), strict=True):
            text = compile_for(get_device(device), step, *args).as_text()
            report = analyze(step, *args, device=device)
            rows[f"{name} mixed_{dtype}"] = {
                "temporaries": report.temporary_bytes,
                "moved": report.moved_bytes,
                "compute_s": report.compute_s,
                "memory_s": report.memory_s,
                "compiled": operand_dtypes(text),
                "traced": [x[:2] for x in operand_formats(step, *args)],
            }
    print(json.dumps({"jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main(*sys.argv[1:])
