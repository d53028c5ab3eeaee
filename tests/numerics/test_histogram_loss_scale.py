"""The loss scale that samples exponents, against brute force over casts in NumPy."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import (
    assert_same_bits,
    batch_norm_model,
    everything,
    over_devices,
    regression_batch,
    thinned,
)
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax.loss_scale import as_loss_scale
from mpjax.numerics._histogram_loss_scale import HistogramLossScale
from mpjax.sharding import auto_mesh

NUM_STEPS, NUM_GRADS = 16, 5
SETTINGS = (
    {"interval": 3, "growth_interval": 5},
    {"interval": 1, "headroom": 0, "growth_interval": 2, "backoff_factor": 0.25},
    {"interval": 4, "headroom": 6, "min_loss_scale": 4, "max_loss_scale": 2.0**20},
    {"interval": 2, "headroom": 1, "dtype": "float8_e5m2", "max_loss_scale": 2.0**40},
)


class Machine:
    """The documented rules in Python floats; what a scale loses is found by casting."""

    def __init__(self, loss_scale, **kwargs):
        fields = dataclasses.fields(HistogramLossScale)
        vars(self).update({f.name: f.default for f in fields} | kwargs)
        self.loss_scale = self.picked = loss_scale
        self.ceiling = self.max_loss_scale
        self.type = np.dtype(jnp.dtype(self.dtype))

    def step(self, scaled):
        if self.num_finite_steps % self.interval == 0:
            self.picked = self.pick(scaled)
        if np.isfinite(scaled).all():
            self.num_finite_steps += 1
            if self.num_finite_steps % self.growth_interval == 0:
                self.ceiling = min(2 * self.ceiling, self.max_loss_scale)
            self.loss_scale = min(self.picked, self.ceiling)
        else:
            self.num_finite_steps = 0
            smaller = self.loss_scale * self.backoff_factor
            self.loss_scale = self.ceiling = max(smaller, self.min_loss_scale)

    def pick(self, scaled):
        info = jnp.finfo(self.type)
        x = np.abs(scaled[np.isfinite(scaled)].astype(np.float64))
        x = np.maximum(x, float(info.smallest_subnormal) / 4)  # rounds to zero
        x = np.minimum(x, 2.0**info.maxexp)
        best = low = round(np.log2(self.min_loss_scale))
        for exponent in range(low, round(np.log2(self.max_loss_scale)) + 1):
            with np.errstate(over="ignore"):
                moved = x * 2.0 ** (exponent + self.headroom) / self.loss_scale
                fits = np.isfinite(moved.astype(self.type).astype(float)).all()
            best = exponent if fits else best
        return 2.0**best

    def state(self):
        return self.loss_scale, self.ceiling, self.num_finite_steps


def trajectory(loss_scale, grads, dtype):
    """Returns all states along a run of gradients (T, N) computed in `dtype`."""

    def step(scale, grads):
        scaled = scale.scale(grads).astype(dtype)
        scale = scale.observe({"w": scaled}).adjust(jnp.isfinite(scaled).all())
        out = scale.loss_scale, scale.ceiling, scale.num_finite_steps
        return scale, (out, scaled)

    return jax.lax.scan(step, loss_scale, grads)[1]


run = jax.jit(trajectory, static_argnums=2)


@st.composite
def gradients(draw):
    """Draws (T, N) float32 of slowly changing size, with zeros, spikes and Inf."""
    seed, size = draw(st.integers(0, 2**32 - 1)), draw(st.integers(-35, 12))
    spread = draw(st.sampled_from([0, 4, 20]))
    rng = np.random.default_rng(seed)
    exponents = size + np.cumsum(rng.integers(-2, 3, NUM_STEPS))[:, None]
    exponents = exponents - rng.uniform(0, spread, (NUM_STEPS, NUM_GRADS))
    grads = rng.choice([-1, 1], exponents.shape) * np.exp2(exponents)
    grads *= rng.random(grads.shape) > 0.2
    grads *= (rng.random(NUM_STEPS) > 0.1)[:, None]
    grads[rng.random(NUM_STEPS) < draw(st.sampled_from([0, 0.3, 0.8])), 0] = np.inf
    return grads.astype(np.float32)


@pytest.mark.parametrize("computed_in", ["float16", "float32"])
@pytest.mark.parametrize("kwargs", SETTINGS, ids=lambda s: f"every {s['interval']}")
@settings(max_examples=12)
@given(gradients(), st.integers(2, 20))
def test_agrees_with_the_state_machine(kwargs, computed_in, grads, start):
    states, scaled = run(HistogramLossScale(2.0**start, **kwargs), grads, computed_in)
    machine, expected = Machine(2.0**start, **kwargs), []
    for gradient in np.asarray(scaled):
        machine.step(gradient)
        expected.append(machine.state())
    got = zip(*(np.asarray(x).tolist() for x in states), strict=True)
    assert list(got) == expected


@pytest.mark.parametrize("start", [1.0, 2.0**8, 2.0**24])
def test_the_first_sample_has_found_the_scale_from_anywhere(start):
    grads = np.exp2(np.random.default_rng(0).uniform(-40, -4, (8, 1000)))
    grads[:, 0] = 2.0**-4
    states, _ = run(HistogramLossScale(start), np.float32(grads), "float16")
    scales, _, counts = states
    num_skipped = int(np.sum(counts == 0))
    assert num_skipped == max(np.log2(start) - 19, 0)
    assert set(scales[num_skipped:].tolist()) == {2.0**16}


def test_nothing_but_zeros_raises_the_scale():
    scale = HistogramLossScale(1.0, max_loss_scale=2.0**60).observe(jnp.zeros(3))
    assert float(scale.picked) == 2.0 ** (26 + 12)


def test_the_ceiling_holds_where_overflows_are_not_sampled():
    """The loss's cotangent fits float16 up to 2**15, the gradients up to 2**24."""

    def step(scale, _):
        finite = scale.loss_scale <= 2.0**15
        return scale.observe(scale.scale(jnp.full(3, 2.0**-20))).adjust(finite), finite

    scale = HistogramLossScale(interval=10, growth_interval=200)
    scale, finite = jax.lax.scan(step, scale, None, length=2000)
    num_skipped = np.cumsum(~np.asarray(finite))
    assert num_skipped[20] == 9  # on the way down from the first pick, 2**24
    assert 0 < num_skipped[-1] - num_skipped[20] <= 2000 / 200


