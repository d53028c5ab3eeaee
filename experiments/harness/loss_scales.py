"""Loss scales from the text of a flag, `HistogramLossScale` included."""

import dataclasses
from typing import Any

import mpjax
from mpjax.loss_scale import parse_number
from mpjax.numerics import HistogramLossScale

SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(HistogramLossScale)  # pyright: ignore[reportArgumentType]
    if field.name not in ("loss_scale", "picked", "ceiling", "num_finite_steps")
)


def parse_loss_scale(text: str) -> Any:
    """Returns the loss scale that a flag's text stands for.

    Args:
      text: as `mpjax.parse_loss_scale` reads it; or `histogram`, `histogram:65536`, or
        with settings by name: `histogram:2**16,interval=50,dtype=bfloat16`.

    Raises:
      ValueError: if the text cannot be read, or a setting is out of range.

    >>> float(parse_loss_scale("histogram:2**10").loss_scale)
    1024.0
    """
    kind, _, rest = text.replace(" ", "").partition(":")
    expected = "'histogram', 'histogram:65536' or 'histogram:65536,interval=50'"
    if kind != "histogram":
        try:
            return mpjax.parse_loss_scale(text)
        except ValueError as error:
            raise ValueError(f"{error} Or {expected}.") from error
    try:
        return HistogramLossScale(**_settings(rest.split(",") if rest else []))
    except ValueError as error:
        raise ValueError(
            f"cannot read loss scale {text!r}: {error} Expected {expected}."
        ) from error


def _settings(parts: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if parts and "=" not in parts[0]:
        settings["loss_scale"] = parse_number(parts.pop(0))
    for part in parts:
        name, _, value = part.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"no setting {name!r}; known: {SETTINGS}.")
        settings[name] = value if name == "dtype" else parse_number(value)
    return settings
