"""Eleven mistakes of other libraries, each shown there and avoided here.

The test of a peer is skipped where the peer is not installed; the test of mpjax always
runs. A peer that has mended its mistake fails its test, which is then removed.
"""

import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax import sharding

ONE = {"w": jnp.ones(())}


def sgd_run(loss_fn, batches, *, tx=None, params=ONE, **kwargs):
    """Trains and returns the final state and the metrics of each step."""
    tx = tx or mpjax.with_loss_scale(optax.sgd(1.0))
    state = mpjax.TrainState.create(params=params, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, **kwargs)
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


class TestLimitsOfTheScale:
    """1. jmp loses its minimum in any tree.map, and has no maximum."""

    def test_jmp(self):
        scale = jmp.DynamicLossScale(
            jnp.float32(16.0), period=1, min_loss_scale=jnp.float32(16.0)
        )
        scale = jax.jit(lambda s: s.adjust(jnp.array(False)))(scale)
        scale = jax.tree.map(lambda x: x, scale)
        assert float(scale.adjust(jnp.array(False)).loss_scale) < 16
        scale = jmp.DynamicLossScale(jnp.float32(2.0**127), period=1)
        scale = scale.adjust(jnp.array(True))
        unscale = jax.jit(lambda s: s.unscale(jnp.float32(2.0**127)))
        assert float(unscale(scale)) == 0

    def test_mpjax(self):
        scale = mpjax.DynamicLossScale(16.0, growth_interval=1, min_loss_scale=16.0)
        for _ in range(3):
            scale = jax.jit(lambda s: s.adjust(jnp.array(False)))(scale)
            scale = jax.tree.map(lambda x: x, scale)
        assert float(scale.loss_scale) == 16
        for _ in range(200):
            scale = scale.adjust(jnp.array(True))
        assert float(scale.loss_scale) == 2.0**24
        assert float(scale.unscale(scale.loss_scale)) == 1


class TestPythonFloatScales:
    """2. A weakly typed scale takes the dtype of a half loss, and retraces."""

    def test_jmp(self):
        scale = jmp.DynamicLossScale(2.0**15)
        assert bool(jnp.isinf(scale.scale(jnp.float16(4))))
        assert float(scale.unscale(jnp.float16(2.0**-12))) == 0

    def test_mpjax(self):
        scale = mpjax.DynamicLossScale(2.0**15)
        assert float(scale.scale(jnp.float16(4))) == 2.0**17
        assert float(scale.unscale(jnp.float16(2.0**-12))) == 2.0**-27
        num_traces = 0

        @jax.jit
        def adjust(scale):
            nonlocal num_traces
            num_traces += 1
            return scale.adjust(jnp.array(True))

        adjust(adjust(adjust(scale)))
        assert num_traces == 1


class TestStaticScales:
    """3. jmp hides a static scale in the tree's structure: one compile per value."""

    @staticmethod
    def compiles(make):
        scaled = jax.jit(lambda s: s.scale(jnp.float32(1)))
        for value in (1.0, 2.0, 4.0):
            assert float(scaled(make(value))) == value
        return scaled._cache_size()

    def test_jmp(self):
        assert self.compiles(jmp.StaticLossScale) == 3

    def test_mpjax(self):
        assert self.compiles(mpjax.StaticLossScale) == 1


class TestGrowthSteps:
    """4. mpx unscales with the scale it has just adjusted."""

    def test_mpx(self):
        mpx = pytest.importorskip("mpx")
        scale = mpx.DynamicLossScaling(jnp.float32(8), jnp.float32(1), period=1)
        grad_fn = mpx.filter_grad(lambda p: 3 * p, scale)
        _, _, grad = grad_fn(jnp.float32(1))
        assert float(grad) == 1.5

    def test_mpjax(self):
        scale = mpjax.DynamicLossScale(8.0, growth_interval=1)
        _, seen = sgd_run(
            lambda p, b, k: (3 * p["w"], None),
            [jnp.ones(())] * 3,
            tx=mpjax.with_loss_scale(optax.sgd(1e-3), scale),
        )
        assert [float(m["loss_scale"]) for m in seen] == [8, 16, 32]
        assert [float(m["grad_norm"]) for m in seen] == [3, 3, 3]
        assert float(seen[0]["loss"]) == 3


