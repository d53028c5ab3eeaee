"""Which half precision a device computes in, and which it only emulates."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

BFLOAT16_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16"})
FIRST_JAX_WITH_BFLOAT16 = (0, 12)


class Hardware(NamedTuple):
    """What decides how fast half precision is.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      cpu_flags: instructions of the CPU, as Linux names them; empty if unknown.
      compute_capability: of an NVIDIA GPU, such as "7.5"; another maker's, such as
        "gfx942", says nothing here.
      jax_version: of the JAX that compiles.
      has_float8: whether it multiplies float8 numbers.
    """

    platform: str
    cpu_flags: Collection[str] = ()
    compute_capability: str | None = None
    jax_version: tuple[int, ...] = FIRST_JAX_WITH_BFLOAT16
    has_float8: bool = False


def emulation_note(hardware: Hardware, dtypes: Mapping[str, str]) -> str | None:
    """Says which policies cannot be expected to be faster than float32, and why.

    Args:
      hardware: what trains.
      dtypes: name of the dtype that each policy multiplies in, by policy.

    Returns:
      A sentence; None if every half policy computes in what the hardware has.

    >>> emulation_note(Hardware("tpu"), {"mixed_float16": "float16"})
    'mixed_float16: a TPU emulates float16; it computes in bfloat16.'
    """
    emulated, reason = _emulated(hardware)
    policies = [policy for policy, dtype in dtypes.items() if dtype in emulated]
    return f"{', '.join(policies)}: {reason}." if policies else None


def float8_note(hardware: Hardware, dtypes: Mapping[str, str]) -> str | None:
    """Says which policies multiply in float8, if the hardware does not.

    Args:
      hardware: what trains.
      dtypes: name of the dtype that each policy multiplies in, by policy.

    Returns:
      A sentence; None if there is no such policy, or if the hardware has float8.

    >>> note = float8_note(Hardware("cpu"), {"mixed_float8": "float8"})
    >>> note.partition(",")[0]
    'mixed_float8: this CPU emulates float8'
    """
    policies = [policy for policy, dtype in dtypes.items() if dtype == "float8"]
    if hardware.has_float8 or not policies:
        return None
    return (
        f"{', '.join(policies)}: this {hardware.platform.upper()} emulates float8, so "
        "expect it to be slower than mixed_bfloat16; the numbers are those of float8."
    )


def _emulated(hardware: Hardware) -> tuple[tuple[str, ...], str]:
    """Returns the dtypes that are emulated, and what to say of it."""
    both = ("float16", "bfloat16")
    if hardware.platform == "cpu":
        return _emulated_by_cpu(hardware)
    if hardware.platform == "tpu":
        return ("float16",), "a TPU emulates float16; it computes in bfloat16"
    major = (hardware.compute_capability or "").partition(".")[0]
    if not major.isdecimal() or int(major) >= 8:
        return (), ""
    gpu = f"this GPU (compute capability {hardware.compute_capability})"
    if int(major) == 7:
        return ("bfloat16",), (
            f"{gpu} emulates bfloat16, so expect no speed-up over float32; --policy "
            "mixed_float16 is the half that pays here"
        )
    return both, f"{gpu} has no Tensor Cores, so expect little speed-up over float32"


def _emulated_by_cpu(hardware: Hardware) -> tuple[tuple[str, ...], str]:
    both = ("float16", "bfloat16")
    if not hardware.cpu_flags:
        return ("float16",), (
            "XLA emulates float16 on CPUs, so expect no speed-up over float32"
        )
    if not BFLOAT16_INSTRUCTIONS & set(hardware.cpu_flags):
        return both, (
            "this CPU emulates float16 and bfloat16, so expect no speed-up over "
            "float32 from either"
        )
    if hardware.jax_version < FIRST_JAX_WITH_BFLOAT16:
        version = ".".join(map(str, hardware.jax_version))
        return both, (
            f"jax {version} emulates float16 and bfloat16 on CPUs, so expect no "
            "speed-up over float32; jax 0.12 or later computes in bfloat16 on this CPU"
        )
    return ("float16",), (
        "this CPU emulates float16, so expect no speed-up over float32; --policy "
        "mixed_bfloat16 is the half that pays here"
    )
