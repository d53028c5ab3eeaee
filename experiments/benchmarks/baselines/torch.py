"""PyTorch: the network of the Keras guide under `torch.autocast`."""

import functools
import importlib
from typing import Any

import numpy as np

from experiments.benchmarks.baselines.baseline import Baseline, Case, Step
from experiments.benchmarks.workloads import LEARNING_RATE


def sequential(case: Case, *, half: str | None) -> Step:
    """Builds linear layers with relu and RMSprop; float16 has a gradient scaler."""
    t: Any = importlib.import_module("torch")
    device = "cuda" if t.cuda.is_available() else "cpu"
    # JAX's default: TF32 where a GPU has it.
    t.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    layers: list[Any] = []
    for name in sorted(case.params):
        kernel, bias = (
            np.array(case.params[name][part]) for part in ("kernel", "bias")
        )
        linear = t.nn.Linear(*kernel.shape)
        linear.weight.data = t.from_numpy(kernel.T.copy())
        linear.bias.data = t.from_numpy(bias)
        layers += [linear, t.nn.ReLU()]
    model = t.nn.Sequential(*layers[:-1]).to(device)
    # PyTorch adds epsilon to the root, Keras inside it.
    eps = 1e-7**0.5
    optimizer = t.optim.RMSprop(
        model.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=eps
    )
    images = t.from_numpy(np.array(case.batch["image"])).to(device)
    labels = t.from_numpy(np.array(case.batch["label"]).astype(np.int64)).to(device)
    scaler = t.amp.GradScaler(device, enabled=half == "float16" and device == "cuda")
    dtype = getattr(t, half or "bfloat16")

    def run(num_steps: int = 1) -> float:
        loss = t.zeros(())
        for _ in range(num_steps):
            with t.autocast(device, dtype=dtype, enabled=half is not None):
                logits = model(images)
            loss = t.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        if device == "cuda":
            t.cuda.synchronize()
        return float(loss.detach())

    return Step(run)


def baselines() -> list[Baseline]:
    """Returns float32 and bfloat16, for the MLP."""
    needs = ("torch", "pip install torch")
    return [
        Baseline(
            f"PyTorch, {half or 'float32'}",
            functools.partial(sequential, half=half),
            "PyTorch, float32",
            workloads=("mlp",),
            needs=needs,
        )
        for half in (None, "bfloat16")
    ]
