"""Linting, formatting, types, layers, imports, and where primitives are named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mpjax._jaxpr.primitives import PRIMITIVES

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent


def run(*command):
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("lint-imports", "--no-cache"),
        pytest.param(
            ("basedpyright", "--pythonpath", sys.executable), marks=pytest.mark.slow
        ),
    ],
    ids=lambda command: command[0] + command[1][:8],
)
def test_tools_find_nothing(command):
    run(BIN / command[0], *command[1:])


def test_importing_the_library_imports_little_and_starts_no_backend():
    code = (
        "import sys, mpjax, jax\n"
        "heavy = {'flax', 'orbax', 'matplotlib', 'tyro', 'rich', 'tqdm', 'keras'}\n"
        "assert not heavy & {name.partition('.')[0] for name in sys.modules}\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "assert jax.device_count() == 3\n"
    )
    run(sys.executable, "-W", "error", "-c", code)


LATE = {"scipy.sparse", "mpjax.numerics", "mpjax.cost"}


def test_packages_are_loaded_when_first_asked_for():
    code = (
        "import sys, mpjax\n"
        f"assert not {LATE!r} & set(sys.modules)\n"
        "assert {'numerics', 'cost', 'sharding'} <= set(dir(mpjax))\n"
        "assert callable(mpjax.numerics.find_nonfinite)\n"
        "assert callable(mpjax.cost.analyze)\n"
        "assert callable(mpjax.sharding.shard_state)\n"
        "try:\n"
        "    mpjax.numeric\n"
        "except AttributeError as error:\n"
        "    assert \"Did you mean 'numerics'?\" in str(error), error\n"
        "else:\n"
        "    raise AssertionError\n"
    )
    run(sys.executable, "-c", code)


@pytest.mark.weekly
def test_importing_the_library_costs_little_more_than_jax_and_optax(monkeypatch):
    """Best of five, interleaved, in seconds of CPU; from bytecode, as installed."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    code = "import time; import {}; print(time.process_time())"
    base, ours = "jax, optax", "jax, optax, mpjax"
    seconds = {base: [], ours: []}
    for _ in range(5):
        for names, seen in seconds.items():
            seen.append(float(run(sys.executable, "-c", code.format(names))))
    assert min(seconds[ours]) - min(seconds[base]) <= 0.15, seconds


def sets_of_primitives(source):
    """Returns line and text of each literal of two or more primitives' names.

    A literal is a set, tuple, list or dict by its keys, or a string of names.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Dict):
            elements = node.keys
        elif isinstance(node, ast.Set | ast.Tuple | ast.List):
            elements = node.elts
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            elements = [ast.Constant(name) for name in node.value.split()]
        else:
            continue
        names = {getattr(element, "value", None) for element in elements}
        if len(names) > 1 and names <= PRIMITIVES.keys():
            found.append(f"{node.lineno}: {ast.unparse(node)[:60]}")
    return found


def test_facts_about_primitives_stand_in_one_table():
    """No other file of the library holds a set of JAX's primitive names."""
    own = {
        "mpjax/_jaxpr/primitives.py",
        "mpjax/cost/_hlo.py",  # names of HLO instructions, some equal
    }
    found = {
        name: literals
        for path in sorted((ROOT / "mpjax").rglob("*.py"))
        if (name := path.relative_to(ROOT).as_posix()) not in own
        and (literals := sets_of_primitives(path.read_text()))
    }
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "X = {'scan', 'while'}",
        "X = frozenset(['reduce_sum', 'cumsum'])",
        "if eqn.primitive.name in ('exp', 'log'): pass",
        "X = {'exp': 11, 'log2': 16}",
        "X = _names('reshape squeeze\\n  transpose')",
    ],
)
def test_a_set_of_primitives_is_found(source):
    assert len(sets_of_primitives(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "if eqn.primitive.name == 'scan': pass",
        "X = ['copy']",
        "X = ('name', 'path')",
        "X = {'reduce_precision': 1, 'other': 2}",
        "X = 'a sign and a name'",
    ],
)
def test_other_literals_are_no_sets_of_primitives(source):
    assert sets_of_primitives(source) == []


def test_everything_public_is_documented():
    import mpjax

    for name in mpjax.__all__:
        thing = getattr(mpjax, name)
        assert name == "PRESETS" or (thing.__doc__ and len(thing.__doc__) > 20), name
