"""Costs of language models on clusters: compiled, written as a table and a plot."""

import pytest
from helpers import figures

from experiments.benchmarks import scaling
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json
from experiments.harness.output import RESULTS
from mpjax import cost

TINY = {"width": 256, "num_layers": 3, "num_heads": 4, "vocabulary_size": 1024}
SENT = ("all-gather_gb", "reduce-scatter_gb", "all-reduce_gb", "other_gb")


def rows(best_ms, worst_ms):
    """Returns rows of one model on 1, 8 and 64 GPUs."""
    times = zip((1, 8, 64), best_ms, worst_ms, strict=True)
    return [
        {
            "model": "gpt_1.3b",
            "policy": policy,
            "reduce_dtype": "float32",
            "num_gpus": num_gpus,
            "peak_gb": 40 / num_gpus,
            "best_ms": best,
            "worst_ms": worst,
            "best_efficiency": best_ms[0] / best,
            "worst_efficiency": best_ms[0] / worst,
        }
        for policy in scaling.POLICIES
        for num_gpus, best, worst in times
    ]


def test_the_plot_has_every_policy():
    table = {"compiled_for": "H100", "memory_gb": 85.0}
    runs = rows((100.0, 100.0, 110.0), (100.0, 120.0, 160.0))
    figure = scaling.draw(table | {"runs": runs})
    figures.check(figure)
    peak, time, efficiency = figures.panels(figure)
    num_curves = 2 * len(scaling.POLICIES)
    assert len(time.get_lines()) == len(efficiency.get_lines()) == num_curves
    assert figures.tick_labels(efficiency.xaxis) == ["1", "8", "64"]
    assert len(peak.get_lines()) == len(scaling.POLICIES) + 1


def test_bad_flags_are_reported():
    with pytest.raises(ConfigError, match=r"from 1 to 7.*got \(8, 12\)"):
        scaling.Config(num_gpus=(8, 12))
    with pytest.raises(ConfigError, match=r"one of a100.*got 'present'"):
        scaling.Config(device="present")
    with pytest.raises(ConfigError, match=r"some of gpt_1\.3b.*got 'gpt_70b'"):
        scaling.Config(models="gpt_70b")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("scaling_*.json")))
def test_what_a_committed_row_says_follows_from_its_parts(path):
    table = read_json(path)
    for run in table["runs"]:
        sent_gb = sum(c["sent_bytes"] for c in run["collectives"]) / 1e9
        seconds = sum(c["seconds"] for c in run["collectives"])
        roofline_ms = max(run["compute_ms"], run["memory_ms"])
        assert run["fits"] == (run["peak_gb"] <= table["memory_gb"])
        assert sum(run[key] for key in SENT) == pytest.approx(sent_gb)
        assert run["communication_ms"] == pytest.approx(1e3 * seconds)
        assert run["best_ms"] == pytest.approx(max(roofline_ms, 1e3 * seconds))
        assert run["worst_ms"] == pytest.approx(roofline_ms + 1e3 * seconds)


@pytest.mark.h100
def test_a_small_model_on_one_and_sixteen_gpus(tmp_path, monkeypatch, capsys):
    """Weights are gathered twice, forward and backward, and gradients reduced once.

    Reduced in half they are half as many bytes.
    """
    monkeypatch.setitem(scaling.MODELS, "gpt_1.3b", TINY)
    output = tmp_path / "scaling.json"
    config = scaling.Config(
        models="gpt_1.3b", num_gpus=(1, 16), batch_size_per_gpu=1, output=output
    )
    table = scaling.main(config)
    assert read_json(output) == table
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "compiled for" in capsys.readouterr().out
    in_half = [run for run in table["runs"] if run["reduce_dtype"] == "compute"]
    in_full = [run for run in table["runs"] if run["reduce_dtype"] == "float32"]
    assert [run["policy"] for run in in_half] == list(scaling.POLICIES[1:])
    assert len(in_full) == 2 * len(scaling.POLICIES)
    for half, full in zip(in_half, in_full[3::2], strict=True):
        assert half["policy"] == full["policy"]
        assert half["reduce-scatter_gb"] < 0.6 * full["reduce-scatter_gb"]
    num_weights = 3 * 12 * 256**2
    for one, many in zip(in_full[::2], in_full[1::2], strict=True):
        assert one["communication_ms"] == one["all-gather_gb"] == 0
        assert one["best_efficiency"] == one["worst_efficiency"] == 1
        assert one["fits"]
        assert many["mesh"] == {"data": 2, "fsdp": 8}
        assert many["batch_size"] == 16
        size = 4 if many["policy"] == "float32" else 2
        gathered = 7 / 8 * size * num_weights / 1e9
        assert many["all-gather_gb"] >= 2 * gathered
        assert many["all-gather_gb"] <= 3 * gathered + 0.05
        assert many["worst_efficiency"] < many["best_efficiency"]
        axes = {tuple(c["axes"]) for c in many["collectives"]}
        assert axes <= {("fsdp",), ("data",), ("data", "fsdp")}
    assert table["memory_gb"] == cost.get_device("h100").memory_bytes / 1e9
