"""mpjax on a GPU with what else might be faster there: is it?

None of this is what mpjax does by itself; each row says what one change is worth. Two
more are settled by compiling for an H100 (jax 0.12, tests/cost/test_train_step.py):
layouts of XLA's own choice (`Layout.AUTO`) move as many bytes, and float16 sums
(`F16_F16_F16`) are refused. What the autotuner is to try is set for a run of its own,
as XLA keeps its choices for as long as a process lives, by
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
from experiments.benchmarks.baselines.baseline import Case, Row, Step, jax_step

BESIDE = "mpjax, bfloat16, dynamic"
# Of XLA, by the name of the row.
OPTIONS: dict[str, dict[str, Any]] = {
    "no Triton matmuls": {"xla_gpu_enable_triton_gemm": False},
    "no CUDA graphs": {"xla_gpu_enable_command_buffer": ""},
}


def with_options(case: Case, *, options: dict[str, Any]) -> Step:
    """The step compiled with options of XLA."""
    return jax_step(*_parts(case), compiler_options=options)


def with_one_vector(case: Case) -> Step:
    """The optimizer works on one vector of all parameters (`optax.flatten`)."""
    work = dataclasses.replace(case.work, tx=optax.flatten(case.work.tx))
    return jax_step(*_parts(dataclasses.replace(case, work=work)))


def _parts(case: Case) -> tuple[Any, ...]:
    scale = mpjax.DynamicLossScale()
    return mpjax_baselines.parts(case, policy="mixed_bfloat16", loss_scale=scale)


def rows() -> list[Row]:
    """One per change; only on a GPU, and for works of large matmuls."""
    builds: dict[str, Callable[[Case], Step]] = {
        name: functools.partial(with_options, options=options)
        for name, options in OPTIONS.items()
    }
    builds["one-vector optimizer"] = with_one_vector
    works = ("mlp", "transformer_block")
    return [
        Row(f"{BESIDE}, {name}", build, BESIDE, works=works, platform="gpu")
        for name, build in builds.items()
    ]
