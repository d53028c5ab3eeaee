"""Eight virtual CPU devices, the hypothesis profiles, and the executed notebooks."""

import gc
import os
from pathlib import Path

# Tracing makes many small objects that live long: looking for cycles among them at
# Python's default thresholds takes a part of the time of every test.
gc.set_threshold(50_000, 20, 50)

# Before JAX starts: the number of devices is fixed then.
FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
os.environ.setdefault("KERAS_BACKEND", "jax")

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "mpjax", deadline=None, max_examples=20, derandomize=True
)
hypothesis.settings.register_profile(
    "weekly", hypothesis.settings.get_profile("mpjax"), max_examples=300
)
hypothesis.settings.load_profile("mpjax")

# pytest loads these as plugins; looking for doctests it would import them as modules,
# too, all by one name.
collect_ignore_glob = ["**/conftest.py"]


@pytest.fixture(scope="session")
def executed_notebooks(tmp_path_factory) -> Path:
    """A directory with the notebooks of colab/, executed once for all workers."""
    from helpers import notebooks

    base = tmp_path_factory.getbasetemp()
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    shared = base.parent if is_worker else base
    return notebooks.execute_once(shared / "executed notebooks")
