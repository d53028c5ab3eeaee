"""An experiment unlike those on MNIST goes through the harness as it is.

Its data stream from a generator; a batch is a nested pytree of features, lengths and
labels, as in speech recognition; its headline metric is an error rate.
"""

import dataclasses
import itertools
import json
import signal
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cli_runs
from helpers.tools import thinned

from experiments.data.dataset import Dataset, check_shard
from experiments.harness import loop, results
from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError, DataError
from experiments.harness.experiment import Experiment, Metric, Task, evaluate
from experiments.harness.recorder import read_rows
from experiments.harness.report import report
from experiments.harness.stop import Interrupted
from experiments.harness.training import train_policy

BATCH_SIZE, NUM_FRAMES, NUM_FEATURES, NUM_LABELS = 4, 6, 3, 2
STEPS_PER_EPOCH, NUM_EPOCHS = 3, 3
EXPERIMENT = Experiment(
    "tiny_speech",
    metrics=(Metric("cer", "CER", is_larger_better=False, format="{:.1%}"),),
    headline="cer",
    more_columns=(results.Column("speakers", "num_speakers"),),
)


@dataclasses.dataclass
class Stream:
    """Utterances made one after the other; nothing is kept but the position."""

    end: int | None = None
    rows: tuple[int, int] = (0, BATCH_SIZE)
    position: int = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        rng = np.random.default_rng(self.position)
        self.position += 1
        labels = rng.integers(0, NUM_FEATURES, (BATCH_SIZE, NUM_LABELS))
        features = rng.normal(size=(BATCH_SIZE, NUM_FRAMES, NUM_FEATURES)) / 4
        for row, label in itertools.product(range(BATCH_SIZE), range(NUM_LABELS)):
            features[row, label * 3 : label * 3 + 3, labels[row, label]] += 1
        batch = {
            "audio": (
                features.astype(np.float32),
                rng.integers(NUM_FRAMES // 2, NUM_FRAMES + 1, BATCH_SIZE),
            ),
            "labels": labels,
        }
        rows = slice(*self.rows)
        return jax.tree.map(
            lambda x: (x if x.dtype == np.float32 else np.int32(x))[rows], batch
        )

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]

    def shard(self, index, count):
        check_shard(index, count)
        first, end = self.rows
        size = (end - first) // count
        if size * count != end - first:
            raise ConfigError(f"{count} processes cannot share {end - first} rows")
        first += index * size
        return dataclasses.replace(self, rows=(first, first + size))


def apply(params, batch):
    """Logits (B, NUM_LABELS, NUM_FEATURES) for NUM_LABELS equal parts of the frames."""
    features, lengths = batch["audio"]
    mask = jnp.arange(NUM_FRAMES) < lengths[:, None]
    frames = (features * mask[..., None]) @ params["w"]
    return frames.reshape(len(frames), NUM_LABELS, -1, NUM_FEATURES).mean(2)


def loss_fn(params, batch, key):
    del key
    logits = apply(params, batch).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return losses.mean(), {"num_examples": jnp.sum(batch["audio"][1])}


def make_task(data=None, *, evaluate_split=None):
    def error_rate(state, split):
        batch = next(Stream(position={"val": 1000, "test": 2000}[split]))
        wrong = np.argmax(apply(state.params, batch), -1) != batch["labels"]
        return {"cer": float(np.mean(wrong))}

    return Task(
        batches=data or Stream(),
        steps_per_epoch=STEPS_PER_EPOCH,
        num_epochs=NUM_EPOCHS,
        init=lambda key: (
            {"w": jax.random.normal(key, (NUM_FEATURES, NUM_FEATURES))},
            None,
        ),
        tx=optax.adam(0.1),
        loss_fn=loss_fn,
        evaluate=evaluate_split or error_rate,
        data="a stream of utterances",
        facts={"num_speakers": 7},
    )


def run(workdir, **changes):
    given = {"policies": "float32,mixed_float16", "workdir": workdir} | changes
    config = BaseConfig(**given)

    def train_one(config, policy, directory):
        return train_policy(EXPERIMENT, make_task(), config, policy, directory)[0]

    return results.run_policies(EXPERIMENT.name, config, train_one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("tiny") / "run")


