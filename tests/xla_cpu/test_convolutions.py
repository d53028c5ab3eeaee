"""Convolutions are written in the form that XLA:CPU runs fast in loops too."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.tools import thinned
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mpjax
from mpjax._jaxpr.core import check_jaxpr, open_jaxpr, walk
from mpjax._jaxpr.passes import apply_passes
from mpjax._xla_cpu.convolutions import put_channels_last

RNG = np.random.default_rng(0)
LAST = ("NHWC", "HWIO", "NHWC")
FIRST = ("NCHW", "OIHW", "NCHW")


def conv(x, w, form=LAST, strides=(1, 1), padding="SAME", **kwargs):
    return lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=form, **kwargs
    )


def arrays(*shapes):
    return [RNG.normal(size=shape).astype(np.float32) for shape in shapes]


IMAGE, KERNEL = (2, 6, 5, 4), (3, 2, 4, 6)
IMAGE_FIRST, KERNEL_FIRST = (2, 4, 6, 5), (6, 4, 3, 2)
CASES = {
    "channels last": (conv, IMAGE, KERNEL),
    "channels first": (partial(conv, form=FIRST), IMAGE_FIRST, KERNEL_FIRST),
    "mixed": (partial(conv, form=("NCHW", "HWIO", "HWNC")), IMAGE_FIRST, KERNEL),
    "strided": (partial(conv, strides=(2, 3)), IMAGE, KERNEL),
    "dilated": (partial(conv, rhs_dilation=(2, 1)), IMAGE, KERNEL),
    "padded": (partial(conv, padding=((2, 0), (-1, 3))), IMAGE, KERNEL),
    "transposed": (
        partial(lax.conv_transpose, strides=(2, 2), padding="SAME"),
        IMAGE,
        KERNEL,
    ),
    "grouped": (
        partial(conv, form=FIRST, feature_group_count=2),
        IMAGE_FIRST,
        (6, 2, 3, 2),
    ),
    "grouped by batch": (partial(conv, batch_group_count=2), IMAGE, KERNEL),
    "1d": (
        partial(conv, form=("NCH", "OIH", "NCH"), strides=(2,)),
        (2, 4, 9),
        (6, 4, 3),
    ),
    "3d": (
        partial(conv, form=("NCDHW", "OIDHW", "NCDHW"), strides=(1, 1, 2)),
        (2, 3, 4, 5, 4),
        (2, 3, 3, 2, 2),
    ),
    "vmap": (jax.vmap(conv), (3, *IMAGE), (3, *KERNEL)),
}


def forms(closed):
    """Returns the dimension numbers of every convolution, at any depth."""
    return [
        eqn.params["dimension_numbers"]
        for eqn, _, _ in walk(closed)
        if eqn.primitive.name == "conv_general_dilated"
    ]


def written(fn):
    return apply_passes(fn, put_channels_last)


def is_plain(numbers):
    last = len(numbers.lhs_spec) - 1
    image = (0, last, *range(1, last))
    kernel = (last, last - 1, *range(last - 1))
    return numbers == lax.ConvDimensionNumbers(image, kernel, image)


def value_and_grads(fn):
    return jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(fn(x, w))), (0, 1))


@pytest.mark.parametrize("name", thinned(CASES, 4))
def test_it_is_the_same_in_float64(name):
    fn, *shapes = CASES[name]
    fn = value_and_grads(fn)
    with jax.enable_x64(True):
        args = [x.astype(np.float64) for x in arrays(*shapes)]
        plain = written(fn)
        closed = jax.make_jaxpr(plain)(*args)
        check_jaxpr(open_jaxpr(closed))
        assert not all(map(is_plain, forms(jax.make_jaxpr(fn)(*args))))
        assert len(forms(closed)) == 3
        assert all(map(is_plain, forms(closed)))
        (value, grads), (true_value, truth) = plain(*args), fn(*args)
        np.testing.assert_allclose(value, true_value, rtol=1e-12)
        for grad, true in zip(grads, truth, strict=True):
            np.testing.assert_allclose(grad, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", thinned(["mixed_bfloat16", "mixed_float16"]))
@pytest.mark.parametrize("name", thinned(CASES, 2))
def test_half_convolutions_of_autocast_have_that_form(name, policy):
    fn, *shapes = CASES[name]
    args = arrays(*shapes)
    closed = jax.make_jaxpr(mpjax.autocast(value_and_grads(fn), policy))(*args)
    assert len(forms(closed)) == 3
    assert all(map(is_plain, forms(closed)))


def test_convolutions_in_loops_and_jits_are_found():
    def loss(w, xs):
        step = lambda total, x: (total + jax.jit(conv)(x, w).sum(), None)
        return lax.scan(step, 0.0, xs)[0]

    xs, w = arrays((3, *IMAGE), KERNEL)
    grad = jax.grad(loss)
    assert not all(map(is_plain, forms(jax.make_jaxpr(grad)(w, xs))))
    assert all(map(is_plain, forms(jax.make_jaxpr(written(grad))(w, xs))))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"policy": "float32"},
        {"policy": "mixed_bfloat16"},
        {"policy": "mixed_float16", "autocast": False},
    ],
)
def test_microbatches_are_compiled_in_that_form(kwargs):
    """Otherwise a CPU takes many times as long for them."""

    def loss_fn(params, batch, key):
        x = batch["x"]
        for w in params:
            x = jax.nn.relu(conv(x, w))
        return jnp.mean(x.astype(jnp.float32) ** 2), None

    params = arrays((3, 3, 4, 8), (3, 3, 8, 8))
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params=params, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, num_microbatches=2, **kwargs)
    compiled = step.lower(state, {"x": jnp.ones((4, 8, 8, 4))}).compile()
    labels = re.findall(r"dim_labels=(\S+?),? ", compiled.as_text())
    assert len(labels) == 5  # Two forward, two of kernels, one of the layer between.
    if jax.default_backend() == "cpu":
        assert set(labels) == {"b01f_01io->b01f"}


@pytest.mark.parametrize(
    ("wrap", "policy"),
    [
        (lambda net: mpjax.autocast(net, "mixed_bfloat16"), "float32"),
        (mpjax.full_precision, "mixed_bfloat16"),
    ],
    ids=["autocast inside", "full_precision inside"],
)
def test_so_are_those_of_a_part_with_its_own_precision(wrap, policy):
    """JAX derives its gradients afterwards, in whatever form they have."""
    net = wrap(lambda params, x: conv(jnp.tanh(conv(x, params[0])), params[1]))
    loss_fn = lambda params, batch, key: (jnp.mean(net(params, batch) ** 2), None)
    params = arrays((3, 3, 4, 8), (3, 3, 8, 8))
    tx = mpjax.with_loss_scale(optax.sgd(0.1))
    state = mpjax.TrainState.create(params=params, tx=tx)
    step = mpjax.make_train_step(loss_fn, tx, num_microbatches=2, policy=policy)
    found = forms(jax.make_jaxpr(step)(state, jnp.ones((4, 8, 8, 4))))
    assert len(found) == 5
    assert all(map(is_plain, found))


def test_a_pytree_comes_back_as_it_was():
    x, w = arrays(IMAGE, KERNEL)
    fn = lambda tree: {"out": (conv(tree["x"], tree["w"]), None), "w": tree["w"]}
    out = written(fn)({"x": x, "w": w})
    assert jax.tree.structure(out) == jax.tree.structure(fn({"x": x, "w": w}))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_several_devices(axis_type):
    """Arrays whose type says that they are split are left to JAX."""
    mesh = jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])
    x, w = arrays(IMAGE_FIRST, KERNEL_FIRST)
    fn = partial(conv, form=FIRST)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, P("data")))
        out = jax.jit(written(fn))(split, w)
        closed = jax.make_jaxpr(written(fn))(split, w)
    assert is_plain(*forms(closed)) == (axis_type == AxisType.Auto)
    np.testing.assert_allclose(out, fn(x, w), rtol=1e-5, atol=1e-5)


def test_sharded_operands_are_left_alone():
    """Their split channels keep the axis of the form that the user wrote."""
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Explicit,), devices=jax.devices()[:2])
    x, w = arrays((4, 4, 5, 5), (6, 4, 3, 3))
    fn = partial(conv, form=FIRST, out_sharding=P(None, "d"))
    with jax.set_mesh(mesh):
        for written_anew in (written(fn), mpjax.autocast(fn, "mixed_float16")):
            out = jax.jit(written_anew)(x, w)
            np.testing.assert_allclose(out, conv(x, w, form=FIRST), rtol=1e-2, atol=0.1)
            assert out.sharding.spec[1] == "d"


def test_inside_shard_map():
    auto = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), auto, devices=jax.devices()[:2])
    x, w = arrays(IMAGE_FIRST, KERNEL_FIRST)
    fn = value_and_grads(partial(conv, form=FIRST))

    def mean(x, w):
        w = lax.pcast(w, "data", to="varying")
        return lax.pmean(written(fn)(x, w)[1][1], "data")

    split = jax.jit(
        jax.shard_map(mean, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    )
    np.testing.assert_allclose(split(x, w) * 2, fn(x, w)[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("platform", "num_barriers"), [("cpu", 2), ("cuda", 0)])
def test_what_is_transposed_is_stored_before_on_a_cpu_alone(platform, num_barriers):
    x, w = arrays(IMAGE, KERNEL)
    grad = jax.grad(lambda w, x: jnp.sum(jnp.tanh(conv(jnp.tanh(x), w))))
    traced = jax.jit(mpjax.autocast(grad, "mixed_bfloat16")).trace(w, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == num_barriers


def test_convolutions_channels_first_have_derivatives_of_derivatives():
    x, w = arrays(IMAGE_FIRST, KERNEL_FIRST)
    loss = lambda w, x: jnp.sum(jnp.tanh(conv(x, w, form=FIRST)))
    half = mpjax.autocast(loss, "mixed_bfloat16")
    hessian_vector = lambda fn: jax.jvp(lambda w: jax.grad(fn)(w, x), (w,), (w,))[1]
    found, true = hessian_vector(half), hessian_vector(loss)
    assert np.linalg.norm(found - true) < 0.05 * np.linalg.norm(true)
