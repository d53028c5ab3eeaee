"""Compiles sharded steps for eight H100s, which the machine need not have; prints JSON.

    python tests/helpers/h100_collectives.py          # needs pip install "jax[cuda13]"

tests/train/test_h100_reductions.py runs it in a process of its own: the settings must
precede JAX.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.collectives import MESHES, collectives, sharded_step

from mpjax.cost import get_device
from mpjax.cost._compile import target_config

STEPS = {
    "data": ("dense", "data", {}),
    "fsdp": ("dense", "fsdp", {}),
    "data x fsdp": ("dense", "data x fsdp", {}),
    "compute": ("dense", "data x fsdp", {"reduce_dtype": "compute"}),
    "float16": ("dense", "data x fsdp", {"policy": "mixed_float16"}),
    "casts": ("dense", "data x fsdp", {"autocast": False}),
    "microbatches": ("dense", "data", {"num_microbatches": 4}),
    "microbatches, data x fsdp": ("dense", "data x fsdp", {"num_microbatches": 4}),
    "conv": ("conv", "data x fsdp", {}),
    "conv, microbatches": ("conv", "data", {"num_microbatches": 4}),
    "embedding, casts": ("embedding", "data", {"autocast": False}),
    "scan, remat": ("scan, remat", "data", {}),
    "rnn": ("rnn", "data", {}),
}


def mesh_of_h100s(shape, names):
    """Returns a mesh of H100s in one machine."""
    num_devices = int(np.prod(shape))
    topology = topologies.get_topology_desc(
        f"{num_devices} H100s",
        "cuda",
        target_config=target_config(get_device("h100")),
        topology=f"1x1x{num_devices}",
    )
    return jax.sharding.Mesh(np.array(topology.devices).reshape(shape), names)


def compile_step(step, *args):
    """Compiles a step for the devices of its arguments, without timing kernels."""
    options = {"xla_gpu_autotune_level": 0}
    return step.lower(*args).compile(compiler_options=options)


def main():
    """Prints, per step, its collectives and the dtypes of its convolutions."""
    rows = {}
    for name, (model, mesh, kwargs) in STEPS.items():
        kwargs = {"policy": "mixed_bfloat16"} | kwargs
        step, state, batch = sharded_step(model, mesh_of_h100s(*MESHES[mesh]), **kwargs)
        text = compile_step(step, state, batch).as_text()
        lines = [x for x in text.splitlines() if '"__cudnn$conv' in x]
        rows[name] = {
            "collectives": collectives(text),
            "convolutions": [x.split("= (")[1].split("[")[0] for x in lines],
        }
    print(json.dumps({"jax": jax.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
