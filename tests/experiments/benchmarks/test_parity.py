"""The parity table."""

import dataclasses
import json
import statistics

import pytest

from experiments import mnist_mlp
from experiments.benchmarks import parity
from experiments.harness import stop
from experiments.harness.output import mean_and_deviation


@pytest.fixture
def config(tmp_path):
    return parity.Config(
        policies="float32,p=f32,c=f16,o=f32",
        loss_scales="none",
        num_seeds=2,
        num_units=4,
        num_epochs=1,
        dataset="digits",
        workdir=tmp_path / "runs",
        output=tmp_path / "results" / "table.json",
    )


@pytest.mark.weekly
def test_stopped_and_started_again_it_fills_the_table(config, monkeypatch, capsys):
    train_policy = mnist_mlp.train_policy
    trained = []

    def stop_at_the_second(experiment, task, run, policy, directory):
        if len(trained) == 1:
            raise stop.Interrupted(15, "nothing was saved")
        trained.append(policy)
        return train_policy(experiment, task, run, policy, directory)

    monkeypatch.setattr(mnist_mlp, "train_policy", stop_at_the_second)
    with pytest.raises(stop.Interrupted, match="the runs that are finished are kept"):
        parity.main(config)
    assert not config.output.exists()

    def count(experiment, task, run, policy, directory):
        trained.append(policy)
        return train_policy(experiment, task, run, policy, directory)

    monkeypatch.setattr(mnist_mlp, "train_policy", count)
    table = parity.main(config)
    assert trained == ["float32", "p=f32,c=f16,o=f32"] * 2
    assert table == json.loads(config.output.read_text())
    parity.main(config)
    assert len(trained) == 4
    assert [row["policy"] for row in table["runs"]] == trained[:2]
    for row in table["runs"]:
        values = row["test_accuracies"]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        assert row["test_accuracy"] == f"{mean:.4f} ± {deviation:.4f}"
        assert row["num_seeds"] == len(values) == 2
        assert values[0] != values[1]
    assert table["environment"]["versions"]["jax"]
    assert [len(row["made_by"]) for row in table["runs"]] == [1, 1]
    assert "written to" in capsys.readouterr().out


def test_settings_within_a_loss_scale_are_not_split(config):
    text = "none,dynamic:2**10,growth_interval=9, static:8"
    config = dataclasses.replace(config, policies="float32", loss_scales=text)
    assert [scale for _, scale in config.cells()] == [
        "none",
        "dynamic:2**10,growth_interval=9",
        "static:8",
    ]


def test_a_run_without_a_number_makes_no_mean():
    assert mean_and_deviation([0.5, None]) == "nan"
    assert mean_and_deviation([0.5]) == "0.5000 ± 0.0000"


@pytest.mark.weekly
def test_cells_of_an_older_file_stay(config):
    first = dataclasses.replace(config, policies="mixed_float16", num_seeds=1)
    parity.main(first)
    table = parity.main(dataclasses.replace(first, policies="float32"))
    assert [row["policy"] for row in table["runs"]] == ["float32", "mixed_float16"]
    table = parity.main(dataclasses.replace(first, loss_scales="static:8"))
    cells = [(row["policy"], row["loss_scale"]) for row in table["runs"]]
    assert cells == [
        ("float32", "none"),
        ("mixed_float16", "none"),
        ("mixed_float16", "static:8"),
    ]
    assert table["runs"][0]["made_by"][0]["versions"]["jax"]


def test_differences_are_of_the_same_seed_and_to_float32_without_scaling():
    def row(policy, loss_scale, *accuracies):
        names = {"policy": policy, "loss_scale": loss_scale}
        return names | {"test_accuracies": list(accuracies)}

    rows = parity.compared(
        [
            row("float32", "none", 0.8, 0.9, 0.7),
            row("float32", "dynamic", 0.81, 0.91, 0.71),
            row("mixed_float16", "none", 0.81, 0.93),
        ]
    )
    assert [row["difference"] for row in rows] == [
        None,
        "+1.00 (+1.00 to +1.00)",
        "+2.00 (-10.71 to +14.71)",  # 2 ± 12.706 standard errors of 1
    ]
    assert rows[2]["difference_interval"][0] == pytest.approx(2)
    assert rows[0]["test_accuracies"] == [0.8, 0.9, 0.7]


def test_without_a_row_of_float32_there_is_no_difference():
    row = {"policy": "mixed_float16", "loss_scale": "none", "test_accuracies": [0.9]}
    assert parity.compared([row])[0]["difference"] is None


def test_without_autocast_it_is_another_table(config):
    assert (
        config.shape() + "-cast" == dataclasses.replace(config, autocast=False).shape()
    )
