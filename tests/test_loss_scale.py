"""Loss scales: what they scale, what survives, what they refuse."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import jmp
import numpy as np
import pytest

import mpjax
from mpjax.loss_scale import as_loss_scale

ALL = [
    mpjax.NoOpLossScale(),
    mpjax.StaticLossScale(128.0),
    mpjax.DynamicLossScale(2.0**10, growth_interval=3, hysteresis=2, min_loss_scale=4),
]


def untouchable():
    return {
        "int": jnp.arange(3),
        "bool": jnp.array([True]),
        "float0": np.zeros(2, jax.dtypes.float0),
        "key": jax.random.key(0),
        "none": None,
    }


@pytest.mark.parametrize("scale", ALL, ids=lambda s: type(s).__name__)
def test_leaves_that_are_no_numbers_pass_through(scale):
    tree = untouchable()
    for out in (scale.scale(tree), scale.unscale(tree)):
        for name in ("int", "bool", "float0", "key", "none"):
            assert out[name] is tree[name]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float32"])
@pytest.mark.parametrize("scale", ALL, ids=lambda s: type(s).__name__)
def test_unscaling_returns_float32_and_undoes_scaling(scale, dtype):
    x = jnp.asarray([1.0, -0.5, 1.5], dtype)
    out = scale.unscale(scale.scale(x))
    assert out.dtype == jnp.float32
    assert not out.weak_type
    np.testing.assert_array_equal(out, x.astype(jnp.float32))


def test_unscaling_half_keeps_what_half_cannot_hold():
    scaled = jnp.asarray(1.0, jnp.float16)
    assert float(mpjax.StaticLossScale(2.0**20).unscale(scaled)) == 2.0**-20


def test_a_half_loss_is_scaled_in_float32():
    loss = jnp.asarray(4.0, jnp.float16)
    assert float(mpjax.DynamicLossScale(2.0**24).scale(loss)) == 2.0**26


def test_complex_and_float64_keep_their_width():
    scale = mpjax.StaticLossScale(2.0)
    assert scale.scale(jnp.ones(1, jnp.complex64)).dtype == jnp.complex64
    with jax.enable_x64(True):
        out = scale.unscale(jnp.full(1, 1 / 3, jnp.float64))
        assert out.dtype == jnp.float64
        assert float(out[0]) == (1 / 3) / 2
        weak = jnp.full(1, 1 / 3)  # weakly typed, so any float32 array would win
        assert weak.weak_type
        for each in (scale, mpjax.DynamicLossScale(2.0), mpjax.NoOpLossScale()):
            scaled = each.scale(weak)
            assert scaled.dtype == jnp.float64
            assert each.unscale(scaled).dtype == jnp.float64
            assert float(each.unscale(scaled)[0]) == 1 / 3


@pytest.mark.parametrize("scale", ALL[1:], ids=lambda s: type(s).__name__)
def test_state_is_strongly_typed(scale):
    adjusted = jax.jit(lambda s: s.adjust(jnp.array(True)))(scale)
    leaves = jax.tree.leaves(adjusted)
    assert leaves
    assert not any(leaf.weak_type for leaf in leaves)
    assert adjusted.loss_scale.dtype == jnp.float32


def test_building_one_starts_no_backend_and_rebuilding_validates_nothing():
    scale = mpjax.DynamicLossScale()
    assert isinstance(scale.loss_scale, np.ndarray)
    shapes = jax.tree.map(jnp.shape, scale)
    assert shapes.loss_scale == ()
    assert jax.tree.map(lambda _: 0, scale).loss_scale == 0


def run(scale):
    for finite in (True, False, True, False, True, True, True):
        scale = scale.adjust(jnp.array(finite))
    return scale


def journeys(scale):
    """Yields the same scale after everything that people do to a training state."""
    yield jax.tree.map(lambda x: x + 0, scale)
    yield jax.jit(lambda s: s)(scale)
    donate = jax.jit(lambda s: s, donate_argnums=0)
    yield donate(jax.tree.map(jnp.array, scale))
    yield jax.lax.scan(lambda s, _: (s, None), scale, None, length=2)[0]
    yield jax.tree.unflatten(*reversed(jax.tree.flatten(scale)))
    yield dataclasses.replace(scale)
    yield jax.vmap(lambda s, _: s, (None, 0), None)(scale, jnp.arange(2))


@pytest.mark.parametrize("scale", ALL, ids=lambda s: type(s).__name__)
def test_nothing_is_lost_on_the_way(scale):
    scale = run(scale)
    expected = run(scale)
    for other in journeys(scale):
        assert type(other) is type(scale)
        assert jax.tree.structure(other) == jax.tree.structure(scale)
        chex_like = jax.tree.map(lambda a, b: bool(a == b), other, scale)
        assert all(jax.tree.leaves(chex_like))
        again = jax.tree.map(lambda a, b: bool(a == b), run(other), expected)
        assert all(jax.tree.leaves(again))


@pytest.mark.parametrize("scale", ALL, ids=lambda s: type(s).__name__)
def test_flax_serialization(scale):
    serialization = pytest.importorskip("flax.serialization")
    scale = run(run(scale))
    target = jax.tree.map(jnp.zeros_like, scale)
    restored = serialization.from_bytes(target, serialization.to_bytes(scale))
    assert type(restored) is type(scale)
    assert jax.tree.structure(restored) == jax.tree.structure(scale)
    assert jax.tree.leaves(restored) == jax.tree.leaves(scale)


KINDS = {type(scale): scale for scale in ALL}.values()


@pytest.mark.parametrize(("saved", "target"), [*itertools.permutations(KINDS, 2)])
def test_flax_serialization_of_another_kind_is_refused(saved, target):
    serialization = pytest.importorskip("flax.serialization")
    data = serialization.to_bytes(saved)
    with pytest.raises(ValueError, match="restore into a state of the kind that was"):
        serialization.from_bytes(target, data)


@pytest.mark.parametrize("scale", ALL[1:], ids=lambda s: type(s).__name__)
@pytest.mark.filterwarnings("ignore")
def test_orbax(scale, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    scale = jax.tree.map(jnp.asarray, run(run(scale)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"scale": scale})
        checkpointer.wait_until_finished()
        target = {"scale": jax.tree.map(jnp.zeros_like, scale)}
        restored = checkpointer.restore(tmp_path / "state", target)["scale"]
    assert type(restored) is type(scale)
    assert jax.tree.structure(restored) == jax.tree.structure(scale)
    assert jax.tree.leaves(restored) == jax.tree.leaves(scale)


def test_another_static_value_does_not_recompile():
    scaled = jax.jit(lambda s, x: s.scale(x))
    for value in (1.0, 2.0, 512):
        assert float(scaled(mpjax.StaticLossScale(value), jnp.ones(()))) == value
    assert scaled._cache_size() == 1


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"loss_scale": 0.0}, "loss_scale"),
        ({"loss_scale": -2.0}, "loss_scale"),
        ({"loss_scale": float("nan")}, "loss_scale"),
        ({"loss_scale": np.ones(2)}, "loss_scale"),
        ({"loss_scale": 2.0**30}, "max_loss_scale"),
        ({"loss_scale": 0.5}, "min_loss_scale"),
        ({"growth_interval": 0}, "growth_interval"),
        ({"growth_interval": 1.5}, "growth_interval"),
        ({"growth_interval": True}, "growth_interval"),
        ({"growth_factor": 0.5}, "growth_factor"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
        ({"hysteresis": 0}, "hysteresis"),
        ({"min_loss_scale": 0.0}, "min_loss_scale"),
        ({"min_loss_scale": 8.0, "max_loss_scale": 4.0}, "min_loss_scale"),
        ({"max_loss_scale": 2.0**127}, "max_loss_scale"),
    ],
)
def test_settings_out_of_range(settings, word):
    with pytest.raises(ValueError, match=word):
        mpjax.DynamicLossScale(**settings)


def test_the_largest_scale_still_has_a_reciprocal():
    scale = mpjax.StaticLossScale(2.0**126)
    assert float(jax.jit(lambda s: s.unscale(jnp.float32(2.0**126)))(scale)) == 1.0
    with pytest.raises(ValueError, match=r"above 0, and 8.5.* at most"):
        mpjax.StaticLossScale(2.0**127)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", mpjax.NoOpLossScale()),
        ("static:128", mpjax.StaticLossScale(128)),
        ("static: 2**7", mpjax.StaticLossScale(128)),
        ("dynamic", mpjax.DynamicLossScale()),
        ("dynamic:32768", mpjax.DynamicLossScale(32768)),
        ("dynamic:2^10", mpjax.DynamicLossScale(1024)),
        (
            "dynamic:1e3,growth_interval=5,max_loss_scale=2**12",
            mpjax.DynamicLossScale(1000, growth_interval=5, max_loss_scale=4096),
        ),
        ("dynamic:hysteresis=2", mpjax.DynamicLossScale(hysteresis=2)),
    ],
)
def test_parse(text, expected):
    scale = mpjax.parse_loss_scale(text)
    assert jax.tree.structure(scale) == jax.tree.structure(expected)
    assert jax.tree.leaves(scale) == jax.tree.leaves(expected)


@pytest.mark.parametrize(
    "text",
    [
        *("", "dynamc", "none:1", "static", "static:", "static:x", "static:1,2"),
        *("dynamic:-1", "dynamic:1,interval=2", "dynamic:9**9**9", "static:10**400"),
        *(
            "dynamic:1,growth_interval=1.5",
            "static:inf",
            "dynamic:nan",
            "static:9**149",
        ),
    ],
)
def test_parse_refuses(text):
    with pytest.raises(ValueError, match=r"Expected 'none', 'static:128'"):
        mpjax.parse_loss_scale(text)


def test_jmp_objects_are_taken_without_their_faults():
    none = as_loss_scale(jmp.NoOpLossScale())
    assert isinstance(none, mpjax.NoOpLossScale)
    static = as_loss_scale(jmp.StaticLossScale(jnp.asarray(2.0**7)))
    assert float(static.loss_scale) == 128
    theirs = jmp.DynamicLossScale(
        jnp.asarray(2.0**4), period=3, factor=4, min_loss_scale=jnp.float32(2.0)
    )
    ours = as_loss_scale(theirs)
    assert (ours.growth_interval, ours.growth_factor, ours.backoff_factor) == (
        3,
        4,
        0.25,
    )
    ours = jax.jit(lambda s: run(s).adjust(jnp.array(False)))(ours)
    assert ours.min_loss_scale == 2.0


def test_any_object_with_the_protocol_is_a_loss_scale():
    class Mine:
        loss_scale = 2.0

        def scale(self, tree): ...
        def unscale(self, tree): ...
        def adjust(self, grads_finite): ...

    mine = Mine()
    assert as_loss_scale(mine) is mine
    for other in ("dynamic", 128.0, None, mpjax.DynamicLossScale):
        with pytest.raises(TypeError, match="parse_loss_scale"):
            as_loss_scale(other)


def test_scales_under_a_trace_take_traced_values():
    made = jax.jit(lambda x: mpjax.StaticLossScale(x).scale(jnp.ones(())))
    assert float(made(8)) == 8
    made = jax.jit(
        lambda x: mpjax.DynamicLossScale(x, num_finite_steps=x).adjust(x > 0)
    )
    assert int(made(jnp.int32(8)).num_finite_steps) == 9


def test_a_name_is_no_number():
    with pytest.raises(ValueError, match=r"'dynamic' must be a number; parse_loss_sc"):
        mpjax.DynamicLossScale("dynamic")  # pyright: ignore[reportArgumentType]
