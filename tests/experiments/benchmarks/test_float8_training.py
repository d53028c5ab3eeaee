"""Training in float8, paired by seed with bfloat16 and float32."""

import json

import jax
import pytest

import mpjax
from experiments import tables
from experiments.benchmarks import _float8_tasks as tasks
from experiments.benchmarks import float8
from experiments.configs.float8 import Config
from experiments.harness.errors import ConfigError

TINY = {"num_units": 16, "mlp_epochs": 1, "num_steps": 3, "width": 32, "batch_size": 2}


def fake_runs(*losses):
    return [{"tests": [{"loss": x, "error": x / 10}], "num_skipped": 1} for x in losses]


def test_differences_are_paired_by_seed():
    rows = float8._aggregate(
        {
            "float32": fake_runs(1.0, 3.0),
            "mixed_bfloat16": fake_runs(1.5, 3.5),
            "mixed_float8:all": fake_runs(2.5, 4.0),
        }
    )
    assert [row["test_loss"] for row in rows] == [2.0, 2.5, 3.25]
    assert [row["num_skipped"] for row in rows] == [2, 2, 2]
    assert "loss_minus_float32" not in rows[0]
    assert rows[1]["loss_minus_float32"] == (0.5, 0.5, 0.5)
    assert "loss_minus_bfloat16" not in rows[1]
    assert rows[2]["loss_minus_float32"][0] == 1.25
    assert rows[2]["loss_minus_bfloat16"][0] == 0.75
    assert rows[2]["error_minus_bfloat16"][0] == pytest.approx(7.5)


def test_bad_settings():
    with pytest.raises(ConfigError, match="--tasks must be some of mlp"):
        Config(tasks="convnet")
    with pytest.raises(ConfigError, match="--mlp-epochs"):
        Config(mlp_epochs=0)


def matmul_dtypes(variant, batch):
    """Returns the dtypes of the matmuls by scope."""
    params = jax.eval_shape(variant.init, jax.random.key(0))
    report = mpjax.autocast_report(
        jax.grad(lambda p: variant.loss_fn(p, batch, None)[0]), variant.policy
    )(params)
    records = [r for r in report.records if r.primitive == "dot_general"]
    return {r.scope.rpartition("/")[2]: str(r.dtype) for r in records}


def test_the_rule_keeps_the_first_and_the_last_layer_in_bfloat16():
    task = tasks.mlp(Config(**TINY, dataset="digits"))
    batch = next(task.make_batches(0))
    found = {name: matmul_dtypes(v, batch) for name, v in task.variants.items()}
    layers = ("Dense_0", "Dense_1", "Dense_2")
    assert found == {
        "float32": dict.fromkeys(layers, "float32"),
        "mixed_bfloat16": dict.fromkeys(layers, "bfloat16"),
        "mixed_float8:all": dict.fromkeys(layers, "float8"),
        "first and last in bfloat16": dict(
            zip(layers, ("bfloat16", "float8", "bfloat16"), strict=True)
        ),
    }


@pytest.mark.weekly
def test_it_trains_and_leaves_a_table(tmp_path):
    config = Config(
        **TINY,
        tasks="mlp,transformer",
        num_seeds=2,
        dataset="digits",
        output=tmp_path / "table.json",
    )
    float8.main(config)
    table = json.loads(config.output.read_text())
    names = ["float32", "mixed_bfloat16", "mixed_float8:all", tasks.EDGES]
    assert [row["precision"] for row in table["runs"]] == names * 2
    for row in table["runs"][2:4]:
        # Another precision, from the same start: close, and not equal.
        assert 0 < abs(row["loss_minus_bfloat16"][0]) < 0.2
    assert "| mixed_float8:all |" in tables.render_result(table)
    assert not config.output.with_suffix(".runs").exists()
