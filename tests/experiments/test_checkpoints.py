"""The checksum of a checkpoint's content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness import checkpoints


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "uint8", "int32"])
def test_a_digest_finds_what_is_changed(dtype):
    """Values with few bits, moved or exchanged, too; however they lie on devices."""
    x = jnp.concatenate([jnp.ones(65536), jnp.full(65536, 2)]).astype(dtype)
    others = {
        "zeros": jnp.zeros_like(x),
        "a block exchanged": jnp.roll(x, 65536),
        "moved": jnp.roll(x, 512),
        "one zeroed": x.at[70000].set(0),
        "a block zeroed": x.at[512:1024].set(0),
        "another shape": x.reshape(2, -1),
    }
    digest = lambda value: checkpoints._digest({"w": value}, {"position": 1})
    own = digest(x)
    for name, other in others.items():
        assert digest(other) != own, name
    assert digest(np.asarray(x)) == own
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert digest(jax.device_put(x, spread)) == own


def test_a_digest_takes_every_array():
    arrays = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.float32(2),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 2j], np.complex64),
        "wide": np.arange(3.0),
        "float8": jnp.ones(3, jnp.float8_e4m3fn),
    }
    own = checkpoints._digest(arrays, None)
    for name, other in {"bool": [True, True], "complex": [1 + 3j]}.items():
        changed = {**arrays, name: np.array(other, arrays[name].dtype)}
        assert checkpoints._digest(changed, None) != own
    wide = arrays["wide"] + [0, 0, 1e-12]
    assert checkpoints._digest({**arrays, "wide": wide}, None) != own
    with jax.enable_x64(True):
        on_device = {**arrays, "wide": jnp.arange(3.0)}
        assert on_device["wide"].dtype == np.float64
        assert checkpoints._digest(on_device, None) == own
