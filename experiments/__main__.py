"""Lists the commands of this package: `python -m experiments`."""

import argparse
import shlex
from collections.abc import Sequence

from experiments.registry import COMMANDS


def main(args: Sequence[str] | None = None) -> None:
    """Prints every command with its summary, by group.

    Args:
      args: command-line arguments, of which there are none but --help; those of this
        process if None.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Lists the commands of this package; each has a --help of its own.",
    )
    _, more = parser.parse_known_args(args)
    if more:
        names = [c.module for commands in COMMANDS.values() for c in commands]
        meant = [name for name in names if name.rpartition(".")[2] == more[0]]
        hint = f"; run it as: python -m {shlex.join([*meant, *more[1:]])}"
        parser.error(f"unrecognized arguments: {' '.join(more)}{hint if meant else ''}")
    for group, commands in COMMANDS.items():
        print(f"{group}:\n")
        for command in commands:
            print(f"    python -m {command.module}\n        {command.summary}\n")


if __name__ == "__main__":
    main()
