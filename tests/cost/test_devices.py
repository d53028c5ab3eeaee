"""The data of devices, and code for GPUs that the machine does not have."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mpjax import cost
from mpjax.cost import _compile

HALF_ADDED = (jnp.add, *[jax.ShapeDtypeStruct((8,), jnp.bfloat16)] * 2)


def test_every_data_file_is_complete():
    assert cost.device_names() == ["a100", "b200", "h100", "h200", "v100"]
    for name in cost.device_names():
        device = cost.get_device(name)
        peak = device.peak_flops_per_s
        assert peak["float64"] < peak["float32"] < peak["float16"]
        assert 10**10 < device.memory_bytes < 10**12
        assert 5e11 < device.bandwidth_bytes_per_s < 1e13
        # Two FLOPs per unit and cycle give the peak of float32.
        target = device.target
        cycles = target["core_count"] * target["fpus_per_core"] * 2e9
        assert peak["float32"] == pytest.approx(
            cycles * target["clock_rate_ghz"], rel=0.05
        )
        text = (Path(_compile.__file__).parent / "devices" / f"{name}.toml").read_text()
        assert text.count("source = ") == 3


def test_bfloat16_on_a_v100_runs_at_the_peak_of_float32():
    v100 = cost.get_device("V100")
    assert v100.matmul_flops_per_s("bfloat16", "default") == 15.7e12
    assert v100.matmul_flops_per_s("float32", "default") == 15.7e12
    assert v100.matmul_flops_per_s("float16", "default") == 125e12
    assert v100.matmul_flops_per_s("float8_e4m3fn", "default") == 125e12
    h100 = cost.get_device("h100")
    assert h100.matmul_flops_per_s("float8_e4m3fn", "default") == 1.979e15
    assert h100.matmul_flops_per_s("float32", "highest") == 66.9e12


def test_the_present_device_is_the_default():
    assert cost.get_device(None).device_kind == jax.devices()[0].device_kind
    assert cost.get_device(None).target is None


def test_an_unknown_device_is_named_with_those_known():
    with pytest.raises(ValueError, match=r"'h1000'; known are a100, b200, h100, h200"):
        cost.analyze(*HALF_ADDED, device="h1000")


def test_without_the_plugin_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_compile, "_PLUGINS", ("no_such_plugin",))
    with pytest.raises(
        cost.MissingPluginError, match=r'pip install "jax\[cuda13\]"'
    ) as error:
        cost.analyze(*HALF_ADDED, device="h100")
    assert isinstance(error.value, RuntimeError)


KEEPS_GOING = """
import jax, jax.numpy as jnp
jax.config.update("jax_platforms", "cpu")
assert jnp.ones(3).sum() == 3
from mpjax import cost
x = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
for name in ("a100", "h100", "h200", "b200"):
    report = cost.analyze(jnp.matmul, x, x, device=name)
    assert report.moved_bytes == 3 * 2 * 8192**2, report
    assert report.bound == "compute"
try:
    cost.analyze(jnp.matmul, x, x, device="v100")
except RuntimeError as error:
    assert "cuda12" in str(error), error
assert jnp.ones(3).sum() == 3
"""


@pytest.mark.h100
def test_a_process_that_computes_on_a_cpu_can_compile_for_gpus():
    done = subprocess.run(
        [sys.executable, "-c", KEEPS_GOING],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