class TestLabels:
    """5. mpx casts every argument, and a label of 2049 becomes 2048."""

    def test_mpx(self):
        mpx = pytest.importorskip("mpx")
        scale = mpx.DynamicLossScaling(jnp.float32(1), jnp.float32(1))
        grad_fn = mpx.filter_grad(lambda p, label: p * label, scale)
        _, _, grad = grad_fn(jnp.float32(1), jnp.float32(2049))
        assert float(grad) == 2048

    @pytest.mark.parametrize("name", ["label", "target", "y"])
    @pytest.mark.parametrize("dtype", ["int32", "float32", "weak"])
    @pytest.mark.parametrize("autocast", [True, False])
    def test_mpjax(self, name, dtype, autocast):
        def loss_fn(params, batch, key):
            image_dtype = jnp.float32 if autocast else jnp.float16
            assert batch["image"].dtype == image_dtype
            label = batch[name]
            if dtype == "int32":  # as a loss does: half times int32 is half
                label = label.astype(jnp.float32)
            return params["w"] * label, None

        label = jnp.full((), 2049.0) if dtype == "weak" else jnp.asarray(2049, dtype)
        assert label.weak_type == (dtype == "weak")
        batch = {"image": jnp.ones(()), name: label}
        tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.NoOpLossScale())
        _, (metrics,) = sgd_run(loss_fn, [batch], tx=tx, autocast=autocast)
        assert float(metrics["loss"]) == 2049


class TestNoFloor:
    """6. NaN data drives Keras', jaxamp's and torch's scale to 0, flax's to 1e-38."""

    def test_flax(self):
        dynamic_scale = pytest.importorskip("flax.training.dynamic_scale")
        scale = dynamic_scale.DynamicScale(scale=1.0)
        step = jax.jit(lambda s, x: s.value_and_grad(lambda p: p * x)(1.0))
        for _ in range(140):
            scale = step(scale, jnp.nan).dynamic_scale
        assert float(scale.scale) < 1e-37

    def test_jaxamp(self):
        jaxamp = pytest.importorskip("jaxamp")
        state = jaxamp.DynamicScalerState()
        grad = jaxamp.dynamic_scale_grad(lambda p, x: p * x)
        step = jax.jit(lambda s, x: grad(jnp.float32(1), x, dynamic_scaler_state=s)[0])
        for _ in range(170):
            state = step(state, jnp.float32(jnp.nan))
        assert float(state.scaler) == 0

    def test_keras(self):
        keras = pytest.importorskip("keras")
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(1.0), initial_scale=2.0**-140
        )
        weight = keras.Variable(np.ones(1, np.float32))
        optimizer.build([weight])
        variables, weights = [v.value for v in optimizer.variables], [weight.value]
        step = jax.jit(optimizer.stateless_apply)
        for _ in range(12):
            weights, variables = step(variables, [jnp.full(1, jnp.nan)], weights)
        index = [v.path for v in optimizer.variables].index(
            optimizer.dynamic_scale.path
        )
        assert float(variables[index]) == 0
        weights, variables = step(variables, [jnp.zeros(1)], weights)
        assert bool(jnp.isnan(weights[0][0]))

    def test_torch(self):
        torch = pytest.importorskip("torch")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-140)
        weight = torch.nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([weight], 1.0)
        for _ in range(12):
            optimizer.zero_grad()
            scaler.scale(weight * torch.nan).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 0
        assert float(weight.detach()) == 1

    def test_mpjax(self):
        loss_fn = lambda p, b, k: (p["w"] * b, None)
        batches = [jnp.float32(jnp.nan)] * 40 + [jnp.float32(2)]
        state, seen = sgd_run(loss_fn, batches)
        assert float(seen[-1]["loss_scale"]) == 1
        assert float(state.params["w"]) == -1
        guard = mpjax.NonFiniteGuard(
            mpjax.DynamicLossScale(), max_consecutive_skipped=5
        )
        with pytest.raises(mpjax.NonFiniteTrainingError, match="5 steps in a row"):
            guard.check(jax.tree.map(lambda *x: jnp.stack(x), *seen))


