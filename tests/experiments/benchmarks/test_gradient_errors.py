"""Gradient errors of real models, and the intervals of means over few seeds."""

import functools
import json
import math

import numpy as np
import pytest

from experiments import tables
from experiments.benchmarks import _accuracy_real, accuracy, real_models
from experiments.harness.errors import ConfigError
from experiments.harness.intervals import mean_interval, ratio_interval


def test_intervals():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    # 4.303 is Student's quantile for two degrees of freedom.
    np.testing.assert_allclose([mean, high - mean], [2, 4.303 / 3**0.5], rtol=1e-3)
    assert low == pytest.approx(4 - high)
    assert all(math.isnan(x) for x in mean_interval([1.0])[1:])
    mean, low, high = ratio_interval([2.0, 8.0, 4.0], [1.0, 2.0, 2.0])
    assert mean == pytest.approx(2 * 2 ** (1 / 3))
    assert low * high == pytest.approx(mean**2)


def test_workloads_are_small_real_or_names():
    assert accuracy.Config().real_names() == []
    names = accuracy.Config(workloads="real").real_names()
    assert set(real_models.REAL_MODELS) < set(names)
    assert accuracy.Config(workloads="llama").real_names() == ["llama"]
    with pytest.raises(ConfigError, match=r"--workloads must be some of .*'lama'"):
        accuracy.Config(workloads="lama")


@pytest.mark.weekly
def test_real_models_leave_a_table_that_keeps_other_rows(tmp_path, monkeypatch):
    fields = {"width": 16, "num_layers": 1}
    tiny = functools.partial(real_models.gpt2, "small", **fields, tanh_gelu=True)
    # As a deep one, it leaves out grad(autocast).
    monkeypatch.setitem(_accuracy_real.MODELS, "gpt2_24_layers", tiny)
    path = tmp_path / "table.json"
    other = {"model": "unet", "policy": "mixed_float16"}
    path.write_text(json.dumps({"runs": [other]}))
    config = accuracy.Config(workloads="gpt2_24_layers", num_seeds=2, output=path)
    accuracy.main(config)
    table = json.loads(path.read_text())
    assert table["runs"][0] == other
    rows = table["runs"][1:]
    assert [row["policy"] for row in rows] == list(accuracy.FORMATS)
    for row, least in zip(rows, (1e-3, 1e-4), strict=True):
        # In half, not in float32; and the truth is more precise than float32.
        assert row["error_by_hand"] > least
        assert row["error_autocast"] > least
        assert row["error_float32"] < 1e-5
        assert row["num_overflows_by_hand"] == row["num_overflows_autocast"] == 0
        mean, low, high = row["ratio_autocast"]
        assert low < mean < high
    assert "| gpt2_24_layers | mixed_float16 |" in tables.render_result(table)


def test_an_overflow_is_counted_and_left_out_of_the_means():
    errors = {"by_hand": [0.1, math.inf, 0.1], "autocast": [0.1, 0.2, 0.1]}
    row = _accuracy_real.aggregate(errors)
    assert row["num_overflows_by_hand"] == 1
    assert row["num_overflows_autocast"] == 0
    assert row["error_autocast"] == pytest.approx(0.1)
    assert row["ratio_autocast"][0] == pytest.approx(1)
    assert row["errors"]["by_hand"] == [0.1, None, 0.1]
