"""The kind of each primitive for one `autocast`: the table's, or the user's own."""

from collections.abc import Collection

from mpjax._jaxpr.primitives import PRIMITIVES, Kind

CONTAINERS = (
    Kind.CALL,
    Kind.CALL_AS_TRACED,
    Kind.COND,
    Kind.LOOP,
    Kind.CUSTOM,
)


def choose_kinds(low: Collection[str], high: Collection[str]) -> dict[str, Kind]:
    """Returns the kind of each primitive by name.

    Args:
      low: names of primitives to run in half precision.
      high: names of primitives to run in float32.

    Raises:
      TypeError: if a list is a string.
      ValueError: for a name in both lists, or a call or loop in `low`.
    """
    for argument, names in (("low", low), ("high", high)):
        if isinstance(names, str):
            raise TypeError(
                f"{argument}={names!r} must be a list of primitives' names: "
                f"[{names!r}]."
            )
    both = sorted(set(low) & set(high))
    if both:
        raise ValueError(
            f"{', '.join(both)}: in both low= and high=; drop it from one."
        )
    kinds = {name: facts.kind for name, facts in PRIMITIVES.items()}
    containers = {name for name, kind in kinds.items() if kind in CONTAINERS}
    calls = sorted(containers & set(low))
    if calls:
        raise ValueError(
            f"low={calls}: a call or loop has no dtype of its own; name the primitives "
            "inside it."
        )
    kinds |= dict.fromkeys(low, Kind.HALF)
    # A call that stays in float32 is left alone, with everything inside it.
    for name in high:
        kinds[name] = Kind.OPAQUE if name in containers else Kind.FLOAT32
    return kinds
