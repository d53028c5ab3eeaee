"""Costs of steps on meshes: of this machine's devices, and of GPUs you don't have."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import cost, sharding
from mpjax.cost import _compile
from mpjax.cost._compile import compile_for

needs_eight = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)
SLOW = cost.Device(
    "slow",
    memory_bytes=10**9,
    bandwidth_bytes_per_s=1e9,
    peak_flops_per_s={"float32": 1e9},
    num_per_node=4,
    node_bandwidth_bytes_per_s=1e9,
    network_bandwidth_bytes_per_s=1e8,
)
NUM_LAYERS = 4


def loss_fn(params, batch, key):
    x = batch["x"]
    for w in params:
        x = jax.nn.relu(x @ w)
    return jnp.mean(x.astype(jnp.float32) ** 2)


def scanned_loss_fn(params, batch, key):
    apply = lambda x, w: (jax.nn.relu(x @ w), None)
    return jnp.mean(jax.lax.scan(apply, batch["x"], jnp.stack(params))[0] ** 2)


def make(policy, mesh, *, width=64, batch_size=1024, loss_fn=loss_fn):
    """Returns a step with Adam of four square layers, and shapes without shardings."""
    tx = mpjax.with_loss_scale(optax.adam(1e-3))

    def init():
        params = [jnp.zeros((width, width))] * NUM_LAYERS
        return mpjax.TrainState.create(params=params, tx=tx)

    step = mpjax.make_train_step(loss_fn, tx, policy=policy, mesh=mesh)
    batch = {"x": jax.ShapeDtypeStruct((batch_size, width), jnp.float32)}
    return step, jax.eval_shape(init), batch


def cpu_mesh(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes))


def sent(report, name, axes, min_bytes=1000):
    """Returns the large collectives of a kind along axes."""
    return [
        c
        for c in report.collectives
        if (c.name, c.axes) == (name, axes) and c.sent_bytes > min_bytes
    ]


@needs_eight
def test_data_parallelism_on_a_cpu_reduces_each_gradient():
    num_weights = NUM_LAYERS * 64**2
    report = cost.analyze(*make("float32", cpu_mesh(data=8)), device=SLOW)
    (reduced,) = sent(report, "all-reduce", ("data",))
    assert reduced.group_size == 8
    assert reduced.sent_bytes == pytest.approx(2 * 7 / 8 * 4 * num_weights, rel=1e-3)
    # Parameters and two moments on each device, an eighth of the batch and the FLOPs.
    held = 4 * (3 * num_weights + 1024 * 64 // 8)
    assert report.argument_bytes == pytest.approx(held, rel=1e-3)
    # Forward and backward, but for the gradient of the input.
    assert report.matmul_flops == {"float32": 11 * 2 * 1024 * 64**2 // 8}
    # Two nodes of four, whose devices share the hop.
    assert not reduced.is_within_node
    assert report.communication_s == pytest.approx(report.sent_bytes / 4e8)
    assert report.best_s == max(report.roofline_s, report.communication_s)
    assert report.worst_s == report.roofline_s + report.communication_s


@needs_eight
def test_full_sharding_on_a_cpu_gathers_the_weights():
    """Once each in float32, which keeps them for the backward pass."""
    num_weights = NUM_LAYERS * 64**2
    report = cost.analyze(*make("float32", cpu_mesh(data=2, fsdp=4)), device=SLOW)
    held = 4 * (3 * num_weights // 4 + 1024 * 64 // 8)
    assert report.argument_bytes == pytest.approx(held, rel=1e-3)
    (gathered,) = sent(report, "all-gather", ("fsdp",))
    assert gathered.sent_bytes == 3 / 4 * 4 * num_weights
    assert (gathered.num_calls, gathered.is_within_node) == (NUM_LAYERS, True)
    (reduced,) = sent(report, "all-reduce", ("data",))
    assert reduced.sent_bytes == 2 * 1 / 2 * 4 * num_weights // 4
    assert not reduced.is_within_node


@needs_eight
def test_a_loop_counts_its_steps():
    report = cost.analyze(
        *make("float32", cpu_mesh(fsdp=8), loss_fn=scanned_loss_fn), device=SLOW
    )
    gathered = sum(c.num_calls for c in sent(report, "all-gather", ("fsdp",)))
    reduced = sum(c.num_calls for c in sent(report, "all-reduce", ("fsdp",)))
    assert gathered >= NUM_LAYERS
    assert reduced >= NUM_LAYERS


@needs_eight
def test_arguments_keep_their_shardings():
    """Also arrays, and of a function that knows no mesh."""
    mesh = cpu_mesh(data=8)
    step, state, batch = make("float32", mesh)
    whole = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct(batch["x"].shape, jnp.float32, sharding=whole)
    report = cost.analyze(step, state, {"x": x})
    assert report.argument_bytes == pytest.approx(
        4 * (3 * NUM_LAYERS * 64**2 + 1024 * 64), rel=1e-3
    )
    rows = jax.device_put(np.ones((64, 8), np.float32), NamedSharding(mesh, P("data")))
    report = cost.analyze(lambda x: jnp.sum(x, 0), rows)
    assert (report.mesh, report.argument_bytes) == ({"data": 8}, 8 * 8 * 4)
    (reduced,) = report.collectives
    assert (reduced.name, reduced.sent_bytes) == ("all-reduce", 2 * 7 / 8 * 8 * 4)


@needs_eight
def test_shapes_are_placed_by_the_layout_of_the_step():
    mesh = cpu_mesh(data=2, tensor=4)
    layout = sharding.LayoutRules([("", P(None, "tensor"))])
    plain, state, batch = make("float32", mesh)
    tx = mpjax.with_loss_scale(optax.adam(1e-3))
    step = mpjax.make_train_step(
        loss_fn, tx, policy="float32", mesh=mesh, layout=layout
    )
    split = cost.analyze(step, state, batch).argument_bytes
    whole = cost.analyze(plain, state, batch).argument_bytes
    weights = 3 * NUM_LAYERS * 64**2 * 4  # and two moments of each
    assert whole - split == weights * 3 // 4


@needs_eight
def test_shard_map_tells_its_mesh():
    mesh = sharding.auto_mesh(cpu_mesh(data=8))
    add = jax.shard_map(
        lambda x: jax.lax.psum(x.sum(0), "data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    x = jax.ShapeDtypeStruct((64, 8), jnp.float32)
    (reduced,) = cost.analyze(jax.jit(add), x).collectives
    assert (reduced.axes, reduced.sent_bytes) == (("data",), 2 * 7 / 8 * 8 * 4)


MESHES = ({"data": 8}, {"fsdp": 8})


@needs_eight
def test_meshes_are_compared():
    meshes = [cpu_mesh(**axes) for axes in MESHES]
    costs = cost.compare(
        make, ["float32"], meshes=meshes, device=cost.Device("unknown")
    )
    assert list(costs.reports) == ["float32, data=8", "float32, fsdp=8"]
    assert [report.mesh for report in costs.reports.values()] == list(MESHES)
    assert set(costs.largest_batch.values()) == {None}
    assert "worst, ms" in str(costs)


@needs_eight
@pytest.mark.slow
def test_the_largest_batch_on_each_mesh():
    small = cost.Device("small", memory_bytes=6_000_000)
    make_wide = functools.partial(make, width=128)
    meshes = [cpu_mesh(**axes) for axes in MESHES]
    costs = cost.compare(make_wide, ["float32"], meshes=meshes, device=small)
    replicated, split = costs.largest_batch.values()
    assert split > replicated > 0
    for mesh, largest in zip(meshes, (replicated, split), strict=True):

        def peak(batch_size, mesh=mesh):
            args = make_wide("float32", mesh, batch_size=batch_size)
            return _compile.peak_bytes(compile_for(small, *args))

        assert largest % 8 == 0
        assert peak(largest) <= 0.75 * 6_000_000 < peak(int(1.1 * largest) // 8 * 8)


def test_bad_meshes_are_named():
    with pytest.raises(ValueError, match="unknown device 'h1000'"):
        cost.device_mesh("h1000", {"data": 8})
    for axes in ({}, {"data": 0}, {"data": 2.5}, {"data": -8, "fsdp": -8}):
        with pytest.raises(ValueError, match=re.escape(f"got {axes}")):
            cost.device_mesh("h100", axes)
    with pytest.raises(ValueError, match="slow has no target to compile for"):
        cost.device_mesh(SLOW, {"data": 8})
    with pytest.raises(ValueError, match="meshes is empty"):
        cost.compare(make, ["float32"], meshes=[])


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_compile, "_PLUGINS", ("no_such_plugin",))
    with pytest.raises(cost.MissingPluginError, match=r'pip install "jax\[cuda13\]"'):
        cost.device_mesh("h100", {"data": 8})


def test_a_step_for_other_devices_is_refused():
    args = make("float32", cpu_mesh(data=1))
    with pytest.raises(ValueError, match=r"of the kind .*, not of NVIDIA H100"):
        cost.analyze(*args, device="h100")


def test_the_report_of_a_mesh_prints_and_goes_to_json(capsys):
    mesh = cpu_mesh(data=jax.device_count())
    report = cost.analyze(*make("float32", mesh), device=SLOW)
    report.print()
    text = capsys.readouterr().out
    assert text == f"{report}\n"
    assert f"each of data={mesh.size} slow" in text
    assert "modelled time of a call" in text
    held = report.to_dict()
    assert held["sent_bytes"] == sum(c["sent_bytes"] for c in held["collectives"])
    assert held["mesh"] == {"data": mesh.size}
    unknown = cost.analyze(*make("float32", mesh))
    assert unknown.communication_s is None
    assert unknown.best_s is unknown.worst_s is None


WIDTH, BATCH_SIZE = 4096, 8192
WEIGHTS = NUM_LAYERS * WIDTH**2


def on_h100s(**axes):
    mesh = cost.device_mesh("h100", axes)
    sizes = {"width": WIDTH, "batch_size": BATCH_SIZE}
    report = cost.analyze(*make("mixed_bfloat16", mesh, **sizes))
    assert report.device == cost.get_device("h100").name
    assert report.mesh == axes
    # Parameters and two moments in float32, the inputs, and what is left is small.
    state = 4 * 3 * WEIGHTS // axes.get("fsdp", 1)
    inputs = 4 * BATCH_SIZE * WIDTH // mesh.size
    assert report.argument_bytes == pytest.approx(state + inputs, rel=1e-4)
    matmuls = 11 * 2 * BATCH_SIZE * WIDTH**2 // mesh.size
    assert report.matmul_flops == {"bfloat16": matmuls}
    return report


def itemsize(collectives):
    (dtype,) = {c.dtype for c in collectives}
    return jnp.dtype(dtype).itemsize


@pytest.mark.h100
def test_data_parallelism_on_eight_h100s():
    report = on_h100s(data=8)
    reduced = sent(report, "all-reduce", ("data",))
    expected = 2 * 7 / 8 * itemsize(reduced) * WEIGHTS
    assert sum(c.sent_bytes for c in reduced) == pytest.approx(expected, rel=1e-4)
    assert report.sent_bytes == pytest.approx(expected, rel=1e-4)
    assert report.communication_s == pytest.approx(expected / 450e9, rel=1e-4)


@pytest.mark.h100
@pytest.mark.parametrize("num_nodes", [1, 64])
def test_full_sharding_on_h100s(num_nodes):
    """Half copies of the weights are gathered: four forward, three backward."""
    report = on_h100s(**({"data": 64} if num_nodes > 1 else {}), fsdp=8)
    (gathered,) = sent(report, "all-gather", ("fsdp",))
    assert (gathered.dtype, gathered.num_calls) == ("bfloat16", 7)
    assert gathered.sent_bytes == 7 / 8 * 2 * 7 * WIDTH**2
    scattered = sent(report, "reduce-scatter", ("fsdp",))
    expected = 7 / 8 * itemsize(scattered) * WEIGHTS
    assert sum(c.sent_bytes for c in scattered) == pytest.approx(expected, rel=1e-4)
    assert all(c.is_within_node for c in (gathered, *scattered))
    between = sent(report, "all-reduce", ("data",))
    sent_bytes = sum(c.sent_bytes for c in between)
    if num_nodes == 1:
        assert sent_bytes == 0
    else:
        expected = 2 * 63 / 64 * itemsize(between) * WEIGHTS / 8
        assert sent_bytes == pytest.approx(expected, rel=1e-4)
        assert not any(c.is_within_node for c in between)
        seconds = sum(c.seconds for c in between)
        assert seconds == pytest.approx(expected / 50e9, rel=1e-4)


@pytest.mark.h100
def test_matmuls_in_the_code_of_each_h100_are_its_share():
    """Every dot of the compiled step, whose rows are an eighth of the batch."""
    mesh = cost.device_mesh("h100", {"fsdp": 8})
    args = make("mixed_bfloat16", mesh, width=WIDTH, batch_size=BATCH_SIZE)
    text = compile_for(cost.get_device("h100"), *args).as_text()
    shapes = re.findall(r"= (?:bf16|f32)\[(\d+),(\d+)\]\S* (?:dot|custom-call)\(", text)
    sizes = [int(m) * int(n) for m, n in shapes]
    rows = BATCH_SIZE // 8
    flops = sum(2 * n * (rows if n == WIDTH**2 else WIDTH) for n in sizes)
    assert {flops} == set(cost.analyze(*args).matmul_flops.values())