def test_it_learns_and_its_result_has_its_own_metrics(uninterrupted):
    for policy in ("float32", "mixed_float16"):
        values = uninterrupted.run(policy)
        assert values["num_speakers"] == 7
        assert values["test_cer"] < 0.5
        assert values["val_cer"] is not None
        assert not [name for name in values if "accuracy" in name or "val_loss" in name]
        rows = read_rows(uninterrupted.workdir / policy / "metrics.jsonl")
        epochs = [row for row in rows if row["kind"] == "epoch"]
        assert [row["step"] for row in epochs] == [3, 6, 9]
        assert {"loss", "val_cer", "grad_norm"} <= epochs[0].keys()
        train = [row for row in rows if row["kind"] == "train"][:3]
        weights = [row["num_examples"] for row in train]
        mean = np.average([row["loss"] for row in train], weights=weights)
        np.testing.assert_allclose(epochs[0]["loss"], mean, rtol=1e-12)


def test_its_table_and_its_lines_are_in_its_own_format(uninterrupted, capsys):
    report(EXPERIMENT, uninterrupted, "tiny")
    text = (uninterrupted.workdir / "result.md").read_text()
    assert "| policy | loss scale | speakers | test CER | ms/step |" in text
    cer = f"{uninterrupted.run('float32')['test_cer']:.1%}"
    assert f"| float32 | none | 7 | {cer} |" in text
    assert (uninterrupted.workdir / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "CER" in capsys.readouterr().out
    row = {"epoch": 2, "ms_per_step": 1.5, "loss": 2.0, "val_cer": 0.125}
    row |= {"loss_scale": 8.0, "num_skipped": 1}
    line = loop.epoch_line(EXPERIMENT, row, num_epochs=10)
    expected = "epoch  2/10      1.5 ms/step  loss 2.0000  val_cer 12.5%  "
    assert line == expected + "scale 8  skipped 1"


@pytest.mark.parametrize("steps", thinned([4, 1, 6], 3))
def test_stopped_after_any_step_it_ends_bitwise_the_same(
    uninterrupted, tmp_path, monkeypatch, steps
):
    wait, seen = loop._Loop._wait, []

    def stop_after(self, bar):
        seen.append(self)
        if len(seen) == steps:
            signal.raise_signal(signal.SIGINT)
        wait(self, bar)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_wait", stop_after)
        with pytest.raises(Interrupted, match=f"saved after step {steps}"):
            run(tmp_path / "run")
    result = run(tmp_path / "run", resume=True)
    workdirs = result.workdir, uninterrupted.workdir
    ours, theirs = map(cli_runs.result_without_times, workdirs)
    assert ours == theirs
    for policy in ("float32", "mixed_float16"):
        ours, theirs = (
            cli_runs.rows_without_times(directory / policy) for directory in workdirs
        )
        assert ours == theirs


def test_data_that_end_too_early_are_an_error(tmp_path):
    for end in (0, 5):
        config = BaseConfig(workdir=tmp_path)
        directory = tmp_path / str(end)
        with pytest.raises(DataError, match=f"ended after {end} of 9 steps"):
            train_policy(
                EXPERIMENT, make_task(Stream(end=end)), config, "float32", directory
            )


def test_an_evaluation_with_other_metrics_is_refused():
    task = make_task(evaluate_split=lambda state, split: {"wer": 0.5})
    with pytest.raises(ValueError, match=r"gave \['wer'\], expected .* \['cer'\]"):
        evaluate(EXPERIMENT, task, None, "val")


def test_a_headline_that_is_no_metric_is_refused():
    with pytest.raises(ValueError, match="headline 'wer' must be one of"):
        dataclasses.replace(EXPERIMENT, headline="wer")


def test_the_stream_is_a_dataset_with_state_and_shards():
    stream = Stream()
    assert isinstance(stream, Dataset)
    next(stream)
    shards = [stream.shard(index, 2) for index in range(2)]
    state = json.loads(json.dumps(stream.get_state()))
    expected = [next(stream) for _ in range(3)]
    for batch in expected:
        parts = [next(shard) for shard in shards]
        joined = jax.tree.map(lambda *xs: np.concatenate(xs), *parts)
        jax.tree.map(np.testing.assert_array_equal, joined, batch)
    other = Stream()
    other.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, next(other), expected[0])
    with pytest.raises(ValueError, match="expected an index"):
        stream.shard(2, 2)
