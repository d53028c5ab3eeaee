"""mpjax on a GPU with changes that might make it faster there: do they?

mpjax makes none of these changes by itself; each baseline says what one is worth. Two
more are settled by compiling for an H100 (jax 0.12, tests/cost/test_train_step.py):
layouts of XLA's own choice (`Layout.AUTO`) move as many bytes, and float16 sums
(`F16_F16_F16`) are refused. The autotuner's search is an
option of a whole run, because XLA keeps its choices for the life of a process:
`XLA_FLAGS=--xla_gpu_exhaustive_tiling_search=true`, or
`XLA_FLAGS=--xla_gpu_cudnn_gemm_fusion_level=2`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import optax

import mpjax
from experiments.benchmarks.baselines import mpjax as mpjax_baselines
from experiments.benchmarks.baselines.baseline import Baseline, Case, Step, jax_step

REFERENCE = "mpjax, bfloat16, dynamic"
# Options of XLA by what they change.
OPTIONS: dict[str, dict[str, Any]] = {
    "no Triton matmuls": {"xla_gpu_enable_triton_gemm": False},
    "no CUDA graphs": {"xla_gpu_enable_command_buffer": ""},
}


def with_options(case: Case, *, options: dict[str, Any]) -> Step:
    """Builds the step with options of XLA."""
    return jax_step(*_step_and_args(case), compiler_options=options)


def with_one_vector(case: Case) -> Step:
    """Builds a step whose optimizer sees one vector of all parameters."""
    workload = dataclasses.replace(case.workload, tx=optax.flatten(case.workload.tx))
    return jax_step(*_step_and_args(dataclasses.replace(case, workload=workload)))


def _step_and_args(case: Case) -> tuple[Any, ...]:
    scale = mpjax.DynamicLossScale()
    return mpjax_baselines.step_and_args(
        case, policy="mixed_bfloat16", loss_scale=scale
    )


def baselines() -> list[Baseline]:
    """Returns one per change, for a GPU and workloads of large matmuls."""
    builds: dict[str, Callable[[Case], Step]] = {
        name: functools.partial(with_options, options=options)
        for name, options in OPTIONS.items()
    }
    builds["one-vector optimizer"] = with_one_vector
    workloads = ("mlp", "transformer_block")
    return [
        Baseline(
            f"{REFERENCE}, {name}",
            build,
            REFERENCE,
            workloads=workloads,
            platform="gpu",
        )
        for name, build in builds.items()
    ]
