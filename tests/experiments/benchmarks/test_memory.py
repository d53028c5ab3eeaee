"""Memory per policy: measured for this machine, written as a table and a plot."""

import dataclasses

import pytest

from experiments.benchmarks import _memory_by_hand as by_hand
from experiments.benchmarks import _memory_float8, memory
from experiments.benchmarks.real_models import REAL_MODELS
from experiments.benchmarks.workloads import WORKLOADS, mlp
from experiments.harness.errors import ConfigError
from experiments.harness.files import read_json
from experiments.models.small import cast


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


@pytest.mark.weekly
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


def mlp_by_hand():
    """Returns a small model whose form in half casts all parameters and images."""
    workload = mlp(32)

    def by_hand(dtype):
        def loss_fn(params, batch, key):
            return workload.loss_fn(*cast((params, batch), dtype), key)

        return loss_fn

    return dataclasses.replace(workload, batch_sizes={"gpu": 8}, by_hand=by_hand)


@pytest.mark.weekly
def test_real_models_are_compared_with_half_by_hand(tmp_path, monkeypatch, capsys):
    for name in ("resnet50", "vit_b16"):
        monkeypatch.setitem(REAL_MODELS, name, lambda size: mlp_by_hand())
    output = tmp_path / "memory.json"
    before = memory.main(
        memory.Config(device="present", workloads="resnet50", output=output)
    )
    config = memory.Config(device="present", workloads="vit_b16", output=output)
    table = memory.main(config)
    assert read_json(output) == table
    assert table["experiment"] == "memory_real"
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    num_before = len(by_hand.BASELINES)
    assert table["runs"][:num_before] == before["runs"]
    full, *others = table["runs"][num_before:]
    assert [run["name"] for run in (full, *others)] == list(by_hand.BASELINES)
    assert {run["workload"] for run in (full, *others)} == {"vit_b16"}
    assert full["temporaries_to_by_hand"] is None
    for run in others:
        (hand,) = (x for x in others if x["name"] == by_hand.BASELINES[run["name"]])
        for key in ("temporaries", "moved"):
            assert run[f"{key}_ratio"] == run[f"{key}_mb"] / full[f"{key}_mb"]
            assert run[f"{key}_to_by_hand"] == run[f"{key}_mb"] / hand[f"{key}_mb"]
    assert "to by hand" in capsys.readouterr().out


@pytest.mark.weekly
@pytest.mark.filterwarnings("ignore:mixed_float8:UserWarning")
def test_float8_beside_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "mlp", lambda: mlp(2048))
    monkeypatch.setitem(REAL_MODELS, "gpt2", lambda size: mlp_by_hand())
    monkeypatch.setitem(_memory_float8.HEADS, "gpt2", "Dense_2$")
    output = tmp_path / "memory.json"
    for workloads in ("gpt2", "mlp"):
        config = memory.Config(
            device="present", workloads=workloads, float8=True, output=output
        )
        memory.main(config)
    rows = read_json(output)["runs"]
    assert [(row["workload"], row["name"]) for row in rows] == [
        ("mlp", "mixed_bfloat16"),
        ("mlp", "mixed_float8"),
        ("gpt2", "mixed_bfloat16"),
        ("gpt2", "mixed_float8, head in bfloat16"),
    ]
    for half, float8 in (rows[:2], rows[2:]):
        assert half["moved_ratio"] == 1
        assert float8["moved_ratio"] == float8["moved_mb"] / half["moved_mb"]
    # Too small for float8: the same program.
    assert rows[3]["moved_ratio"] == 1


def test_the_group_of_real_models():
    names = lambda workloads: memory.Config(workloads=workloads).workload_names()
    assert names("real") == list(REAL_MODELS)
    assert names("llama,unet") == ["llama", "unet"]
    both = memory.Config(workloads="mlp,gpt2", float8=True)
    assert both.workload_names() == ["mlp", "gpt2"]


def test_bad_flags_are_reported():
    with pytest.raises(ConfigError, match=r"one of present, a100.*got 'h1000'"):
        memory.Config(device="h1000")
    with pytest.raises(ConfigError, match=r"some of mlp.*got 'resnet'"):
        memory.Config(workloads="mlp,resnet")
    with pytest.raises(ConfigError, match=r"such as unet.*got 'mlp,unet'"):
        memory.Config(workloads="mlp,unet")
