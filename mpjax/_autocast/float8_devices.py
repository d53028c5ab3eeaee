"""Which devices multiply float8, and a warning on all others."""

import contextlib
import contextvars
import functools
import re
import warnings
from collections.abc import Iterator
from typing import Any

import jax

_is_for_this_device = contextvars.ContextVar("is_for_this_device", default=True)
# NVIDIA's compute capability of Ada (L4, RTX 40); Hopper and Blackwell have more.
_FIRST_CAPABILITY = (8, 9)
_FIRST_TPU = 7
# AMD's MI350 and RX 9000; MI300 has formats of its own.
_AMD = re.compile(r"gfx(95|12)")


@contextlib.contextmanager
def tracing_for(*, another_device: bool) -> Iterator[None]:
    """Says, while its block traces, whether the program is for JAX's default device.

    There is no warning for another.
    """
    token = _is_for_this_device.set(not another_device)
    try:
        yield
    finally:
        _is_for_this_device.reset(token)


def warn_if_emulated() -> None:
    """Warns, once per kind of device, if JAX's default device multiplies no float8."""
    if _is_for_this_device.get():
        config: Any = jax.config
        device = config.jax_default_device
        device = device if hasattr(device, "device_kind") else jax.devices()[0]
        if not multiplies_float8(
            device.platform,
            device.device_kind,
            getattr(device, "compute_capability", None),
        ):
            _warn(device.device_kind)


def multiplies_float8(
    platform: str, device_kind: str, compute_capability: str | None
) -> bool:
    """Whether a device multiplies float8 numbers, e4m3fn and e5m2, in hardware.

    Args:
      platform: "cpu", "gpu", "tpu" or another.
      device_kind: JAX's name for the device, such as "TPU v6 lite".
      compute_capability: of an NVIDIA GPU, such as "9.0"; of AMD's, such as "gfx950".

    >>> multiplies_float8("gpu", "NVIDIA H100 80GB HBM3", "9.0")
    True
    >>> multiplies_float8("gpu", "NVIDIA A100-SXM4-40GB", "8.0")
    False
    """
    if platform == "tpu":
        version = re.search(r"\d+", device_kind)
        return version is not None and int(version[0]) >= _FIRST_TPU
    capability = compute_capability or ""
    if re.fullmatch(r"\d+\.\d+", capability):
        return tuple(map(int, capability.split("."))) >= _FIRST_CAPABILITY
    return bool(_AMD.match(capability))


@functools.cache
def _warn(device_kind: str) -> None:
    warnings.warn(
        f"mixed_float8: {device_kind} does not multiply float8 numbers. It multiplies "
        "the same numbers in a wider format: the results are right, and take longer "
        "than with 'mixed_bfloat16'. Float8 needs an NVIDIA GPU of compute capability "
        "8.9 or more (L4, RTX 40, H100, B200), an AMD MI350, or a TPU v7.",
        stacklevel=2,
    )
