"""Linting, formatting, types, layers, and what importing mpjax may import."""

import subprocess
import sys
from pathlib import Path

import pytest

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
        ("basedpyright", "--pythonpath", sys.executable),
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


def test_files_stay_small():
    long = {
        str(path.relative_to(ROOT)): num_lines
        for folder in ("mpjax", "experiments", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if (num_lines := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_everything_public_is_documented():
    import mpjax

    for name in mpjax.__all__:
        thing = getattr(mpjax, name)
        assert name == "PRESETS" or (thing.__doc__ and len(thing.__doc__) > 20), name
