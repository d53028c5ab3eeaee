"""The --attention flag: what computes the attention of transformers in half."""

from collections.abc import Callable

import jax

from experiments.benchmarks.workloads import Workload
from experiments.configs.attention import AUTO, CUDNN, XLA
from experiments.harness.errors import ConfigError
from mpjax import cost

MIN_COMPUTE_CAPABILITY = 8
# Names of cuDNN's attention in a jaxpr, and in compiled code.
_KERNELS = ("dot_product_attention_fwd_wrapper", "__cudnn$fmha")


def choose_attention(value: str, device: str | None = None) -> str:
    """Returns "xla" or "cudnn".

    Args:
      value: as --attention gives it; "auto" is "cudnn" where the device supports it.
      device: name of a device, as `mpjax.cost.analyze` takes it; None for JAX's default
        device.

    Raises:
      ConfigError: for "cudnn" on a device that does not support it.
    """
    is_supported = _supports_cudnn(device)
    if value == CUDNN and not is_supported:
        raise ConfigError(
            "--attention cudnn needs an NVIDIA GPU of compute capability "
            f"{MIN_COMPUTE_CAPABILITY} or later, and {cost.get_device(device).name} is "
            "none. Use --attention auto or xla."
        )
    return value if value != AUTO else CUDNN if is_supported else XLA


def with_attention(workload: Workload, attention: str) -> Workload:
    """Returns a workload with the attention, or as it is if it has none to choose.

    Args:
      workload: the model.
      attention: "xla" or "cudnn".
    """
    if attention != CUDNN or workload.with_cudnn is None:
        return workload
    return workload.with_cudnn()


def attention_in(workload: Workload, program: Callable[[], str]) -> str | None:
    """Returns the attention of a step: "xla", "cudnn" or, without a choice, None.

    Args:
      workload: the model that the step trains.
      program: returns the text of the step's jaxpr, or of the compiled step. It is
        called only if the model can have cuDNN's attention.
    """
    if workload.attention != CUDNN:
        return workload.attention
    text = program()
    return CUDNN if any(name in text for name in _KERNELS) else XLA


def _supports_cudnn(device: str | None) -> bool:
    """Returns whether cuDNN's attention runs on a device, named as for `analyze`."""
    if device is not None:
        target = cost.get_device(device).target or {}
        major = target.get("cuda_compute_capability", {}).get("major", 0)
    else:
        present = jax.devices()[0]
        # A GPU of AMD has a compute capability too, such as "gfx942".
        is_nvidia = "cuda" in present.client.platform_version
        major = int(present.compute_capability.split(".")[0]) if is_nvidia else 0
    return major >= MIN_COMPUTE_CAPABILITY
