"""Memory and matmuls of autocast in code compiled for an H100; no GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers/h100.py"

pytestmark = pytest.mark.h100


@pytest.fixture(scope="module")
def rows():
    done = subprocess.run(
        [sys.executable, SCRIPT],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


MODELS = ("mlp", "transformer_block", "convnet")
POLICIES = {"mixed_bfloat16": "bf16", "mixed_float16": "f16"}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_temporaries_are_those_of_the_hand_cast_model(rows, name, policy):
    row = rows[f"{name} {policy}"]
    for form in ("autocast(grad)", "grad(autocast)"):
        assert row[form] <= 1.05 * row["hand_cast"]
        assert row[form] <= 0.8 * row["float32"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", MODELS)
def test_all_matmuls_are_half(rows, name, policy):
    matmuls = rows[f"{name} {policy}"]["matmuls"]
    assert len(matmuls) >= 8
    assert all(dtypes == [POLICIES[policy]] for dtypes in matmuls)
