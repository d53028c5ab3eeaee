"""`ssd_digits`: a run through the command line, resumed, started from, and used."""

import json
import signal
import sys

import jax
import numpy as np
import pytest
from helpers import detection_runs
from helpers.cli_runs import arrays, rows_without_times
from PIL import Image

from experiments import ssd_digits
from experiments.data.detection.scenes_config import ScenesConfig
from experiments.harness import cli, loop
from experiments.harness.errors import ConfigError, WorkdirError
from experiments.harness.stop import Interrupted
from experiments.harness.weights import WeightsError
from experiments.models.detection.prediction import predict

FLAGS = ("--policies", "float32,mixed_float16", "--num-epochs", "1")
FLAGS = (*FLAGS, "--batch-size", "4", "--numerics", "--numerics-interval", "2")


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with detection_runs.tiny_network():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps in two policies, through the command line."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    dataset = detection_runs.dataset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ssd", *FLAGS, "--workdir", str(workdir)])
        main = lambda config: ssd_digits.main(config, dataset)
        cli.run(main, ssd_digits.Config, doc=ssd_digits.__doc__)
    return workdir


@pytest.mark.slow
def test_a_run_leaves_metrics_pictures_and_weights(finished):
    result = json.loads((finished / "result.json").read_text())
    assert [run["policy"] for run in result["runs"]] == ["float32", "mixed_float16"]
    for run in result["runs"]:
        assert 0 <= run["test_map07"] <= 1
        assert np.isfinite(run["test_loss"])
        assert list(run["ap_by_class"]) == list("0123456789")
        assert (run["num_anchors"], run["left_out"]) == (8 * 8 * 4 + 4 * 4 * 4, {})
        directory = finished / run["policy"]
        for name in ("found", "matches", "numerics", "gradients"):
            assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (directory / "trunk.safetensors").exists()
    assert json.loads((finished / "classes.json").read_text()) == list("0123456789")
    assert "mAP (VOC07)" in (finished / "result.md").read_text()


@pytest.mark.slow
def test_activation_gradients_are_those_of_the_counts(finished):
    table = json.loads((finished / "float32" / "gradients.json").read_text())
    assert table["experiment"] == ssd_digits.GRADIENTS_NAME
    assert 0.3 < table["zero"] < 1
    np.testing.assert_allclose(table["zero"] + sum(table["exponents"].values()), 1)
    assert {row["loss_scale"] for row in table["runs"]} >= {1, 8, 128, 1024}
    assert [row["step"] for row in table["over_steps"]] == [1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    with detection_runs.without_pictures():
        config = detection_runs.settings(workdir, crop=True, photometric=True)
        ssd_digits.main(config, detection_runs.dataset())
    return config


@pytest.mark.slow
def test_a_stopped_run_ends_as_if_it_had_not_been_stopped(
    uninterrupted, tmp_path, monkeypatch
):
    wait, seen = loop._Loop._wait, []

    def stop_after(self, bar):
        seen.append(self)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGTERM)
        wait(self, bar)

    monkeypatch.setattr(loop._Loop, "_wait", stop_after)
    changes = {"crop": True, "photometric": True}
    config = detection_runs.settings(tmp_path / "run", **changes)
    dataset = detection_runs.dataset()
    with detection_runs.without_pictures():
        with pytest.raises(Interrupted, match="saved after step 3"):
            ssd_digits.main(config, dataset)
        config = detection_runs.settings(tmp_path / "run", resume=True, **changes)
        ssd_digits.main(config, dataset)
    ours, theirs = (c.workdir / "float32" for c in (config, uninterrupted))
    assert rows_without_times(ours) == rows_without_times(theirs)
    expected = arrays(theirs)
    for name, value in arrays(ours).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.slow
