"""Lists the experiments: `python -m experiments`."""

import ast
from pathlib import Path


def main() -> None:
    """Prints the first line of each module here that can be run, and its command."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.stem != "__main__" and "cli.run(" in text:
            doc = ast.get_docstring(ast.parse(text)) or ""
            print(
                f"{doc.partition(chr(10))[0]}\n    python -m experiments.{path.stem}\n"
            )


if __name__ == "__main__":
    main()
