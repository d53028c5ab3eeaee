"""Gradients added up over eight H100s in compiled code; no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.collectives import Collective

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = pytest.mark.h100

REDUCTIONS = ("all-reduce", "reduce-scatter")


@pytest.fixture(scope="module")
def rows():
    done = subprocess.run(
        [sys.executable, HELPERS / "h100_collectives.py"],
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def collectives_of(row, *ops):
    found = [Collective(*x) for x in row["collectives"]]
    return [x for x in found if x.op in ops]


@pytest.mark.parametrize(
    "name",
    [
        "data",
        "fsdp",
        "data x fsdp",
        "float16",
        "casts",
        "microbatches",
        "microbatches, data x fsdp",
        "conv",
        "conv, microbatches",
        "embedding, casts",
        "scan, remat",
        "rnn",
    ],
)
def test_every_reduction_is_float32(rows, name):
    reductions = collectives_of(rows[name], *REDUCTIONS)
    assert any(x.size > 64 for x in reductions)
    assert {x.dtype for x in reductions} == {"f32"}


def test_the_option_compute_reduces_in_half(rows):
    reductions = collectives_of(rows["compute"], *REDUCTIONS)
    assert "bf16" in {x.dtype for x in reductions}


@pytest.mark.parametrize("name", ["fsdp", "data x fsdp", "casts"])
def test_weights_are_gathered_in_half(rows, name):
    gathered = collectives_of(rows[name], "all-gather")
    assert {x.dtype for x in gathered if x.size > 64} == {"bf16"}


def test_gradients_are_scattered_over_fsdp_and_their_pieces_reduced_over_data(rows):
    for name in ("data x fsdp", "conv"):
        kernels = max(x.size for x in collectives_of(rows[name], "all-gather"))
        scattered = collectives_of(rows[name], "reduce-scatter")
        assert max(x.size for x in scattered) == kernels // 4


@pytest.mark.parametrize("name", ["microbatches", "conv, microbatches"])
def test_microbatches_are_reduced_over_data_once(rows, name):
    for x in collectives_of(rows[name], *REDUCTIONS):
        assert x.computation == "ENTRY" or x.size == 1  # the loss


def test_convolutions_stay_half(rows):
    """A float32 result would cast both images to float32."""
    dtypes = rows["conv"]["convolutions"]
    assert len(dtypes) >= 5
    assert set(dtypes) == {"bf16"}