class TestModelState:
    """7. In Keras, torch and flax's example a skipped step moves BatchNorm."""

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_keras(self):
        keras = pytest.importorskip("keras")
        model = keras.Sequential(
            [
                keras.Input((2,)),
                keras.layers.BatchNormalization(),
                keras.layers.Dense(1),
            ]
        )
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        x = np.array([[np.inf, 1.0], [1.0, 2.0]], np.float32)
        model.train_on_batch(x, np.ones((2, 1), np.float32))
        assert not np.isfinite(model.layers[0].moving_mean.numpy()).all()

    def test_torch(self):
        torch = pytest.importorskip("torch")
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu")
        x = torch.tensor([[torch.inf, 1.0], [1.0, 2.0]])
        scaler.scale(model(x).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**15  # the step was skipped
        assert not torch.isfinite(model[0].running_mean).all()

    def test_mpjax(self):
        def loss_fn(params, model_state, batch, key):
            mean = 0.9 * model_state + 0.1 * batch.mean().astype(jnp.float32)
            return params["w"] * batch.mean(), (mean, None)

        tx = mpjax.with_loss_scale(optax.sgd(1.0))
        state = mpjax.TrainState.create(params=ONE, tx=tx, model_state=jnp.float32(0.5))
        step = mpjax.make_train_step(loss_fn, tx)
        state, metrics = step(state, jnp.array([jnp.inf, 1.0]))
        assert int(metrics["num_skipped"]) == 1
        assert float(state.model_state) == 0.5
        assert int(state.step) == 0


class TestMultiSteps:
    """8. optax.MultiSteps multiplies a NaN accumulator by 0: NaN forever."""

    BATCHES = (1.0, jnp.nan, 1.0, 1.0, 1.0)

    def test_optax(self):
        tx = optax.MultiSteps(optax.sgd(1.0), 2)
        state, params = tx.init(ONE), ONE
        for value in self.BATCHES:
            updates, state = tx.update({"w": jnp.float32(value)}, state, params)
            params = optax.apply_updates(params, updates)
        assert bool(jnp.isnan(params["w"]))

    def test_mpjax(self):
        tx = mpjax.with_loss_scale(optax.MultiSteps(optax.sgd(1.0), 2))
        batches = [jnp.float32(value) for value in self.BATCHES]
        state, seen = sgd_run(lambda p, b, k: (p["w"] * b, None), batches, tx=tx)
        assert int(seen[-1]["num_skipped"]) == 1
        assert float(state.params["w"]) == 1 - 2  # two clean cycles of gradient 1


class TestHalfOptimizers:
    """9. optax in half: an overflowing norm, an epsilon of 0, moments that drift."""

    PARAMS: ClassVar = {"w": jnp.ones(4, jnp.float16)}

    def test_optax(self):
        clip = optax.clip_by_global_norm(1.0)
        grads = {"w": jnp.full(4, 300.0, jnp.float16)}
        updates, _ = clip.update(grads, clip.init(self.PARAMS))
        assert float(jnp.abs(updates["w"]).max()) == 0
        adam = optax.adam(0.1)
        zeros = {"w": jnp.zeros(4, jnp.float16)}
        updates, _ = adam.update(zeros, adam.init(self.PARAMS))
        assert bool(jnp.isnan(updates["w"]).all())
        state = adam.init(self.PARAMS)
        _, after = adam.update({"w": jnp.ones(4)}, state)
        assert state[0].mu["w"].dtype != after[0].mu["w"].dtype

    def test_mpjax(self):
        tx = mpjax.with_loss_scale(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)),
            mpjax.NoOpLossScale(),
        )
        state = tx.init(self.PARAMS)
        big = {"w": jnp.full(4, 300.0, jnp.float16)}
        for grads in ({"w": jnp.zeros(4, jnp.float16)}, big):
            updates, after = tx.update(grads, state, self.PARAMS)
            assert bool(jnp.isfinite(updates["w"]).all())
            kinds = lambda tree: [(x.dtype, x.weak_type) for x in jax.tree.leaves(tree)]
            assert kinds(after) == kinds(state)
            state = after
        clip = mpjax.with_loss_scale(optax.clip_by_global_norm(1.0))
        scaled = {"w": jnp.full(4, 2.0**15, jnp.float16)}
        updates, _ = clip.update(scaled, clip.init(self.PARAMS), self.PARAMS)
        np.testing.assert_allclose(updates["w"], 0.5, rtol=1e-6)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