def test_the_trunk_of_another_run_is_where_a_run_starts(finished, tmp_path):
    file = finished / "float32" / "trunk.safetensors"
    config = detection_runs.settings(tmp_path / "run", init_weights=file, seed=7)
    model = ssd_digits.SSD(10, config.architecture())
    key = jax.random.key(0)
    params, _ = ssd_digits.make_init_from(config, model)(key)
    other, _ = ssd_digits.make_init(model)(key)
    trained = arrays(finished / "float32")
    for layer in ("conv1_1", "conv2_1"):
        kernel = params["trunk"][layer]["kernel"]
        (stored,) = (
            value
            for name, value in trained.items()
            if "params" in name and layer in name and "kernel" in name
            if "opt_state" not in name
        )
        np.testing.assert_array_equal(kernel, stored)
        assert (kernel != other["trunk"][layer]["kernel"]).any()
    np.testing.assert_array_equal(
        params["offsets_0"]["kernel"], other["offsets_0"]["kernel"]
    )
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(b"damaged")
    config = detection_runs.settings(tmp_path / "run", init_weights=file)
    with pytest.raises(WeightsError, match="damaged"):
        ssd_digits.make_init_from(config, model)


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((30, 40, 3), np.uint8)
    pixels[5:20, 10:25] = 255
    file = tmp_path / "picture.png"
    Image.fromarray(pixels).save(file)
    return file


@pytest.mark.slow
def test_a_trained_run_draws_what_it_finds(finished, picture, capsys):
    config = ssd_digits.Config(workdir=finished, predict=(picture,))
    assert ssd_digits.main(config) is None
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(": ", 1)[0] for line in lines] == [
        f"{picture}, {policy} after 2 steps" for policy in ("float32", "mixed_float16")
    ]
    drawn = sorted((finished / "predictions").iterdir())
    assert [path.name for path in drawn] == [
        "picture-float32.png",
        "picture-mixed_float16.png",
    ]
    (one,) = predict(
        ssd_digits.Config(workdir=finished, predict=(picture,), policy="float32"),
        ssd_digits.NAME,
    )
    assert one.found.boxes.shape == (len(one.found.scores), 4)


@pytest.mark.slow
def test_what_contradicts_a_run_is_named(finished, picture, tmp_path):
    config = ssd_digits.Config(workdir=finished, predict=(picture,), depth=2)
    with pytest.raises(ConfigError, match="--depth is 0 there and 2 here"):
        ssd_digits.main(config)
    config = ssd_digits.Config(workdir=tmp_path, predict=(picture,))
    with pytest.raises(WorkdirError, match="holds no run"):
        ssd_digits.main(config)
    (finished / "classes.json").write_text("{}")
    try:
        config = ssd_digits.Config(workdir=finished, predict=(picture,))
        with pytest.raises(WorkdirError, match=r"classes\.json is damaged"):
            ssd_digits.main(config)
    finally:
        (finished / "classes.json").write_text(json.dumps(list("0123456789")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "voc"}, "--dataset voc needs --data-dir"),
        ({"preset": "ssd300", "image_size": 64}, "images of 64 pixels are too small"),
        ({"depth": -1}, "--depth must be 0 or more"),
        ({"momentum": 1.0}, "--momentum must be from 0 to less than 1"),
        ({"voc_years": (2008,)}, "--voc-years must be some of 2007, 2012, got '2008'"),
        ({"predict": ("a.png",), "resume": True}, "--predict trains nothing; leave"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        detection_runs.settings(tmp_path, **changes)


@pytest.mark.slow
def test_it_learns_what_is_easy(tmp_path):
    """Bars of ten lengths, on a canvas of 32 pixels: half of them are found."""
    scenes = ScenesConfig(num_train=256, num_test=32, max_digits=1, difficulty="easy")
    dataset = detection_runs.dataset(scenes)
    config = detection_runs.settings(
        tmp_path / "run", num_epochs=40, batch_size=16, learning_rate=2e-2
    )
    with detection_runs.without_pictures():
        result = ssd_digits.main(config, dataset)
    rows = [
        row
        for row in rows_without_times(result.workdir / "float32")
        if row["kind"] == "epoch"
    ]
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert result.run("float32")["test_map07"] > 0.3
