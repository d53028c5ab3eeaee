"""DeepConvNet: its shapes, its training, and what goes wrong from the command line."""

import json
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import cli_runs
from safetensors.numpy import load_file, save_file

from experiments import mnist_convnet
from experiments.data.mnist import ImageDataset
from experiments.harness import cli, loop, precisions
from experiments.harness.config import default_workdir
from experiments.harness.errors import ConfigError
from experiments.harness.stop import Interrupted
from experiments.models import classification
from experiments.models.deep_convnet import DeepConvNet

# (out, in, height, width) of the convolutions, (in, out) of the dense layers.
CONV_SHAPES = [(16, 1), (16, 16), (32, 16), (32, 32), (64, 32), (64, 64)]
DENSE_SHAPES = [(1024, 50), (50, 10)]
POLICIES = ("float32", "mixed_float16")


def squares(num=60, num_test=30, side=8):
    """Small square pictures whose label is where the bright spot is."""
    rng = np.random.default_rng(0)

    def some(size):
        y = rng.integers(0, 10, size).astype(np.uint8)
        x = rng.integers(0, 60, (size, side, side)).astype(np.uint8)
        x[np.arange(size), y // 5 * 4 + 1, y % 5 + 1] += 190
        return x, y

    return ImageDataset("squares", "the tests", *some(num), *some(num_test))


def settings(workdir, **changes):
    given = {
        "policies": ",".join(POLICIES),
        "precisions": "float64,float16",
        "num_epochs": 2,
        "batch_size": 25,
        "num_val": 20,
        "workdir": workdir,
    }
    return mnist_convnet.Config(**(given | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its config and its result; the weights are exported."""
    directory = tmp_path_factory.mktemp("finished")
    config = settings(directory / "run", export=directory / "w.safetensors")
    return config, mnist_convnet.main(config, squares())


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs the command line in this process; returns exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["experiment", *map(str, flags)])
        main = lambda config: mnist_convnet.main(config, squares())
        with pytest.raises(SystemExit) as exit_info:
            cli.run(main, mnist_convnet.Config, doc=mnist_convnet.__doc__)
        return exit_info.value.code, " ".join(capsys.readouterr().err.split())

    return call


def parameters(side=28):
    init = DeepConvNet().init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side)))["params"]


def test_the_weights_have_the_shapes_of_the_write_up():
    params = parameters()
    assert len(params) == len(CONV_SHAPES) + len(DENSE_SHAPES)
    for index, (num_out, num_in) in enumerate(CONV_SHAPES):
        layer = params[f"Conv_{index}"]
        out_in_height_width = tuple(layer["kernel"].shape[i] for i in (3, 2, 0, 1))
        assert out_in_height_width == (num_out, num_in, 3, 3)
        assert layer["bias"].shape == (num_out,)
    for index, shape in enumerate(DENSE_SHAPES):
        layer = params[f"Dense_{index}"]
        assert (layer["kernel"].shape, layer["bias"].shape) == (shape, shape[1:])
    assert sum(x.size for x in jax.tree.leaves(params)) == 123_552


@pytest.fixture(scope="module")
def initial():
    """Variables as training starts from."""
    return jax.jit(DeepConvNet().init)(jax.random.key(0), jnp.zeros((1, 28, 28)))


@pytest.mark.slow
def test_weights_are_he_normal_and_biases_zero(initial):
    params = initial["params"]
    for layer in params.values():
        kernel = np.asarray(layer["kernel"])
        fan_in = kernel[..., 0].size
        np.testing.assert_allclose(kernel.std(), np.sqrt(2 / fan_in), rtol=0.2)
        assert not np.any(layer["bias"])
    largest = np.asarray(params["Dense_0"]["kernel"])
    np.testing.assert_allclose(largest.std(), np.sqrt(2 / 1024), rtol=0.02)
    assert np.abs(largest).max() > 3 * np.sqrt(2 / 1024)  # not truncated


@pytest.mark.slow
def test_dropout_zeroes_half_of_the_hidden_units_in_training_alone(initial):
    model = DeepConvNet()
    x = jax.random.uniform(jax.random.key(0), (160, 28, 28))

    def hidden(seed, **kwargs):
        rngs = {"dropout": jax.random.key(seed)}
        _, state = model.apply(
            initial,
            x,
            rngs=rngs,
            capture_intermediates=True,
            **kwargs,
            mutable=["intermediates"],
        )
        return np.asarray(state["intermediates"]["Dropout_0"]["__call__"][0])

    whole, dropped = hidden(2), hidden(2, train=True)
    np.testing.assert_array_equal(whole, hidden(3))
    assert np.any(dropped != hidden(3, train=True))
    kept = dropped[whole > 0] > 0
    assert abs(kept.mean() - 0.5) < 0.05
    np.testing.assert_allclose(dropped[dropped > 0], 2 * whole[dropped > 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_it_computes_in_the_dtype_of_its_parameters(dtype):
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), parameters(8))
    out = jax.eval_shape(
        DeepConvNet().apply, {"params": params}, jnp.ones((2, 8, 8), dtype)
    )
    assert out.dtype == dtype


def test_the_loss_leaves_padding_out(initial):
    model, data = DeepConvNet(dropout_rate=0.0), squares(side=28)
    params = initial["params"]
    image = data.x_train[:5].astype(np.float32)
    label = data.y_train[:5].astype(np.int32)
    loss_fn = jax.jit(classification.make_loss_fn(model, has_dropout=True))
    mask = np.arange(5) < 3
    batch = {"image": image, "label": label, "mask": mask}
    loss, aux = loss_fn(params, batch, jax.random.key(1))
    other = {**batch, "image": np.where(mask[:, None, None], image, 0)}
    assert float(loss) == float(loss_fn(params, other, jax.random.key(1))[0])
    logits: Any = jax.jit(model.apply)({"params": params}, image)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    np.testing.assert_allclose(loss, losses[:3].mean(), rtol=1e-5)
    right = np.argmax(logits, axis=-1)[:3] == label[:3]
    np.testing.assert_allclose(aux["accuracy"], right.mean(), rtol=1e-6)
    assert int(aux["num_examples"]) == 3


@pytest.mark.slow
def test_a_run_leaves_weights_tables_and_plots(finished):
    config, result = finished
    assert [run["policy"] for run in result.runs] == list(POLICIES)
    for run in result.runs:
        assert [row["precision"] for row in run["precisions"]] == ["float64", "float16"]
        assert all(row["policy"] == run["policy"] for row in run["precisions"])
        assert run["test_accuracy"] == run["precisions"][0]["test_accuracy"]
        assert (config.workdir / run["policy"] / "weights.safetensors").is_file()
    for name in ("precisions.png", "training.png"):
        assert (config.workdir / name).read_bytes().startswith(b"\x89PNG")
    text = (config.workdir / "result.md").read_text()
    assert text.count("| mixed_float16 | float16 |") == 1
    table = json.loads((config.workdir / "precisions.json").read_text())
    assert table["experiment"] == "mnist_convnet_precisions"
    assert table["runs"] == [row for run in result.runs for row in run["precisions"]]


@pytest.mark.weekly
def test_a_stopped_run_goes_on_to_the_same_end(finished, tmp_path, monkeypatch):
    config, expected = finished
    evaluate, seen = loop.evaluate, []

    def stop_at_the_first(*args):
        if not seen:
            signal.raise_signal(signal.SIGTERM)
        seen.append(args)
        return evaluate(*args)

    monkeypatch.setattr(loop, "evaluate", stop_at_the_first)
    policy, workdir = "mixed_float16", tmp_path / "run"
    with pytest.raises(Interrupted, match="saved after step 2"):
        mnist_convnet.main(settings(workdir, policies=policy), squares())
    again = settings(workdir, policies=policy, resume=True)
    (run,) = mnist_convnet.main(again, squares()).runs
    times = dict.fromkeys(cli_runs.TIMES)
    assert {**run, **times} == {**expected.run(policy), **times}
    ours, theirs = workdir / policy, config.workdir / policy
    assert cli_runs.rows_without_times(ours) == cli_runs.rows_without_times(theirs)
    ours, theirs = (load_file(path / "weights.safetensors") for path in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.slow  # with the run that they share
def test_a_finished_run_exports_again_without_training(finished, tmp_path):
    config, expected = finished
    again = settings(config.workdir, resume=True, export=tmp_path / "w.safetensors")
    assert mnist_convnet.main(again, squares()).runs == expected.runs
    assert again.export.read_bytes() == config.export.read_bytes()


@pytest.mark.weekly
def test_loaded_weights_give_what_the_run_gave(finished, tmp_path, monkeypatch, capsys):
    config, expected = finished
    monkeypatch.chdir(tmp_path)
    given = {"load": config.export, "precisions": "float64,float16"}
    result = mnist_convnet.main(mnist_convnet.Config(**given), squares())
    (run,) = result.runs
    rows = [{**row, "policy": "float32"} for row in run["precisions"]]
    assert rows == expected.run("float32")["precisions"]
    assert "float16" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


@pytest.mark.weekly  # with the run that they share
def test_one_precision_alone_is_compared_with_nothing(finished):
    config, expected = finished
    half = mnist_convnet.Config(load=config.export, precisions="float16")
    (row,) = mnist_convnet.main(half, squares()).runs[0]["precisions"]
    theirs = expected.run("float32")["precisions"][1]
    assert row["num_correct"] == theirs["num_correct"]
    assert row["num_changed"] is row["max_logit_difference"] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--precisions", "float61"],
            "--precisions must be some of float64, float32",
        ),
        (["--precisions", " , "], "--precisions must be some of"),
        (["--num-val", "0"], "--num-val must be greater than zero"),
        (["--num-val", "60"], "--num-val 60 leaves 0 of 60 images"),
        (["--num-epochs", "0"], "--num-epochs must be greater than zero"),
        (["--dataset", "minst"], "--dataset must be one of"),
        (["--export", "missing/w.safetensors"], "--export: cannot write missing/w"),
        (["--export", "."], "--export: cannot write"),
        (["--load", "w", "--export", "x"], "leave --export out"),
        (["--load", "w", "--workdir", "x"], "leave --workdir out"),
    ],
)
def test_a_setting_that_cannot_work_is_named(call, flags, words):
    code, err = call(*flags)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


@pytest.mark.slow  # with the run that they share
def test_weights_that_cannot_be_loaded_are_named(call, finished, tmp_path):
    arrays = load_file(finished[0].export)
    arrays["Dense_1.bias"] = arrays["Dense_1.bias"][:9]
    save_file(arrays, tmp_path / "other.safetensors")
    code, err = call("--load", "other.safetensors")
    assert code == 1
    assert err.startswith("error: the weights in other.safetensors are not this")
    assert "Dense_1.bias is F32 (9,) there, expected F32 (10,)" in err


def test_the_default_workdir_is_the_experiments_own():
    assert default_workdir("mnist_convnet").name.startswith("mnist_convnet-")
    with pytest.raises(ConfigError, match="--precisions"):
        mnist_convnet.Config(precisions="half")
    assert mnist_convnet.Config().precision_names() == tuple(precisions.PRECISIONS)
