"""Eight virtual CPU devices for every test, and the hypothesis profiles."""

import gc
import os
import platform
from pathlib import Path

# Tracing makes many small objects that live long: looking for cycles among them at
# Python's default thresholds takes a part of the time of every test.
gc.set_threshold(50_000, 20, 50)

# Before JAX starts: the number of devices is fixed then.
FLAG = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
os.environ.setdefault("KERAS_BACKEND", "jax")

# More than half of the tests' time is XLA's. What it compiled in another process, or in
# an earlier run on this machine, is found here; the folder may be deleted.
COMPILED = Path(__file__).parents[1] / ".cache" / "compiled" / platform.node()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis

hypothesis.settings.register_profile(
    "mpjax", deadline=None, max_examples=20, derandomize=True
)
hypothesis.settings.register_profile(
    "weekly", hypothesis.settings.get_profile("mpjax"), max_examples=300
)
hypothesis.settings.load_profile("mpjax")
