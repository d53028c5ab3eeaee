"""Loss scales by the text of a flag, and the experiment that compares them."""

import json

import jax
import pytest

import mpjax
from experiments import mnist_mlp, tables
from experiments.benchmarks import loss_scales
from experiments.harness.errors import ConfigError
from experiments.harness.loss_scales import parse_loss_scale
from mpjax.numerics._histogram_loss_scale import HistogramLossScale


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("histogram", HistogramLossScale()),
        ("histogram:65536", HistogramLossScale(2.0**16)),
        (
            "histogram: 2**10, interval=50, headroom=2, dtype=bfloat16",
            HistogramLossScale(2.0**10, interval=50, headroom=2, dtype="bfloat16"),
        ),
        ("histogram:max_loss_scale=2**20", HistogramLossScale(max_loss_scale=2**20)),
        ("dynamic:8", mpjax.DynamicLossScale(8)),
        ("none", mpjax.NoOpLossScale()),
    ],
)
def test_parse(text, expected):
    scale = parse_loss_scale(text)
    assert jax.tree.structure(scale) == jax.tree.structure(expected)
    assert jax.tree.leaves(scale) == jax.tree.leaves(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("histogrm", "histogram:x", "histogram:1000", "histogram:-1"),
        *("histogram:8,intervall=3", "histogram:interval=0", "histogram:dtype=float12"),
        *("histogram:1,2", "dynamic:-1"),
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"'histogram', 'histogram:65536'"):
        parse_loss_scale(text)


def test_every_experiment_takes_the_flag():
    config = mnist_mlp.Config(loss_scale="histogram:65536")
    scale = config.make_loss_scale("mixed_float16")
    assert isinstance(scale, HistogramLossScale)
    with pytest.raises(ConfigError, match=r"--loss-scale: .*'histogram'"):
        mnist_mlp.Config(loss_scale="histo")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"networks": "mlp,cnn"}, "--networks must be some of mlp, gru, got 'cnn'"),
        ({"loss_scales": "dynamic,histogram:3"}, "--loss-scales: .*power of two"),
        ({"num_steps": 0}, "--num-steps"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        loss_scales.Config(**settings)


@pytest.mark.weekly
def test_it_compares_and_leaves_a_table_and_a_plot(tmp_path):
    config = loss_scales.Config(
        networks="mlp",
        loss_scales="none,histogram,dynamic:2**24,histogram:2**24",
        num_steps=12,
        num_seeds=2,
        sample_every=5,
        num_rounds=2,
        dataset="digits",
        output=tmp_path / "results" / "table.json",
    )
    result = loss_scales.main(config)
    assert json.loads(config.output.read_text())["runs"] == json.loads(
        json.dumps(result["runs"])
    )
    none, histogram, dynamic, high = result["runs"]
    assert none["final_loss_scale"] == "2^0"
    assert none["num_skipped"] == histogram["num_skipped"] == 0
    assert none["zero_fraction"] > histogram["zero_fraction"]
    assert 0 < high["num_skipped"] <= dynamic["num_skipped"]
    assert high["paths"][0][:2] == [(0, 2.0**24), (1, 2.0**23)]
    assert "time_ratio" in histogram
    assert "time_ratio" not in high
    assert "| mlp | histogram |" in tables.render_result(result)
    assert config.output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
