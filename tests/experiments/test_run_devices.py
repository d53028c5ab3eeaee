"""Runs on meshes train like runs on one device, and go on with other devices."""

import json

import jax
import pytest
from helpers import device_runs

from experiments.harness.config import BaseConfig
from experiments.harness.errors import ConfigError
from mpjax import NonFiniteTrainingError

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    """Returns what an experiment trains on one device, by its name and the policy."""
    found = {}

    def weights(name, policy):
        if (name, policy) not in found:
            workdir = tmp_path_factory.mktemp(name)
            device_runs.run(name, device_runs.config(name, workdir, policy))
            found[name, policy] = device_runs.weights(workdir / policy)
        return found[name, policy]

    return weights


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mnist_mlp", marks=pytest.mark.slow),
        pytest.param("speech_ctc", marks=pytest.mark.weekly),
        pytest.param("ssd_digits", marks=pytest.mark.weekly),
    ],
)
def test_a_mesh_trains_like_one_device(on_one_device, tmp_path, name):
    """Float32 up to its rounding; half by less than it differs from float32.

    Optimizers divide by the size of a gradient, which makes much of its rounding.
    """
    policies, mesh = ("float32", "mixed_float16"), "data=4,fsdp=2"
    settings = [
        {"workdir": str(tmp_path / policy), "policy": policy, "mesh": mesh}
        for policy in policies
    ]
    device_runs.run_apart([(name, changes) for changes in settings])
    for policy in policies:
        result = json.loads((tmp_path / policy / "result.json").read_text())
        assert result["environment"]["mesh"] == mesh
        expected = on_one_device(name, policy)
        found = device_runs.weights(tmp_path / policy / policy)
        limit = 1e-6
        if policy == "mixed_float16":
            limit = device_runs.distance(expected, on_one_device(name, "float32"))
        assert device_runs.distance(found, expected) < limit


def test_a_run_goes_on_with_fewer_devices(tmp_path):
    """Eight, then two, then one: the run of one device, up to rounding."""
    meshes = {1: "fsdp=8", 2: "data=2", 3: None}
    for num_epochs, mesh in meshes.items():
        settings = device_runs.config(
            "mnist_mlp",
            tmp_path / "run",
            "float32",
            mesh=mesh,
            num_epochs=num_epochs,
            resume=num_epochs > 1,
        )
        device_runs.run("mnist_mlp", settings)
    whole = device_runs.config("mnist_mlp", tmp_path / "one", "float32", num_epochs=3)
    device_runs.run("mnist_mlp", whole)
    found = device_runs.weights(tmp_path / "run" / "float32")
    expected = device_runs.weights(tmp_path / "one" / "float32")
    assert device_runs.distance(found, expected) < 1e-6


@pytest.mark.weekly
def test_a_mesh_counts_exponents_as_one_device_does(tmp_path):
    """Sums over devices are rounded otherwise, so counts may differ in a few values."""
    rows = []
    for mesh in (None, "data=4,fsdp=2"):
        settings = device_runs.config(
            "mnist_mlp", tmp_path / str(mesh), "float32", mesh=mesh, numerics=True
        )
        device_runs.run("mnist_mlp", settings)
        rows.append(device_runs.numerics_rows(tmp_path / str(mesh) / "float32"))
    assert rows[0].keys() == rows[1].keys()
    assert rows[0]
    for key, counts in rows[0].items():
        assert sum(rows[1][key]) == sum(counts)
        moved = sum(abs(a - b) for a, b in zip(rows[1][key], counts, strict=True))
        assert moved <= 0.01 * sum(counts)


@pytest.mark.weekly
def test_an_overflow_on_a_mesh_is_named(tmp_path):
    settings = device_runs.config(
        "mnist_mlp", tmp_path, "float32", mesh="data=4,fsdp=2", **device_runs.DIVERGES
    )
    with pytest.raises(NonFiniteTrainingError, match="overflow"):
        device_runs.run("mnist_mlp", settings)


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path):
    settings = device_runs.config(
        "mnist_mlp", tmp_path, "float32", mesh="data=8", batch_size=60
    )
    with pytest.raises(ConfigError, match=r"multiple of 8, .*--batch-size"):
        device_runs.run("mnist_mlp", settings)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=16", "has 16 devices, but there are 8"),
        ("dat=4", "Did you mean 'data'"),
        ("data=three", "written as"),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(tmp_path, mesh, message):
    settings = device_runs.config("mnist_mlp", tmp_path, "float32", mesh=mesh)
    with pytest.raises(ConfigError, match=message):
        device_runs.run("mnist_mlp", settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coordinator": "a:1"}, "--coordinator is for --distributed"),
        (
            {"distributed": True, "num_processes": 2},
            "needs --coordinator and --process-index",
        ),
        (
            {"coordinator": "a", "num_processes": 2, "process_index": 0},
            "--coordinator must be HOST:PORT, got a",
        ),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_index": 2},
            "--process-index must be from 0 to 1, got 2",
        ),
        ({"start_timeout_s": 0}, "--start-timeout-s must be greater than zero"),
    ],
)
def test_flags_of_processes_go_together(changes, message):
    if len(changes) == 3:
        changes = {"distributed": True, **changes}
    with pytest.raises(ConfigError, match=message):
        BaseConfig(**changes)


def test_processes_that_were_not_started_are_refused(tmp_path):
    settings = device_runs.config("mnist_mlp", tmp_path, "float32", distributed=True)
    with pytest.raises(ConfigError, match="needs its processes started"):
        device_runs.run("mnist_mlp", settings)