class TestShards:
    """10. A finite check per shard lets replicas diverge."""

    @staticmethod
    def params_after_one_bad_shard(axis_name):
        mesh = sharding.auto_mesh(jax.make_mesh((8,), ("data",)))
        tx = mpjax.with_loss_scale(optax.sgd(1.0), axis_name=axis_name)

        def update(grad):
            params = jnp.ones(1)
            updates, _ = tx.update(grad, tx.init(params), params)
            return optax.apply_updates(params, updates)

        mapped = jax.shard_map(
            update, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
        grads = jnp.full(8, 2.0**15).at[5].set(jnp.inf)
        return set(jax.jit(mapped)(grads).tolist())

    def test_without_an_axis(self):
        assert self.params_after_one_bad_shard(None) == {0.0, 1.0}

    def test_mpjax(self):
        assert self.params_after_one_bad_shard("data") == {1.0}


class TestOtherLeaves:
    """11. Integer, float0 and PRNG-key leaves must not be multiplied."""

    TREE: ClassVar = {
        "int": jnp.array([2049]),
        "float0": np.zeros(1, jax.dtypes.float0),
        "key": jax.random.key(0),
    }

    @pytest.mark.parametrize("name", TREE)
    def test_jmp(self, name):
        scale = jmp.DynamicLossScale(jnp.float32(2.0))
        if name == "int":
            assert scale.scale(self.TREE["int"]).dtype == jnp.float32
            return
        with pytest.raises((TypeError, ValueError)):
            scale.scale(self.TREE[name])

    def test_mpjax(self):
        for out in (
            mpjax.DynamicLossScale(2.0).scale(self.TREE),
            mpjax.DynamicLossScale(2.0).unscale(self.TREE),
        ):
            assert all(out[name] is self.TREE[name] for name in self.TREE)

    def test_mpjax_train_step(self):
        def loss_fn(params, batch, key):
            assert batch["ids"].dtype == jnp.int32
            noise = jax.random.normal(batch["key"], (), jnp.float16)
            return params["w"] * batch["ids"][0] + 0 * noise, None

        batch = {"ids": jnp.array([2049]), "key": jax.random.key(3)}
        tx = mpjax.with_loss_scale(optax.sgd(1.0), mpjax.NoOpLossScale())
        state, _ = sgd_run(loss_fn, [batch], tx=tx, policy="float32")
        assert float(state.params["w"]) == 1 - 2049


def test_all_eleven_are_here():
    docs = [c.__doc__ for n, c in globals().items() if re.match("Test[A-Z]", n)]
    assert sorted(int(doc.split(".")[0]) for doc in docs) == list(range(1, 12))
