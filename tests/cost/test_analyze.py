"""Costs of functions whose bytes and FLOPs can be counted by hand, on any device."""

import jax
import jax.numpy as jnp
import optax
import pytest

import mpjax
from mpjax import cost
from mpjax.cost._hlo import moved_bytes

M = 1 << 20


def full(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_bytes(fn, *args):
    return moved_bytes(jax.jit(fn).lower(*args).compile().as_text())


def mlp_step(policy, batch_size=64, loss_scale=None):
    """Two layers of 128 units without a bias, on 32 features."""
    tx = mpjax.with_loss_scale(optax.sgd(0.1), loss_scale or mpjax.DynamicLossScale())

    def loss_fn(params, batch, key):
        h = jax.nn.relu(batch["x"] @ params["w0"])
        return jnp.mean((h @ params["w1"]) ** 2), None

    params = {"w0": jnp.ones((32, 128)), "w1": jnp.ones((128, 128))}
    state = mpjax.TrainState.create(params=params, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, policy=policy)
    return step, state, {"x": full(batch_size, 32)}


@pytest.mark.parametrize(
    ("fn", "args", "expected"),
    [
        (lambda x: 2 * jnp.tanh(x) + 1, [full(M)], 8 * M),
        (lambda x, y: x + y, [full(M), full(M)], 12 * M),
        (lambda x: x.sum(), [full(M)], 4 * M),
        (lambda x: x.astype(jnp.bfloat16), [full(M)], 6 * M),
        (lambda x, y: x @ y, [full(512, 512)] * 2, 3 * 4 * 512 * 512),
        (lambda x, i: x[i], [full(1024, 1024), full(8, dtype=jnp.int32)], 8 * 8192),
        (
            lambda x, i: jax.lax.dynamic_slice(x, (i, 0), (8, 1024)),
            [full(1024, 1024), full(dtype=jnp.int32)],
            8 * 8192,
        ),
    ],
    ids=["chain", "add", "sum", "cast", "matmul", "gather", "slice"],
)
def test_bytes_moved_are_those_counted_by_hand(fn, args, expected):
    assert compiled_bytes(fn, *args) == pytest.approx(expected, rel=0.02)


def test_a_loop_moves_its_bytes_as_often_as_it_runs():
    def fn(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=50)[0]

    once, many = (
        compiled_bytes(lambda x, w: jnp.tanh(x @ w), full(256, 256), full(256, 256)),
        compiled_bytes(fn, full(256, 256), full(256, 256)),
    )
    assert 0.9 * 50 * once <= many <= 1.7 * 50 * once


def test_a_scan_over_rows_reads_each_row_once():
    """Slices and updates in place move only their part, not the whole array."""

    def fn(x):
        return jax.lax.scan(lambda c, row: (c, jnp.tanh(row)), 0.0, x)[1]

    num_rows, width = 64, 4096
    assert compiled_bytes(fn, full(num_rows, width)) <= 6 * 4 * num_rows * width


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_train_step(policy):
    step, state, batch = mlp_step(policy)
    report = cost.analyze(step, state, batch)
    held = num_bytes(jax.tree.map(jax.random.key_data, state.key))
    held += num_bytes(state.params) + num_bytes(state.opt_state) + 4
    assert report.argument_bytes == pytest.approx(held + num_bytes(batch), abs=64)
    assert report.alias_bytes == pytest.approx(held, abs=64)
    assert report.peak_bytes == (
        report.argument_bytes
        + report.output_bytes
        - report.alias_bytes
        + report.temporary_bytes
    )
    # Forward, weight gradients, and one input gradient; two FLOPs each.
    first, second = 2 * 64 * 32 * 128, 2 * 64 * 128 * 128
    dtype = policy.removeprefix("mixed_")
    assert report.matmul_flops == {dtype: 2 * first + 3 * second}
    assert report.flops > sum(report.matmul_flops.values())


def test_dynamic_loss_scaling_moves_nothing_more():
    """On any device, as compiled for an H100 in test_train_step.py."""
    plain, dynamic = (
        cost.analyze(*mlp_step("mixed_float16", loss_scale=scale))
        for scale in (mpjax.NoOpLossScale(), mpjax.DynamicLossScale())
    )
    assert dynamic.moved_bytes <= 1.01 * plain.moved_bytes
    assert dynamic.temporary_bytes <= 1.01 * plain.temporary_bytes


def test_flops_of_a_scan_count_its_length():
    def fn(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)[0]

    report = cost.analyze(fn, full(8, 8), full(8, 8))
    assert report.matmul_flops == {"float32": 7 * 2 * 8**3}


def test_the_roofline_time_is_the_larger_of_arithmetic_and_memory():
    device = cost.Device(
        "slow",
        memory_bytes=10**9,
        bandwidth_bytes_per_s=1e9,
        peak_flops_per_s={"float32": 1e9, "tf32": 1e10, "bfloat16": 1e11},
    )
    matrix = full(512, 512)
    report = cost.analyze(jnp.matmul, matrix, matrix, device=device)
    assert report.compute_s == pytest.approx(2 * 512**3 / 1e10)
    assert report.memory_s == pytest.approx(3 * 4 * 512**2 / 1e9, rel=0.02)
    assert (report.bound, report.roofline_s) == ("compute", report.compute_s)
    with jax.default_matmul_precision("highest"):
        slow = cost.analyze(jnp.matmul, matrix, matrix, device=device)
    assert slow.compute_s == pytest.approx(2 * 512**3 / 1e9)
    half = cost.analyze(
        jnp.matmul, *[full(512, 512, dtype=jnp.bfloat16)] * 2, device=device
    )
    assert half.compute_s == pytest.approx(2 * 512**3 / 1e11)
    added = cost.analyze(jnp.add, matrix, matrix, device=device)
    assert added.bound == "memory"


def test_unknown_peaks_give_no_roofline():
    report = cost.analyze(jnp.add, full(8), full(8), device=cost.Device("unknown"))
    assert (report.compute_s, report.memory_s) == (None, None)
    assert (report.roofline_s, report.bound) == (None, None)
    assert "not known" in str(report)


def test_the_report_prints_and_goes_to_json(capsys):
    report = cost.analyze(*mlp_step("mixed_bfloat16"))
    report.print()
    assert capsys.readouterr().out == f"{report}\n"
    assert "temporaries" in str(report)
    held = report.to_dict()
    assert held["peak_bytes"] == report.peak_bytes
    assert held["flops"] == report.flops


def test_other_arguments_than_arrays():
    report = cost.analyze(lambda x, n: x * n, jnp.ones(8), 2.0)
    assert report.output_bytes == 32
