"""Rows and columns over `tensor`, compiled for 64 H100s; no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "h100_layouts.py"
FSDP, TENSOR = 8, 4
# The activations (B, T, D) of a device: 128 examples over data=2 and fsdp=8.
ACTIVATIONS = 128 // 16 * 1024 * 1024

pytestmark = pytest.mark.h100


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_device_keeps_its_part_of_the_state(compiled):
    """Parameters and two moments over `fsdp` alone, and over both axes."""
    batch_bytes = 2 * 4 * ACTIVATIONS
    for name, num_devices in (("built-in", FSDP), ("tensor", FSDP * TENSOR)):
        state_bytes = compiled["rows"][name]["argument_bytes"] - batch_bytes
        share = 3 * compiled["param_bytes"] / num_devices
        assert share <= state_bytes <= 1.02 * share
    of = lambda name: compiled["rows"][name]["temporary_bytes"]
    assert of("tensor") <= 0.4 * of("built-in")


def test_activations_are_added_up_over_tensor_and_weights_gathered_over_fsdp(compiled):
    """A layer has two all-reduces forward and two backward, as Megatron-LM has."""
    found = compiled["rows"]["tensor"]["collectives"]
    reduced = [
        (axes, dtype)
        for kind, axes, arrays in found
        for dtype, size in arrays
        if size == ACTIVATIONS
    ]
    assert reduced == [(["tensor"], "bf16")] * 4
    assert {kind for kind, _, _ in found} <= {
        "all-gather",
        "all-reduce",
        "reduce-scatter",
    }
    gathered = [(axes, arrays) for kind, axes, arrays in found if kind == "all-gather"]
    assert all(axes == ["fsdp"] for axes, _ in gathered)
    largest = max(size for _, arrays in gathered for _, size in arrays)
    assert largest == 4 * 1024 * 1024 // TENSOR


def test_without_the_layout_nothing_is_reduced_over_tensor_alone(compiled):
    found = compiled["rows"]["built-in"]["collectives"]
    assert not any(axes == ["tensor"] for _, axes, _ in found)
    assert all(size != ACTIVATIONS for _, _, arrays in found for _, size in arrays)
