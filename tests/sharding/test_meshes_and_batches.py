"""Meshes from text, and batches in one process: sizes, placements, refusals."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import assert_same_bits, regression_batch
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("data=4,fsdp=2", {"data": 4, "fsdp": 2}),
        (" data = 1 , tensor=2 ", {"data": 1, "tensor": 2}),
        ("fsdp=-1", {"fsdp": 8}),
        ("data=-1,fsdp=2,tensor=2", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("data=8,fsdp=-1", {"data": 8, "fsdp": 1}),
    ],
)
def test_a_mesh_has_the_sizes_that_are_written(spec, sizes):
    mesh = sharding.make_mesh(spec)
    assert dict(mesh.shape) == sizes
    assert list(mesh.shape) == list(sizes)
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_the_last_axis_takes_neighbouring_devices():
    mesh = sharding.make_mesh("data=2,tensor=2", devices=jax.devices()[2:])
    ids = [[d.id for d in row] for row in mesh.devices]
    first = jax.devices()[2].id
    assert ids == [[first, first + 1], [first + 2, first + 3]]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("data=4,fsdp=4", ["16 devices", "there are 8", "device_count=16"]),
        ("data=2,fspd=4", ["data, fsdp, tensor", "'fspd'", "Did you mean 'fsdp'?"]),
        ("data=2,expert=4", ["'expert'", "jax.make_mesh makes"]),
        ("tensor=8", ["neither", "write 'data=1,tensor=8'"]),
        ("data=2,data=4", ["'data' twice"]),
        ("data=-1,fsdp=-1", ["one size", "as numbers"]),
        ("data=-1,fsdp=3", ["8 devices do not divide by 3", "sizes that divide 8"]),
        ("data=0", ["'data=4,fsdp=2'", "got 'data=0'"]),
        ("data:4", ["'data=4,fsdp=2'", "got 'data:4'"]),
        ("", ["'data=4,fsdp=2'", "got ''"]),
    ],
)
def test_a_mesh_that_cannot_be_made_is_refused(spec, words):
    with pytest.raises(ValueError, match=r"mesh|devices") as error:
        sharding.make_mesh(spec)
    for word in words:
        assert word in str(error.value)


def test_a_mesh_without_devices_of_some_process_is_refused():
    devices = [types.SimpleNamespace(process_index=i // 4) for i in range(8)]
    with pytest.raises(ValueError, match=r"4 of the 8 devices.* none of process 1"):
        sharding.make_mesh("data=4", devices=devices)


SHAPE = "has shape \\({}\\): make it a multiple of 4"


@pytest.mark.parametrize(
    ("x", "shape"), [(np.ones((6, 3)), "6, 3"), (np.float32(1), ""), (3, "")]
)
def test_a_batch_that_does_not_divide_is_refused_where_it_is_made(x, shape):
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    with pytest.raises(ValueError, match=f"batch/in/x {SHAPE.format(shape)}"):
        sharding.shard_batch({"in": {"x": x}}, mesh)
    with pytest.raises(ValueError, match="batch/in/x must have a multiple of 4"):
        sharding.global_batch({"in": {"x": x}}, mesh)


def test_a_step_refuses_a_batch_that_does_not_divide():
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params={"w": jnp.ones(4)}, tx=tx)
    loss_fn = lambda params, batch, key: jnp.mean(batch["x"] @ params["w"])
    step = mpjax.make_train_step(loss_fn, tx, mesh=mesh)
    with pytest.raises(ValueError, match=f"batch/label {SHAPE.format('6,')}"):
        step(state, regression_batch(6))
    eval_step = mpjax.make_eval_step(lambda params, batch: batch["x"], mesh=mesh)
    with pytest.raises(ValueError, match=f"batch/label {SHAPE.format('6,')}"):
        eval_step(state, regression_batch(6))


def test_in_one_process_a_global_batch_is_the_batch():
    mesh = sharding.make_mesh("data=2,fsdp=2,tensor=2")
    batch = {"x": np.arange(16.0).reshape(8, 2), "n": np.arange(8), "z": jnp.ones(8)}
    whole = sharding.shard_batch(batch, mesh)
    for size in (None, 8):
        made = sharding.global_batch(batch, mesh, batch_size=size)
        assert_same_bits(made, whole)
        for got, want in zip(*map(jax.tree.leaves, (made, whole)), strict=True):
            assert got.sharding == want.sharding
            assert got.sharding.spec == P(("data", "fsdp"))
    assert made["x"].dtype == jnp.float32
    with pytest.raises(ValueError, match=r"must have 12 examples there, got .*\(8,\)"):
        sharding.global_batch(batch, mesh, batch_size=12)
    with pytest.raises(ValueError, match="batch_size=6: make it a multiple of 4"):
        sharding.global_batch(batch, mesh, batch_size=6)
