"""Lists the commands of this package: `python -m experiments`."""

import argparse
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
    parser.parse_args(args)
    for group, commands in COMMANDS.items():
        print(f"{group}:\n")
        for command in commands:
            print(f"    python -m {command.module}\n        {command.summary}\n")


if __name__ == "__main__":
    main()