@jax.jit
def adjusted(scale):
    for finite in (True, False, True, False, True, True):
        scale = scale.observe(jnp.ones(3)).adjust(jnp.array(finite))
    return scale


def journeys(scale):
    yield jax.tree.map(lambda x: x + 0, scale)
    yield jax.jit(lambda s: s)(scale)
    yield jax.jit(lambda s: s, donate_argnums=0)(jax.tree.map(jnp.array, scale))
    yield jax.lax.scan(lambda s, _: (s, None), scale, None, length=2)[0]
    yield jax.tree.unflatten(*reversed(jax.tree.flatten(scale)))
    yield dataclasses.replace(scale)
    yield jax.vmap(lambda s, _: s, (None, 0), None)(scale, jnp.arange(2))


def assert_same(scale, other):
    assert type(other) is type(scale)
    assert jax.tree.structure(other) == jax.tree.structure(scale)
    assert jax.tree.leaves(other) == jax.tree.leaves(scale)


@pytest.mark.slow
def test_nothing_is_lost_on_the_way():
    scale = adjusted(HistogramLossScale(2.0**20, interval=2, headroom=5))
    for other in journeys(scale):
        assert_same(scale, other)
        assert_same(adjusted(scale), adjusted(other))
    after = adjusted(scale)
    leaves = jax.tree.leaves(after)
    assert [str(x.dtype) for x in leaves] == ["float32"] * 3 + ["int32"]
    assert not any(x.weak_type for x in leaves)
    with jax.disable_jit():
        assert_same(jax.tree.map(np.asarray, adjusted(scale)), after)


