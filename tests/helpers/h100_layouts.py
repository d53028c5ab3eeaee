"""Compiles the transformer for 64 H100s, which the machine need not have; prints JSON.

    python tests/helpers/h100_layouts.py              # needs pip install "jax[cuda13]"

tests/sharding/test_h100_layouts.py runs it in a process of its own: the settings must
precede JAX.
"""

import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers.layouts import transformer_layout

import mpjax
from experiments.benchmarks.workloads import transformer
from mpjax.cost import get_device
from mpjax.cost._compile import target_config

SIZES = {"data": 2, "fsdp": 8, "tensor": 4}
BATCH_SIZE, LENGTH, WIDTH = 128, 1024, 1024
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\(.*?replica_groups=(.*)"
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text):
    """Returns kind, axes of the mesh, and results (dtype, elements) of each one."""
    axes_of = {
        tuple(_first_group(SIZES, axes)): axes
        for num in range(len(SIZES) + 1)
        for axes in itertools.combinations(SIZES, num)
    }
    found = []
    for results, kind, groups in _COLLECTIVE.findall(text):
        # What starts asynchronously has its operands beside its results.
        results = results.partition("), ")[2] or results
        arrays = [
            (dtype, math.prod(map(int, filter(None, shape.split(",")))))
            for dtype, shape in _ARRAY.findall(results)
        ]
        found.append([kind, axes_of[tuple(_parse_groups(groups))], arrays])
    return found


def _first_group(sizes, axes):
    """Returns the devices that the first one shares a collective over axes with."""
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return ids[tuple(slice(None) if name in axes else 0 for name in sizes)].flatten()


def _parse_groups(text):
    """Returns the first group of devices, in any form that XLA writes it."""
    numbers = lambda text: [int(n) for n in re.findall(r"\d+", text)]
    if match := re.match(r"mesh\[(.*?)\] \{(.*?)\}", text):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return _first_group(sizes, re.findall(r"'(\w+)'", match[2]))
    if match := re.match(r"\[(.*?)\]<=\[(.*?)\](T\([\d,]+\))?", text):
        sizes = numbers(match[2])
        order = numbers(match[3]) if match[3] else range(len(sizes))
        ids = np.arange(math.prod(sizes)).reshape(sizes).transpose(order).flatten()
        return sorted(ids[: numbers(match[1])[-1]])
    return sorted(numbers(text.partition("}")[0]))


def main():
    """Prints bytes and collectives of a step without the layout and with it."""
    topology = topologies.get_topology_desc(
        "mpjax",
        "cuda",
        target_config=target_config(get_device("h100")),
        topology="1x1x64",
    )
    devices = np.array(topology.devices).reshape(tuple(SIZES.values()))
    mesh = jax.sharding.Mesh(devices, tuple(SIZES))
    work = transformer(width=WIDTH, length=LENGTH, num_layers=2)
    tx = mpjax.with_loss_scale(work.tx)

    def arguments(key):
        state = mpjax.TrainState.create(params=work.init_params(key), tx=tx)
        return state, work.make_batch(key, BATCH_SIZE)

    shapes = jax.eval_shape(arguments, jax.random.key(0))
    rows = {}
    for name, layout in (("built-in", None), ("tensor", transformer_layout())):
        step = mpjax.make_train_step(
            work.loss_fn, tx, policy="mixed_bfloat16", mesh=mesh, layout=layout
        )
        compiled = step.lower(*shapes).compile(
            compiler_options={"xla_gpu_autotune_level": 0}
        )
        memory = compiled.memory_analysis()
        rows[name] = {
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "collectives": collectives(compiled.as_text()),
        }
    param_bytes = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes[0].params)
    )
    print(json.dumps({"rows": rows, "param_bytes": param_bytes}))


if __name__ == "__main__":
    main()
