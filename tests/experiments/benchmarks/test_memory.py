"""Memory per policy: measured for this machine, written as a table and a plot."""

import pytest

from experiments.benchmarks import memory
from experiments.benchmarks.workloads import WORKLOADS, mlp
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json


@pytest.mark.slow
def test_ratios_are_to_float32_of_the_same_batch():
    runs = memory.measure("mlp", mlp(64), 256, device=None)
    assert [run["name"] for run in runs] == list(memory.STEPS)
    full = runs[0]
    assert full["temporaries_ratio"] == full["peak_ratio"] == 1.0
    for run in runs:
        assert run["peak_ratio"] == run["peak_mb"] / full["peak_mb"]
        # Parameters (2 x 64 units) and their moments stay float32: 0.44 MB.
        assert run["peak_mb"] > run["temporaries_mb"] + 0.43


@pytest.mark.slow
def test_it_leaves_a_table_and_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WORKLOADS, "mlp", lambda: mlp(32))
    monkeypatch.setitem(memory.BATCH_SIZES, "mlp", (8, 16))
    output = tmp_path / "memory.json"
    config = memory.Config(device="present", workloads="mlp", output=output)
    table = memory.main(config)
    assert read_json(output) == table
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(table["runs"]) == 2 * len(memory.STEPS)
    assert "compiled for cpu" in capsys.readouterr().out


def test_bad_flags_are_reported():
    with pytest.raises(ConfigError, match=r"one of present, a100.*got 'h1000'"):
        memory.Config(device="h1000")
    with pytest.raises(ConfigError, match=r"some of mlp.*got 'resnet'"):
        memory.Config(workloads="mlp,resnet")
