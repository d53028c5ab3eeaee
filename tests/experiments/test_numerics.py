"""`--numerics`: what is counted, drawn, and left as it was."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cli_runs

from experiments import mnist_mlp, tables
from experiments.harness import numerics, numerics_summary
from experiments.harness.errors import ConfigError
from experiments.harness.recorder import read_rows
from mpjax.numerics import OpHistograms, exponent_histogram, representable_fraction

DENSE = [f"MLP/Dense_{i}/dot_general" for i in range(3)]


def train(workdir, policies="mixed_float16", **changes):
    config = mnist_mlp.Config(
        policies=policies,
        num_units=8,
        num_epochs=3,
        batch_size=24,
        workdir=workdir,
        **changes,
    )
    return mnist_mlp.main(config, cli_runs.images())


@pytest.mark.weekly
def test_it_counts_draws_and_changes_nothing(tmp_path):
    plain = train(tmp_path / "plain")
    flags = {"numerics": True, "numerics_interval": 4}
    counted = train(tmp_path / "counted", "float32,mixed_float16", **flags)
    (run,) = plain.runs
    for name in run.keys() - {*cli_runs.TIMES}:
        assert run[name] == counted.run("mixed_float16")[name], name
    for policy in ("float32", "mixed_float16"):
        directory = tmp_path / "counted" / policy
        assert (directory / "numerics.png").read_bytes().startswith(b"\x89PNG")
        table = json.loads((directory / "numerics.json").read_text())
        assert table["experiment"] == mnist_mlp.NUMERICS_NAME
        assert set(DENSE) <= {row["operation"] for row in table["runs"]}
        assert "| MLP/Dense_0/dot_general | cotangents |" in tables.render_result(table)
        rows = read_rows(directory / "metrics.jsonl")
        found = [row for row in rows if row["kind"] == "numerics"]
        assert [row["step"] for row in found] == [1, 5, 9]
        operations = found[0]["operations"]
        assert set(DENSE) <= operations.keys()
        for name, width in zip(DENSE, (8, 8, 10), strict=True):
            for slot in ("values", "cotangents"):
                counts = operations[name][slot]
                total = sum(counts["counts"]) + sum(
                    counts[n] for n in counts.keys() - {"counts"}
                )
                assert total == 24 * width
        cotangents = operations[DENSE[2]]["cotangents"]
        mean = np.average(numerics_summary.EXPONENTS, weights=cotangents["counts"])
        assert (mean > 0) == (policy == "mixed_float16")  # Times the loss scale.
    assert not (tmp_path / "plain" / "mixed_float16" / "numerics.png").exists()


def test_an_interval_is_positive():
    with pytest.raises(ConfigError, match="--numerics-interval"):
        mnist_mlp.Config(numerics_interval=0)


@pytest.mark.parametrize("scale", [1.0, 2.0**7])
def test_the_share_that_float16_loses_is_that_of_the_unscaled_numbers(scale):
    x = 2.0 ** -jnp.arange(1.0, 41.0)
    histogram = exponent_histogram(scale * x, lo=numerics.LO, hi=numerics.HI)
    row = numerics.to_row({"dot": OpHistograms(None, histogram)})
    rows = [{"step": 3, "operations": row}]
    (found,) = numerics_summary.shares_lost(rows, "dot", {3: scale})
    expected = representable_fraction(exponent_histogram(x), "float16").zero
    assert found == (3, pytest.approx(float(expected)))


def test_a_summary_is_of_the_unscaled_numbers_and_of_all_counts():
    x, zeros = 2.0 ** -jnp.arange(1.0, 31.0), jnp.zeros(10)
    rows, scales = [], {1: 2.0**7, 6: 2.0**9}
    for step, scale in scales.items():
        numbers = jnp.concatenate([scale * x, zeros])
        histogram = exponent_histogram(numbers, lo=numerics.LO, hi=numerics.HI)
        operations = numerics.to_row({"dot": OpHistograms(histogram, histogram)})
        rows.append({"kind": "numerics", "step": step, "operations": operations})
        rows.append({"kind": "train", "step": step, "loss_scale": scale})
    values, cotangents = numerics_summary.summarize(rows)
    assert (values["kind"], cotangents["kind"]) == ("values", "cotangents")
    assert values["zero"] == cotangents["zero"] == 0.25
    expected = {str(-e): pytest.approx(1 / 40) for e in range(1, 31)}
    assert cotangents["exponents"] == expected
    assert max(map(int, values["exponents"])) == 8  # Values are not scaled.
    share = pytest.approx(6 / 30)  # 2**-25 to 2**-30 are below float16's 2**-24.
    assert cotangents["lost"] == [(1, share), (6, share)]
    assert cotangents["first_lost"] == cotangents["last_lost"] == share
    assert (cotangents["scale"], json.loads(json.dumps(cotangents))["scale"]) == (8, 8)


def test_nothing_counted_is_no_row():
    histogram = exponent_histogram(jnp.zeros(0))
    assert numerics.to_row({"dot": OpHistograms(histogram, None)}) is None
    assert numerics.to_row({}) is None
