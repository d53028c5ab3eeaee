"""Losses over training in several precisions, and the text that is learnt."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import tables
from experiments.benchmarks import _loss_curve_tasks as tasks
from experiments.benchmarks import loss_curves
from experiments.data import source_text
from experiments.harness.errors import ConfigError, DataError, WorkdirError

TINY = {"width": 32, "num_layers": 2, "length": 16, "batch_size": 2}


def test_text_is_split_by_file_and_named_by_its_hash(tmp_path, monkeypatch):
    for index in range(20):
        (tmp_path / f"f{index:02}.py").write_bytes(bytes([65 + index]) * 3)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    text = source_text.load()
    assert text.test.tobytes() == b"JJJTTT"
    assert text.train.tobytes().startswith(b"AAABBB")
    assert len(text.train) == 54
    assert text.num_files == 20
    assert source_text.load().sha256 == text.sha256
    (tmp_path / "f07.py").write_bytes(b"other")
    assert source_text.load().sha256 != text.sha256
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "x")})
    with pytest.raises(DataError, match="found 0"):
        source_text.load()


@pytest.mark.weekly
def test_precisions_have_the_same_parameters_and_batches():
    task = tasks.transformer(**TINY, num_steps=1)
    first, again = (next(task.make_batches(3)) for _ in range(2))
    np.testing.assert_array_equal(first["tokens"], again["tokens"])
    np.testing.assert_array_equal(first["tokens"][:, 1:], first["label"][:, :-1])
    losses, dtypes = {}, {}
    for name, variant in task.variants.items():
        params = jax.jit(variant.init)(jax.random.key(0))
        fn = lambda p, v=variant: v.loss_fn(p, first, None)[0]
        fn = mpjax.autocast(fn, variant.policy)
        losses[name] = float(jax.jit(fn)(params))
        dtypes[name] = "bf16" in str(jax.make_jaxpr(fn)(params))
    expected = losses.pop("float32")
    assert not dtypes.pop("float32")
    assert all(dtypes.values())
    np.testing.assert_allclose(list(losses.values()), expected, rtol=5e-3)


def test_bad_settings():
    with pytest.raises(ConfigError, match="--tasks must be some of transformer"):
        loss_curves.Config(tasks="mlp")
    with pytest.raises(ConfigError, match="--num-evals"):
        loss_curves.Config(num_evals=0)


def fake_run(seed, name):
    """Losses that tell the run, and take no training."""
    loss = seed + 0.1 * len(name)
    return {
        "train_steps": [1.0],
        "train_losses": [loss],
        "test_steps": [1],
        "tests": [{"loss": loss}],
        "num_skipped": 0,
    }


def fake_task(text="a"):
    variant = tasks.Variant(init=jnp.asarray, loss_fn=None, evaluate=None)
    names = ("float32", "by hand")
    return tasks.Task(
        "task",
        dict.fromkeys(names, variant),
        make_batches=lambda seed: iter(()),
        tx=None,
        num_steps=1,
        step_options={},
        facts={"sha256": text},
    )


@pytest.fixture
def trained(monkeypatch):
    """The runs that are trained from now on, by seed and precision."""
    found = []

    def train(step, state, *args):
        if len(found) == 3 and state == (1, "by hand"):
            raise KeyboardInterrupt
        found.append(state)
        return fake_run(*state)

    monkeypatch.setattr(loss_curves, "_train", train)
    monkeypatch.setattr(loss_curves, "_make_step", lambda task, variant: (None, None))
    return found


def test_an_interrupted_command_goes_on_with_the_runs_that_are_missing(
    tmp_path, trained, monkeypatch
):
    names = iter(["float32", "by hand", "float32", "by hand", "by hand"])
    seeds = iter([0, 0, 1, 1, 1])
    create = lambda **_: (next(seeds), next(names))
    monkeypatch.setattr(loss_curves.mpjax.TrainState, "create", create)
    monkeypatch.setattr(loss_curves, "TASKS", {"transformer": lambda c: fake_task()})
    output = tmp_path / "table.json"
    config = loss_curves.Config(tasks="transformer", num_seeds=2, output=output)
    with pytest.raises(KeyboardInterrupt):
        loss_curves.main(config)
    assert not output.exists()
    assert output.with_suffix(".runs").exists()
    trained.append(None)  # the second time nothing interrupts
    table = loss_curves.main(config)
    before = [(0, "float32"), (0, "by hand"), (1, "float32")]
    assert trained == [*before, None, (1, "by hand")]
    losses = {row["precision"]: row["test_losses"] for row in table["runs"]}
    assert losses == {
        name: [[fake_run(seed, name)["tests"][0]["loss"]] for seed in range(2)]
        for name in ("float32", "by hand")
    }
    assert not output.with_suffix(".runs").exists()


def test_kept_runs_of_other_settings_or_data_are_not_taken(tmp_path):
    path = tmp_path / "a.runs"
    kept = loss_curves.KeptRuns(path, {"num_steps": 5, "tasks": "convnet"}, "abc")
    kept.add(fake_task(), "float32", 0, fake_run(0, ""))
    again = loss_curves.KeptRuns(path, {"num_steps": 5, "tasks": "transformer"}, "def")
    assert again.find(fake_task(), "float32", 0) == fake_run(0, "")
    assert again.find(fake_task(), "float32", 1) is None
    assert again.find(fake_task("b"), "float32", 0) is None
    assert again.commits() == ["abc"]
    with pytest.raises(WorkdirError, match=r"other settings.*'num_steps': 5"):
        loss_curves.KeptRuns(path, {"num_steps": 6, "tasks": ""}, "abc")


@pytest.mark.parametrize("task", ["convnet", "transformer"])
@pytest.mark.weekly
def test_it_trains_and_leaves_a_table_and_a_plot(task, tmp_path):
    config = loss_curves.Config(
        **TINY,
        tasks=task,
        num_seeds=2,
        num_steps=5,
        num_epochs=1,
        num_images=300,
        num_evals=2,
        dataset="digits",
        output=tmp_path / "results" / "table.json",
    )
    loss_curves.main(config)
    table = json.loads(config.output.read_text())
    rows = table["runs"]
    names = ["float32", "by hand", "autocast", "autocast, scan"]
    assert [row["precision"] for row in rows] == names[: len(rows)]
    assert table["data"][task]["num_steps"] == rows[0]["test_steps"][-1]
    reference = jnp.array(rows[0]["test_losses"])
    for row in rows[1:]:
        # Another precision, from the same start: close, and not equal.
        differences = jnp.array(row["test_losses"]) - reference
        assert 0 < float(jnp.max(jnp.abs(differences))) < 0.1
        mean = float(jnp.mean(differences[:, -1]))
        assert row["loss_difference"][0] == pytest.approx(mean, abs=1e-6)
        assert ("accuracy_difference" in row) == (task == "convnet")
        assert row["num_skipped"] == 0
    assert f"| {rows[1]['task']} | by hand |" in tables.render_result(table)
    assert config.output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
