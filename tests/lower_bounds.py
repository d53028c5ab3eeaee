"""Prints the oldest versions that pyproject.toml admits, as pip constraints.

python tests/lower_bounds.py > constraints.txt
pip install -e ".[test]" --constraint constraints.txt && pytest
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"


def constraints() -> list[str]:
    """Returns `name==version` for every requirement with a lower bound."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    requirements = project["dependencies"] + [
        line for extra in project["optional-dependencies"].values() for line in extra
    ]
    bounds = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", line) for line in requirements)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


if __name__ == "__main__":
    print("\n".join(constraints()))
