"""Times of a GRU by several libraries, interleaved, and their table."""

import statistics

import pytest

from experiments.benchmarks import recurrence
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json


def test_it_leaves_a_table_of_times_and_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recurrence.importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "recurrence.json"
    config = recurrence.Config(
        num_units=(4,), length=5, batch_size=2, num_rounds=3, output=output
    )
    table = recurrence.main(config)
    assert read_json(output) == table
    assert table["left_out"] == {recurrence.TORCH: "pip install torch"}
    ours, flax = table["runs"]
    assert (ours["name"], flax["name"]) == (recurrence.OURS, recurrence.FLAX)
    assert ours["forward_ratio"] == ours["gradient_ratio"] == 1
    for what in ("forward", "gradient"):
        pairs = zip(flax[f"{what}_times_ms"], ours[f"{what}_times_ms"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        assert flax[f"{what}_ratio"] == pytest.approx(ratio, rel=0.05)
    assert "2 sequences of 5" in capsys.readouterr().out


def test_bad_flags_are_reported():
    with pytest.raises(ConfigError, match=r"--num-units must be 1 or more.*got \(0,\)"):
        recurrence.Config(num_units=(0,))