def test_serialization():
    serialization = pytest.importorskip("flax.serialization")
    scale = adjusted(HistogramLossScale(2.0**20))
    target = jax.tree.map(jnp.zeros_like, scale)
    assert_same(scale, serialization.from_bytes(target, serialization.to_bytes(scale)))


@pytest.mark.filterwarnings("ignore")
def test_orbax(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    scale = jax.tree.map(jnp.asarray, adjusted(HistogramLossScale(2.0**20)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"scale": scale})
        checkpointer.wait_until_finished()
        target = {"scale": jax.tree.map(jnp.zeros_like, scale)}
        assert_same(scale, checkpointer.restore(tmp_path / "state", target)["scale"])


def test_it_is_a_loss_scale_that_scales_and_unscales():
    scale = HistogramLossScale(2.0**7)
    assert as_loss_scale(scale) is scale
    assert isinstance(scale.loss_scale, np.ndarray)  # no backend was started
    tree = {"x": jnp.asarray([1.0, 1.5], jnp.float16), "i": jnp.arange(3)}
    out = scale.unscale(scale.scale(tree))
    assert out["x"].dtype == jnp.float32
    assert out["i"] is tree["i"]
    np.testing.assert_array_equal(out["x"], [1.0, 1.5])


def test_leaves_that_are_not_floating_are_not_sampled():
    others = {"int": jnp.arange(3), "float0": np.zeros(2, jax.dtypes.float0)}
    scale = HistogramLossScale()
    assert scale.observe(others) is scale
    sampled = scale.observe({**others, "none": jnp.ones((0, 3)), "w": jnp.ones(3)})
    assert float(sampled.picked) == 2.0**24


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"loss_scale": 0.0}, "loss_scale"),
        ({"loss_scale": float("nan")}, "loss_scale"),
        ({"loss_scale": 1000}, "loss_scale.*power of two"),
        ({"loss_scale": 2.0**30}, "max_loss_scale"),
        ({"loss_scale": 0.5}, "min_loss_scale"),
        ({"interval": 0}, "interval"),
        ({"interval": 1.5}, "interval"),
        ({"growth_interval": True}, "growth_interval"),
        ({"headroom": -1}, "headroom"),
        ({"headroom": 1.5}, "headroom"),
        ({"dtype": "float32"}, "float16, bfloat16"),
        ({"dtype": "float12"}, "float16, bfloat16"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"backoff_factor": 0.3}, "backoff_factor.*power of two"),
        ({"min_loss_scale": 0.0}, "min_loss_scale"),
        ({"min_loss_scale": 3}, "min_loss_scale.*power of two"),
        ({"min_loss_scale": 8.0, "max_loss_scale": 4.0}, "min_loss_scale"),
        ({"max_loss_scale": 2.0**127}, "max_loss_scale"),
        ({"ceiling": 2.0**25}, "max_loss_scale"),
    ],
)
def test_settings_out_of_range(kwargs, word):
    with pytest.raises(ValueError, match=word):
        HistogramLossScale(**kwargs)


