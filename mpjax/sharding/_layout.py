"""Layouts of a state on a mesh: over `fsdp`, or by rules on a parameter's path."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mpjax._rules import PathRules
from mpjax._tree import path_name
from mpjax.sharding._mesh import auto_mesh

PARAM_AXIS = "fsdp"
"""Axis of a mesh over which parameters and the optimizer's state are split, too."""


class LayoutRules(PathRules[PartitionSpec]):
    """Layouts by a parameter's path: ordered rules, the first match wins.

    A rule is a regular expression and a `PartitionSpec`. The expression is searched
    (`re.search`) in the path of a parameter, `params/up/w`, as by `PolicyRules`; the
    spec names, for each axis of the array, the axes of the mesh that split it. It
    replaces the built-in layout, so it says `fsdp` too where that is meant. What no
    rule matches is laid out as without rules.

    Columns of one matrix and rows of the next over `tensor`, all split over `fsdp`:

    >>> from jax.sharding import PartitionSpec as P
    >>> layout = LayoutRules(
    ...     [("up/w", P("fsdp", "tensor")), ("down/w", P("tensor", "fsdp"))]
    ... )
    >>> layout.spec_for("params/up/w") == P("fsdp", "tensor")
    True
    >>> layout.spec_for("params/norm/scale") is None
    True
    >>> layout.unused_rules()
    ('down/w',)
    """

    def __init__(self, rules: Sequence[tuple[str, PartitionSpec]]):
        """Compiles the rules.

        Args:
          rules: pairs of a regular expression and a `PartitionSpec`.

        Raises:
          ValueError: for a pattern that is not a regular expression.
          TypeError: for rules that are not pairs, or another spec.
        """
        super().__init__(rules, _refuse_other_than_spec, kind="PartitionSpec")

    def spec_for(self, path: str) -> PartitionSpec | None:
        """Returns the spec of the first rule found in `path`, or None."""
        return self._find(path)

    def __repr__(self) -> str:
        rules = [(pattern.pattern, spec) for pattern, spec in self._rules]
        return f"LayoutRules({rules})"


def state_sharding(tree: Any, mesh: Mesh, *, layout: LayoutRules | None = None) -> Any:
    """Returns the shardings of a train state, or of any tree of parameters.

    An array is split over `fsdp` along the longest of its axes that the number of
    devices divides; small and odd-shaped arrays are replicated. A parameter that a rule
    matches has the layout of that rule instead.

    Optimizer state, master copies and averages follow their parameter: an array belongs
    to the parameter whose path its own path ends with (`opt_state/.../mu/up/w` to
    `up/w`, the longest if several do) and whose shape it has. Arrays of other shapes,
    such as Adafactor's rows and columns, have the built-in layout.

    Args:
      tree: arrays or shapes: a whole `TrainState`, or parameters.
      mesh: the devices.
      layout: rules for the parameters; None for the built-in layout.

    Returns:
      A `NamedSharding` per leaf, in a tree like `tree`.

    Raises:
      ValueError: if the spec of a rule names an axis that the mesh has not, or one
        twice, has more entries than the parameter has axes, or splits an axis into
        parts that are not equal.
    """
    mesh = auto_mesh(mesh)
    by_rule = _shardings_by_rule(getattr(tree, "params", tree), mesh, layout)

    def leaf_sharding(path, x):
        shape = getattr(x, "shape", ())
        for start in range(len(path) + 1):
            found = by_rule.get(path[start:])
            if found is not None and found[0] == shape:
                return found[1] or _built_in(shape, mesh)
        return _built_in(shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def check_placement(
    state: Any, mesh: Mesh, *, layout: LayoutRules | None = None
) -> None:
    """Raises ValueError if an array of a state is placed otherwise than laid out.

    Arrays that are committed to no device, as before `shard_state`, pass.

    Args:
      state: the state.
      mesh: the devices of the step.
      layout: the rules of the step.
    """
    expected = jax.tree.leaves(state_sharding(state, mesh, layout=layout))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), sharding in zip(leaves, expected, strict=True):
        placed = getattr(x, "sharding", None)
        if placed is None or not getattr(x, "committed", True):
            continue
        if not placed.is_equivalent_to(sharding, x.ndim):
            raise ValueError(
                f"the step keeps {path_name(path)} as {sharding.spec} on the mesh "
                f"{dict(mesh.shape)}, but it is placed as {_text(placed)}: place the "
                "state with mpjax.sharding.shard_state(state, mesh, layout=layout), "
                "mesh and layout being those of make_train_step."
            )


def _shardings_by_rule(params: Any, mesh: Mesh, layout: LayoutRules | None) -> Any:
    """Returns shape and sharding of every parameter by its key path.

    The sharding is None where no rule matches.
    """
    found = {}
    if layout is None:
        return found
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        name, shape = f"params/{path_name(path)}", getattr(x, "shape", ())
        spec = layout.spec_for(name)
        sharding = None
        if spec is not None:
            _check_spec(name, shape, spec, mesh)
            sharding = NamedSharding(mesh, spec)
        found[path] = shape, sharding
    return found


def _built_in(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    size = mesh.shape.get(PARAM_AXIS, 1)
    axes = [axis for axis, n in enumerate(shape) if n % size == 0]
    if size == 1 or not axes or math.prod(shape) < 2 * size:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: shape[axis])
    spec: list[str | None] = [None] * len(shape)
    spec[longest] = PARAM_AXIS
    return NamedSharding(mesh, PartitionSpec(*spec))


def _check_spec(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
    """Raises ValueError if a rule's spec does not fit its parameter."""
    entries = [_axes_of(entry) for entry in spec]
    axes = [axis for entry in entries for axis in entry]
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        raise ValueError(
            f"{name}: the layout's {spec} names the axis {unknown[0]!r}, but the mesh "
            f"has {', '.join(map(repr, mesh.axis_names))}: name one of them, or make a "
            f"mesh with {unknown[0]!r}, of size 1 if need be."
        )
    twice = [axis for axis in axes if axes.count(axis) > 1]
    if twice:
        raise ValueError(
            f"{name}: the layout's {spec} names the axis {twice[0]!r} twice: name "
            "it once."
        )
    if len(entries) > len(shape):
        raise ValueError(
            f"{name}: the layout's {spec} has {len(entries)} entries, but the array "
            f"has {len(shape)} axes, shape {shape}: give at most one entry per axis, "
            "or match fewer parameters by the rule."
        )
    for axis, (n, entry) in enumerate(zip(shape, entries, strict=False)):
        num = math.prod(mesh.shape[name] for name in entry)
        if n % num:
            raise ValueError(
                f"{name}: the layout's {spec} splits axis {axis} over {num} devices, "
                f"but shape {shape} has {n} there: split an axis that {num} divides, "
                "or make the mesh smaller there."
            )


def _axes_of(entry: Any) -> tuple[Any, ...]:
    """Returns the mesh axes that one entry of a `PartitionSpec` names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _refuse_other_than_spec(spec: Any) -> PartitionSpec:
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            "a layout rule gives a jax.sharding.PartitionSpec, such as "
            f"PartitionSpec('fsdp', 'tensor'), got {spec!r}."
        )
    return spec


def _text(sharding: Any) -> str:
    if isinstance(sharding, NamedSharding):
        return f"{sharding.spec} on the mesh {dict(sharding.mesh.shape)}"
    return str(sharding)
