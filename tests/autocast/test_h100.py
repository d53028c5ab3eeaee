"""Memory and matmuls of autocast in code compiled for an H100; no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HELPERS = Path(__file__).parents[1] / "helpers"

pytestmark = pytest.mark.h100


def run(script, *args):
    """Returns the rows that a script of tests/helpers prints."""
    done = subprocess.run(
        [sys.executable, HELPERS / script, *args],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@pytest.fixture(scope="module")
def attention_rows():
    return run("h100_attention.py")


@pytest.fixture(
    scope="module",
    params=["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.weekly)],
)
def policy_and_rows(request):
    return request.param, run("h100.py", request.param)


MODELS = ("mlp", "transformer_block", "convnet")
DTYPES = {"mixed_bfloat16": "bf16", "mixed_float16": "f16"}


@pytest.mark.parametrize("name", MODELS)
def test_temporaries_are_those_of_the_hand_cast_model(policy_and_rows, name):
    row = policy_and_rows[1][name]
    for form in ("autocast(grad)", "grad(autocast)"):
        assert row[form] <= 1.05 * row["hand_cast"]
        assert row[form] <= 0.8 * row["float32"]


@pytest.mark.parametrize("name", MODELS)
def test_all_matmuls_are_half(policy_and_rows, name):
    policy, rows = policy_and_rows
    matmuls = rows[name]["matmuls"]
    assert len(matmuls) >= 8
    assert all(dtypes == [DTYPES[policy]] for dtypes in matmuls)


@pytest.mark.parametrize("model", ["linen", "nnx", "equinox", "stacked"])
def test_cudnn_attention_through_half_precision(attention_rows, model):
    cudnn, unfused = (attention_rows[f"{model} {x}"] for x in ("cudnn", "unfused"))
    # A checkpoint in a scan runs the forward kernel again in its backward pass.
    assert cudnn["forward"] == (2 if model == "stacked" else 1)
    assert cudnn["backward"] == 1
    assert (unfused["forward"], unfused["backward"]) == (0, 0)
    assert cudnn["dtypes"] == unfused["dtypes"] == ["float32"]
    assert cudnn["temporaries"] < 0.3 * unfused["temporaries"]


def test_cudnn_attention_needs_no_more_memory_than_casts_by_hand(attention_rows):
    new, old = (attention_rows[f"equinox {x}"] for x in ("cudnn", "by hand"))
    assert new["temporaries"] <= 1.05 * old["temporaries"]