def primitives(jaxpr, *, inside_cond=False):
    """Yields (name of a primitive, whether it is inside of a cond)."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name, inside_cond
        inner = inside_cond or eqn.primitive.name == "cond"
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                yield from primitives(getattr(value, "jaxpr", value), inside_cond=inner)


def is_jaxpr(x):
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def test_between_samples_there_is_no_histogram():
    params, model_state, loss_fn = batch_norm_model()
    tx = mpjax.with_loss_scale(optax.sgd(0.1), HistogramLossScale())
    state = mpjax.TrainState.create(params=params, tx=tx, model_state=model_state)
    step = mpjax.make_train_step(loss_fn, tx)
    jaxpr = jax.make_jaxpr(step)(state, regression_batch())
    found = list(primitives(jaxpr.jaxpr))
    assert ("scatter-add", True) in found
    assert ("scatter-add", False) not in found


@pytest.mark.parametrize("start", thinned([1.0, 2.0**24]))
def test_the_train_step_moves_nothing_on_an_overflow_and_then_learns(start):
    params, model_state, loss_fn = batch_norm_model()
    scale = HistogramLossScale(start, interval=10)
    tx = mpjax.with_loss_scale(optax.adam(1e-2), scale)
    state = mpjax.TrainState.create(params=params, tx=tx, model_state=model_state)
    step = mpjax.make_train_step(loss_fn, tx, donate=False)
    losses, scales = [], []
    for _ in range(60):
        new, metrics = step(state, regression_batch())
        if not metrics["grads_finite"]:
            assert_same_bits(everything(new), everything(state))
            assert new.opt_state.loss_scale.loss_scale == metrics["loss_scale"] / 2
        state = new
        losses.append(float(metrics["loss"]))
        scales.append(float(metrics["loss_scale"]))
    num_skipped = int(metrics["num_skipped"])
    assert (num_skipped > 4) == (start > 1)
    assert all(2.0**10 <= s <= 2.0**16 for s in scales[num_skipped + 1 :])
    assert losses[-1] < 0.7 * losses[0]


needs_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; conftest makes them on a CPU"
)


@needs_devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_all_devices_take_the_smallest_scale_that_one_of_them_picks(check_vma):
    """Gradients differ per device; one overflows in the second step."""
    mesh = auto_mesh(jax.make_mesh((8,), ("data",)))
    tx = mpjax.with_loss_scale(optax.sgd(0.0), HistogramLossScale(), axis_name="data")

    def body(state, grads):
        _, state = tx.update(grads, state)
        return state

    mapped = jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )
    grads = jnp.exp2(jnp.arange(-19.0, -11.0))
    state = mapped(tx.init(jnp.zeros(8)), grads * 2.0**15)
    assert float(state.loss_scale.loss_scale) == 2.0**24
    state = mapped(state, (grads * 2.0**24).at[3].set(jnp.inf))
    assert not state.grads_finite
    assert float(state.loss_scale.loss_scale) == 2.0**23
    state = mapped(state, (grads * 2.0**23).at[6].mul(2.0**4))
    assert float(state.loss_scale.loss_scale) == 2.0 ** (12 + 13 - 4)
    for leaf in jax.tree.leaves(state):
        shards = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        assert len(shards) == 1


@needs_devices
@pytest.mark.parametrize(
    "check_vma", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_the_train_step_on_eight_devices_where_one_overflows(check_vma):
    mesh = auto_mesh(jax.make_mesh((8,), ("data",)))
    params, model_state, loss_fn = batch_norm_model()
    scale = HistogramLossScale(2.0**6)
    tx = mpjax.with_loss_scale(optax.adam(1e-2), scale, axis_name="data")
    state = mpjax.TrainState.create(params=params, tx=tx, model_state=model_state)
    step = mpjax.make_train_step(loss_fn, tx, axis_name="data", donate=False)
    mapped = over_devices(step, mesh, check_vma=check_vma)
    state, metrics = mapped(state, regression_batch(64))
    assert metrics["grads_finite"]
    picked = float(state.opt_state.loss_scale.loss_scale)
    assert picked > 2.0**6
    after, metrics = mapped(state, regression_batch(64, seed=1, spike=np.inf))
    assert not metrics["grads_finite"]
    assert_same_bits(everything(after), everything(state))
    assert float(after.opt_state.loss_scale.loss_scale) == picked / 2
    for leaf in jax.tree.leaves(after.opt_state):
        shards = {np.asarray(s.data).tobytes() for s in leaf.addressable_shards}
        assert len(shards) == 1
