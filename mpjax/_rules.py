"""Ordered rules by regular expression: what policies and layouts by path share."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class PathRules(Generic[Value]):
    """Ordered pairs of a regular expression and a value; the first match wins."""

    def __init__(
        self,
        rules: Sequence[tuple[str, Any]],
        to_value: Callable[[Any], Value],
        *,
        kind: str,
    ):
        """Compiles the rules.

        Args:
          rules: pairs of a regular expression and what `to_value` takes.
          to_value: returns the value of a rule, or raises an error.
          kind: what the second part of a pair is, for messages.

        Raises:
          ValueError: for a pattern that is not a regular expression.
          TypeError: for rules that are not pairs.
        """
        self._rules: list[tuple[re.Pattern[str], Value]] = []
        self._used: set[str] = set()
        if isinstance(rules, (str, Mapping)) or any(len(rule) != 2 for rule in rules):
            raise TypeError(
                f"rules must be a list of pairs, [(pattern, {kind}), ...], got "
                f"{rules!r}."
            )
        for pattern, value in rules:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"rule pattern {pattern!r} is not a regular expression: {error}. "
                    "Escape special characters, or use '.*' for 'anything'."
                ) from error
            self._rules.append((compiled, to_value(value)))

    def _find(self, path: str) -> Value | None:
        """Returns the value of the first rule found in `path`, which is now used."""
        for pattern, value in self._rules:
            if pattern.search(path):
                self._used.add(pattern.pattern)
                return value
        return None

    def unused_rules(self) -> tuple[str, ...]:
        """Returns the patterns that have matched nothing yet, in their order."""
        patterns = (pattern.pattern for pattern, _ in self._rules)
        return tuple(pattern for pattern in patterns if pattern not in self._used)
