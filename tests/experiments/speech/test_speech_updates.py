"""The ablation of weight updates: runs, resumption, divergence, table and plot."""

import dataclasses
import json
import math
import signal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import mpjax
from experiments import speech_ctc, speech_updates, speech_updates_table, tables
from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Corpus, Utterance
from experiments.harness import loop
from experiments.harness.errors import ConfigError, WorkdirError
from experiments.harness.recorder import read_rows
from experiments.harness.stop import Interrupted
from experiments.harness.update_shares import lost_by_epoch, shares
from experiments.speech_updates import VARIANTS, Cell

DURATION_S = 0.4


class Tones:
    """Utterances of one letter each, that of their pitch."""

    def __init__(self, num, seed):
        self.letters = np.random.default_rng(seed).integers(0, 2, num)
        self.seed = seed

    def __len__(self):
        return len(self.letters)

    def __getitem__(self, index):
        text = "ab"[self.letters[index]]
        return Utterance(f"{self.seed}-{index}", text, "", DURATION_S)

    def samples(self, index):
        time_s = np.arange(round(DURATION_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
        tone = np.sin(2 * np.pi * (300, 1500)[self.letters[index]] * time_s)
        noise = np.random.default_rng((self.seed, index)).normal(size=len(time_s))
        return (0.3 * tone + 0.03 * noise).astype(np.float32)


CORPUS = Corpus("tones", Tones(12, 0), Tones(4, 1), Tones(4, 2), unit="letters")


class Frames(nn.Module):
    """A network that compiles fast: every frame by itself."""

    num_classes: int

    @nn.compact
    def __call__(self, features, num_frames, *, train):
        del train
        hidden = nn.tanh(nn.Dense(6, name="hidden")(features))
        return nn.Dense(self.num_classes, name="classes")(hidden), num_frames


@pytest.fixture
def frames(monkeypatch):
    """Trains `Frames` instead of the speech model."""
    make_model = speech_ctc.make_model

    def make_frames(config, corpus):
        model, prepared = make_model(config, corpus)
        return Frames(model.num_classes), prepared

    monkeypatch.setattr(speech_ctc, "make_model", make_frames)


@pytest.fixture
def config(tmp_path):
    return speech_updates.Config(
        nesterov_variants="float32,float16_updates",
        adam_variants="",
        num_seeds=1,
        num_epochs=2,
        num_units=4,
        num_channels=2,
        num_layers=1,
        num_mels=8,
        batch_size=4,
        num_buckets=1,
        workdir=tmp_path / "run",
        output=tmp_path / "results" / "updates.json",
    )


def without_times(run):
    times = ("ms_per_step", "compile_s")
    return {k: v for k, v in run.items() if k not in times}


@pytest.mark.parametrize(
    "mesh", [None, pytest.param("data=2,fsdp=2", marks=pytest.mark.slow)]
)
def test_a_run_of_each_kind_and_its_table(config, frames, mesh):
    config = dataclasses.replace(config, mesh=mesh)
    table = speech_updates.main(config, CORPUS)
    baseline, half = table["runs"]
    assert (baseline["variant"], half["variant"]) == ("float32", "float16_updates")
    assert half["policy"] == "float16"
    assert baseline["difference"] is None
    assert half["paper_relative"] == 0.8
    expected = 100 * (half["test_cers"][0] - baseline["test_cers"][0])
    assert half["difference"] == f"{expected:+.2f}"
    for row in table["runs"]:
        assert [len(curve) for curve in row["val_errors"]] == [2]
        assert 0 < row["lost_updates"] < 1
        assert 0 <= row["lost_magnitude"] < row["lost_updates"]
        assert {len(x) for x in row["lost_by_layer"].values()} == {2}
        assert "classes/kernel" in row["lost_by_layer"]
        np.testing.assert_allclose(sum(row["gradient_exponents"].values()), 1)
    written = json.loads(config.output.read_text())
    assert written["runs"][1]["test_cers"] == half["test_cers"]
    text = (config.workdir / "result.md").read_text()
    assert text == f"{text.splitlines()[0]}\n\n" + tables.markdown_table(
        speech_updates_table.COLUMNS, table["runs"]
    )
    assert "| nesterov | float16_updates | 1 | 0 |" in tables.render_result(written)
    assert config.output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    rows = read_rows(config.workdir / "nesterov-float32-0" / "metrics.jsonl")
    observed = [row for row in rows if row["kind"] == "observed"]
    assert [(row["epoch"], row["step"]) for row in observed] == [(1, 3), (2, 6)]


# Without training: what follows fakes the runs.


@pytest.fixture
def trained(monkeypatch):
    """Fakes the training; returns the names of what is trained."""
    names = []

    def train_policy(experiment, task, config, policy, directory):
        name = directory.name
        names.append(name)
        if name == "nesterov-mixed_float16_unscaled-1":
            (directory / "metrics.jsonl").write_text(
                '{"kind": "train", "step": 1, "num_skipped": 20}\n'
            )
            raise mpjax.NonFiniteTrainingError("all was NaN")
        error = {"float32": 0.1, "float16_updates": 0.15}[name.split("-")[1]]
        return {"test_cer": error + 0.01 * config.seed, "test_loss": 1.0}, None

    monkeypatch.setattr(speech_updates, "train_policy", train_policy)
    return names


def test_what_is_missing_is_trained_and_the_table_made_anew(config, trained):
    speech_updates.main(config, CORPUS)
    assert trained == ["nesterov-float32-0", "nesterov-float16_updates-0"]
    more = dataclasses.replace(config, num_seeds=3, adam_variants="float32")
    with pytest.raises(WorkdirError, match="--resume"):
        speech_updates.main(more, CORPUS)
    more = dataclasses.replace(more, resume=True)
    table = speech_updates.main(more, CORPUS)
    assert len(trained) == len(set(trained)) == 9
    speech_updates.main(more, CORPUS)
    assert len(trained) == 9
    keys = [(row["optimizer"], row["variant"]) for row in table["runs"]]
    assert keys == [*more.variants()]
    half = table["runs"][1]
    np.testing.assert_allclose(half["test_cers"], [0.15, 0.16, 0.17])
    np.testing.assert_allclose(half["difference_interval"], [5, 5, 5])
    np.testing.assert_allclose(half["relative"], 0.16 / 0.11 - 1)
    other = dataclasses.replace(more, nesterov_learning_rate=1.0)
    with pytest.raises(WorkdirError, match="nesterov_learning_rate"):
        speech_updates.main(other, CORPUS)


def test_a_run_that_diverges_is_a_result(config, trained):
    names = "float32,mixed_float16_unscaled"
    config = dataclasses.replace(config, nesterov_variants=names, seed=1)
    rows = speech_updates.main(config, CORPUS)["runs"]
    row = rows[1]
    assert row["diverged"] == ["all was NaN"]
    assert (row["num_seeds"], row["num_diverged"], row["num_skipped"]) == (1, 1, 20)
    assert row["test_cer"] is row["difference"] is None
    assert row["test_cers"] == [None]
    text = tables.markdown_table(speech_updates_table.COLUMNS, rows)
    # Columns that neither run has a value for, as the difference, are left out.
    assert "| nesterov | mixed_float16_unscaled | 1 | 1 | - | 20 |" in text
    assert "points to float32" not in text


def test_seeds_that_diverged_are_in_no_mean():
    def run(variant, seed, error):
        return {
            "optimizer": "adam", "variant": variant, "seed": seed, "policy": "float32",
            "loss_scale": "none", "learning_rate": 1.0, "num_skipped": seed,
            "diverged": None if error else "NaN", "observed": [], "val_errors": [],
            "test_cer": error, "test_loss": 1.0,
        }  # fmt: skip

    runs = [run("float32", seed, 0.1 * seed) for seed in (1, 2, 3)]
    runs += [run("mixed_float16", s, e) for s, e in ((1, 0.2), (2, None), (3, 0.5))]
    pairs = [("adam", "float32"), ("adam", "mixed_float16")]
    _, row = speech_updates_table.summarize(runs, pairs)
    assert (row["num_diverged"], row["num_skipped"]) == (1, 2)
    np.testing.assert_allclose(row["test_cer"], 0.35)
    np.testing.assert_allclose(row["relative"], 0.7 / 0.4 - 1)
    np.testing.assert_allclose(row["difference_interval"][0], 15)


def test_shares_are_of_counts_since_the_epoch_before():
    def counted(lost, nonzero, magnitude=1.0):
        return {
            "num_lost": lost, "num_zeroed": 0, "num_nonzero": nonzero,
            "magnitude": magnitude, "lost_magnitude": 0.25,
        }  # fmt: skip

    gradients = {"class_counts": [[0] * 6, [3] + [0] * 5], "below": 1, "lo": -25}
    gradients |= {"hi": -24, **dict.fromkeys(("zeros", "above", "infs", "nans"), 0)}
    observed = [
        {"updates": {"w": counted(1, 10), "b": counted(0, 0)}},
        {"updates": {"w": counted(7, 20), "b": counted(0, 0)}, "gradients": gradients},
    ]
    lost = lost_by_epoch(observed)
    assert lost["w"] == [0.1, 0.6]
    assert all(map(math.isnan, lost["b"]))
    found = shares(observed)
    assert (found["lost_updates"], found["lost_magnitude"]) == (0.35, 0.25)
    assert found["small_gradients"] == 0.25
    assert all(map(math.isnan, shares([]).values()))


def test_every_variant_has_the_same_seeds_and_its_own_precision(config):
    config = dataclasses.replace(
        config,
        nesterov_variants=",".join(VARIANTS),
        adam_variants="float32",
        num_seeds=2,
        setting="small_updates",
    )
    cells = config.cells()
    assert len({cell.name for cell in cells}) == len(cells) == 16
    assert [cell.seed for cell in cells] == [0] * 8 + [1] * 8
    for cell in cells:
        run = config.run_config(cell)
        rate = {"adam": 2e-3, "nesterov": 1e-2}[cell.optimizer]
        assert (run.learning_rate, run.num_epochs) == (rate / 16, 8)
        assert (run.seed, run.optimizer) == (cell.seed, cell.optimizer)
        is_half = cell.variant.startswith("float16")
        policy = mpjax.get_policy(run.policy)
        assert (policy.param_dtype == jnp.float16) == is_half
        dynamic = is_half or cell.variant == "mixed_float16"
        assert run.loss_scale_name(run.policy) == ("dynamic" if dynamic else "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nesterov_variants": "float64"}, "--nesterov-variants must be some of"),
        ({"nesterov_variants": ""}, "name nothing to train"),
        ({"policy": "float16"}, "--policy is decided by the variants"),
        ({"loss_scale": "none"}, "--loss-scale is decided by the variants"),
        ({"weight_scale": 0.0}, "--weight-scale must be greater than zero"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.weekly
def test_the_speech_model_trains_with_float16_updates(config):
    config = dataclasses.replace(
        config, nesterov_variants="float16_updates", num_epochs=1
    )
    (row,) = speech_updates.main(config, CORPUS)["runs"]
    assert row["num_diverged"] == 0
    assert len(row["lost_by_layer"]) == 12


@pytest.mark.weekly
def test_all_variants_train_and_stopped_anywhere_they_end_the_same(
    config, tmp_path, monkeypatch, frames
):
    config = dataclasses.replace(config, nesterov_variants=",".join(VARIANTS))
    whole = speech_updates.main(config, CORPUS)
    wait, seen = loop._Loop._wait, []

    def stop_after(self, bar):
        seen.append(self)
        if len(seen) in (5, 9, 31):  # within the first run, the second, the fifth
            signal.raise_signal(signal.SIGINT)
        wait(self, bar)

    monkeypatch.setattr(loop._Loop, "_wait", stop_after)
    other = dataclasses.replace(config, workdir=tmp_path / "other")
    for _ in range(3):
        with pytest.raises(Interrupted, match="saved after step"):
            speech_updates.main(other, CORPUS)
        other = dataclasses.replace(other, resume=True)
    again = speech_updates.main(other, CORPUS)
    ours, theirs = ([*map(without_times, t["runs"])] for t in (again, whole))
    assert json.dumps(ours) == json.dumps(theirs)
    assert [row["num_diverged"] for row in whole["runs"]] == [0] * 7
    name = Cell("nesterov", "float16_stochastic", 0).name
    assert (config.workdir / name / "checkpoints").is_dir()
