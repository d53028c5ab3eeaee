"""Gradient errors in float8, beside flax's."""

import functools
import json

import pytest

from experiments import tables
from experiments.benchmarks import _accuracy_float8, accuracy
from experiments.models import small

TINY = functools.partial(small.mlp, batch_size=16, sizes=(8, 16, 10))


@pytest.mark.weekly
def test_delayed_scales_flush_small_cotangents_until_they_settle():
    # A cotangent is about a batch's size smaller than 1, and its scale is 1 at first.
    make_case = functools.partial(TINY, batch_size=2**15)
    case = make_case(0)
    truth = small.oracle(case)
    first, settled = (
        small.relative_error(
            _accuracy_float8.flax_gradient(make_case, case, num_updates), truth
        )
        for num_updates in (0, 2)
    )
    assert 0.005 < settled < 0.5 * first


@pytest.mark.weekly
def test_float8_leaves_a_table(tmp_path, monkeypatch):
    wide = functools.partial(small.mlp, batch_size=2048, sizes=(1536, 2048, 10))
    cases = {"mlp": TINY, "wide": wide}
    monkeypatch.setattr(_accuracy_float8, "CASES", cases)
    monkeypatch.setattr(_accuracy_float8, "MLPS", {"mlp": TINY})
    monkeypatch.setattr(_accuracy_float8, "REAL_MODELS", ())
    path = tmp_path / "table.json"
    accuracy.main(accuracy.Config(workloads="float8", num_seeds=2, output=path))
    table = json.loads(path.read_text())
    found = {(r["model"], r["precision"]): r for r in table["runs"]}
    assert list(found) == [
        ("mlp", "mixed_bfloat16"),
        ("mlp", "mixed_float8:all"),
        ("mlp", "flax Fp8DotGeneralOp, first step"),
        ("mlp", "flax Fp8DotGeneralOp, after 5 steps"),
        ("wide", "mixed_bfloat16"),
        ("wide", "mixed_float8"),
        ("wide", "mixed_float8:all"),
    ]
    errors = [row["error"] for row in found.values()]
    assert errors[4] < errors[5] <= errors[6] < 0.2
    assert "| mlp | mixed_float8:all |" in tables.render_result(table)
