"""The notebooks of colab/: their form, their install cell, and what they show."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
import venv

import nbformat
import pytest
from helpers import notebooks
from helpers.cli_runs import ROOT

import mpjax

INSTALL, PARAMETERS = "install", "parameters"
FROM_EXPERIMENTS = ("2_keras_guide", "4_mandarin_speech", "6_four_precisions")
BADGE = re.compile(
    r"\[!\[Open in Colab\]\(https://colab\.research\.google\.com/assets/colab-badge\.svg\)\]"
    r"\(https://colab\.research\.google\.com/(?:github/[\w.-]+/[\w.-]+/blob/main/colab/"
    r"(?P<file>\w+\.ipynb))?\)"
)
REPOSITORY = re.compile(r'^REPOSITORY = ".*"  # set by docs/repository\.py$', re.M)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(params=notebooks.NAMES)
def name(request):
    return request.param


@pytest.fixture
def notebook(name):
    return notebooks.read(notebooks.COLAB / f"{name}.ipynb")


def code_of(notebook):
    return "\n".join(c.source for c in notebook.cells if c.cell_type == "code")


def prose_of(notebook):
    return "\n\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")


# -- form --


def test_there_are_six_and_the_tests_execute_each():
    assert [name[0] for name in notebooks.NAMES] == list("123456")
    assert set(notebooks.PARAMETERS) == set(notebooks.NAMES)


def test_it_is_valid_and_holds_nothing_of_a_run(name, notebook):
    nbformat.validate(notebook)
    raw = json.loads((notebooks.COLAB / f"{name}.ipynb").read_text())
    # Format 4.4 has no identifiers of cells, which editors would change.
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 4)
    for cell in raw["cells"]:
        assert "id" not in cell
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_begins_with_title_badge_and_install_cell(name, notebook):
    title, install, parameters, *_ = notebook.cells
    heading, badge, upload = title.source.split("\n\n")[:3]
    assert heading.startswith("# ")
    found = BADGE.fullmatch(badge)
    assert found
    assert found["file"] in (None, f"{name}.ipynb")
    assert upload.startswith("Upload this notebook there")
    assert install.metadata.tags[0] == INSTALL
    assert parameters.metadata.tags == [PARAMETERS]
    for tag in (INSTALL, PARAMETERS):
        assert len(notebooks.tagged(notebook, tag)) == 1


def test_the_install_cells_are_equal():
    cells = {
        notebooks.read(notebooks.COLAB / f"{name}.ipynb").cells[1].source
        for name in notebooks.NAMES
    }
    assert len(cells) == 1
    assert REPOSITORY.search(cells.pop())


def test_every_setting_is_explained_and_used(name, notebook):
    (position,) = notebooks.tagged(notebook, PARAMETERS)
    cell = notebook.cells.pop(position)
    settings = [re.match(r"([A-Z_]+) = .*  # .+", x) for x in cell.source.splitlines()]
    assert all(settings)
    rest = code_of(notebook)
    known = {setting[1] for setting in settings}
    assert {n for n in known if not re.search(rf"\b{n}\b", rest)} == set()
    assert set(notebooks.PARAMETERS[name]) <= known


def test_its_code_is_python_everywhere(notebook):
    for cell in notebook.cells:
        assert not re.search(r"[ \t]$", cell.source, re.M)
        if cell.cell_type == "code":
            ast.parse(cell.source)  # no magics: %pip and ! are none
            assert "get_ipython" not in cell.source
            assert (
                len(cell.source.splitlines()) <= 45 or "install" in cell.metadata.tags
            )


def resolves(dotted):
    """Whether a name is mpjax's, or in numerics or cost, or a module here."""
    for root in (mpjax, mpjax.numerics, mpjax.cost, sys.modules["builtins"]):
        value = root
        for part in dotted.removeprefix("mpjax.").split("."):
            value = getattr(value, part, None)
        if value is not None:
            return True
    return False


METRICS = {"grad_norm", "grads_finite", "loss_scale"}
METRICS |= {"num_skipped", "num_consecutive_skipped"}
# What other libraries call things, and what JAX's primitives are called.
OTHERS = {"dot_general", "LossScaleOptimizer", "jax.jit"}


def test_the_prose_names_only_what_exists(notebook):
    """Names, notebooks, files and commands."""
    prose, code = prose_of(notebook), code_of(notebook)
    for file in re.findall(r"\]\((\w+\.ipynb)\)", prose):
        assert (notebooks.COLAB / file).is_file(), file
    for file in re.findall(r"experiments/[\w/.]+", prose):
        assert (ROOT / file).exists(), file
    for module in re.findall(r"python -m ([\w.]+)", prose):
        assert importlib.util.find_spec(module), module
    for dotted in re.findall(r"`([A-Za-z_][\w.]*)`", prose):
        is_in_code = re.search(rf"\b{re.escape(dotted)}\b", code)
        assert is_in_code or dotted in OTHERS | METRICS or resolves(dotted), dotted


def test_those_that_need_the_experiments_say_so(name, notebook):
    needs = bool(re.search(r"^(from|import) experiments", code_of(notebook), re.M))
    assert needs == (name in FROM_EXPERIMENTS)
    assert needs == ("needs a clone" in prose_of(notebook).replace("\n", " "))
    assert needs == ("The experiments are not in the wheel" in code_of(notebook))


# -- the install cell --


@pytest.fixture(scope="module")
def cell():
    """The text of the install cell."""
    path = notebooks.COLAB / f"{notebooks.NAMES[0]}.ipynb"
    return notebooks.read(path).cells[1].source


@pytest.fixture
def install(cell, tmp_path, monkeypatch):
    """What the cell defines, in an empty directory; it has nothing to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    namespace = {}
    exec(cell, namespace)
    return namespace


CLONE = "file:///a/clone"
MPJAX = f"mpjax[notebooks] @ {CLONE}"


@pytest.mark.parametrize(
    ("installed", "is_complete", "expected"),
    [
        ({"jax": "0.10.0"}, True, []),
        ({"jax": "0.12.0.1", "jax-cuda13-plugin": "0.12.0.1"}, True, []),
        ({"jax": "1.0"}, True, []),
        ({}, False, [MPJAX]),
        ({"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"}, False, [MPJAX]),
        ({"jax": "0.9.2"}, False, ["jax>=0.10", MPJAX]),
        ({"jax": "0.9.2"}, True, ["jax>=0.10"]),
        (
            {"jax": "0.7.2", "jaxlib": "0.7.2", "jax-cuda12-plugin": "0.7.2"},
            False,
            ["jax[cuda12]>=0.10", MPJAX],
        ),
        ({"jax": "0.9", "jax-cuda13-plugin": "0.9"}, True, ["jax[cuda13]>=0.10"]),
        ({"jax": "0.4.38", "jax-cuda12-pjrt": "0.4.38"}, True, ["jax>=0.10"]),
        ({"jax": "0.9.0.dev20260101"}, True, ["jax>=0.10"]),
    ],
)
def test_what_pip_is_to_install(install, installed, is_complete, expected):
    assert install["requirements"](installed, is_complete, CLONE) == expected


def test_the_bound_is_that_of_the_project(install):
    bound = ".".join(map(str, install["OLDEST_JAX"]))
    assert f"jax>={bound}" in PYPROJECT["dependencies"]
    extras = PYPROJECT["optional-dependencies"]
    needed = " ".join(PYPROJECT["dependencies"] + extras["notebooks"])
    needed += " ".join(extras["experiments"] + extras["speech"])
    for module in install["MODULES"][1:]:
        assert re.search(rf"\b{module.replace('_', '[-_]')}\b", needed), module


def test_where_mpjax_is_installed_nothing_happens(cell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refuse(*_, **__):
        pytest.fail("started a process")

    monkeypatch.setattr(subprocess, "run", refuse)
    exec(cell, {})
    assert capsys.readouterr().out.startswith("mpjax is installed, with jax ")


def test_what_is_replaced_while_it_is_in_use_is_found(install, monkeypatch):
    before = {"numpy": "2.0", "jax": "0.9", "optax": "0.2.8", "pip": "24"}
    after = {**before, "numpy": "2.3", "pip": "25", "new": "1"}
    owners = {"numpy": ["NumPy"], "jax": ["jax"], "pip": ["pip"], "new": ["new"]}
    monkeypatch.setattr("importlib.metadata.packages_distributions", lambda: owners)
    monkeypatch.delitem(sys.modules, "pip", raising=False)
    assert install["replaced_modules"](before, after) == ["numpy"]
    assert install["replaced_modules"](before, before) == []


def test_a_clone_is_found_here_above_and_below(install, tmp_path, monkeypatch):
    find = install["find_clone"]
    clone = tmp_path / "a clone"
    (clone / "mpjax").mkdir(parents=True)
    assert find() is None  # a folder alone is no clone
    (clone / "pyproject.toml").touch()
    assert find() == clone
    (clone / "colab").mkdir()
    for place in (clone, clone / "colab"):
        monkeypatch.chdir(place)
        assert find() == clone
    install["use_clone"]()
    install["use_clone"]()
    assert sys.path.count(str(clone)) == 1


def test_a_folder_named_like_a_module_is_no_module(install, tmp_path, monkeypatch):
    (tmp_path / "nothing_inside").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not install["is_installed"]("nothing_inside")
    assert not install["is_installed"]("not_there_at_all")
    assert install["is_installed"]("mpjax")


def test_it_takes_the_newest_wheel_and_says_what_to_do_without(install, tmp_path):
    with pytest.raises(SystemExit, match=r"a wheel \(mpjax-\*\.whl\), into "):
        install["find_source"]()
    for age, version in ((2, "0.10.0"), (1, "0.2.0"), (3, "0.9.0")):
        wheel = tmp_path / f"mpjax-{version}-py3-none-any.whl"
        wheel.touch()
        os.utime(wheel, (1e9 - age, 1e9 - age))
    assert install["find_source"]().name == "mpjax-0.2.0-py3-none-any.whl"


def test_it_clones_the_repository_where_there_is_nothing_else(install, tmp_path):
    origin = tmp_path / "elsewhere" / "origin"
    (origin / "mpjax").mkdir(parents=True)
    (origin / "mpjax" / "__init__.py").touch()
    (origin / "pyproject.toml").touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run(["git", *author, *arguments], cwd=origin, check=True)
    install["REPOSITORY"] = origin.as_uri()
    assert install["find_source"]() == tmp_path / "mpjax"
    assert (tmp_path / "mpjax" / "mpjax" / "__init__.py").is_file()
    assert install["find_source"]() == tmp_path / "mpjax"


# What mpjax[notebooks] has beside the library is large and not the point: modules of
# the same names stand for it, and the wheel's extra is empty.
STAND_INS = ("tyro", "espeakng_loader", "equinox")


@pytest.fixture
def wheel(tmp_path):
    """Builds a wheel of the library whose extra `notebooks` asks for nothing."""
    source = tmp_path / "source"
    source.mkdir()
    text = (ROOT / "pyproject.toml").read_text()
    extras, count = re.subn(
        r"^notebooks = \[.*?^\]", "notebooks = []", text, flags=re.M | re.S
    )
    assert count == 1
    (source / "pyproject.toml").write_text(extras)
    for name in ("mpjax", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", str(source)]
    subprocess.run([*pip, "-w", str(tmp_path)], check=True, timeout=300)
    (file,) = tmp_path.glob("mpjax-*.whl")
    return file


@pytest.mark.weekly
def test_in_a_runtime_whose_jax_is_too_old(cell, wheel, tmp_path):
    """First it upgrades jax and stops, then it does nothing and mpjax works."""
    runtime = tmp_path / "run time"
    venv.create(runtime / "venv", with_pip=True)
    python = runtime / "venv" / "bin" / "python"
    for module in STAND_INS:
        (runtime / f"{module}.py").touch()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "XLA_FLAGS") and not name.startswith("COV_")
    } | {"JAX_PLATFORMS": "cpu"}

    def run(code):
        return subprocess.run(
            [python, "-c", code],
            cwd=runtime,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    pip = [python, "-m", "pip", "install", "-q", "--no-compile", "jax<0.10"]
    subprocess.run(pip, check=True, env=environment, timeout=600)
    (runtime / wheel.name).symlink_to(wheel)
    timed = "import time; start = time.perf_counter()\n"
    timed += f"{cell}\nprint(time.perf_counter() - start)"
    used = f"import jax\nassert jax.__version__.startswith('0.9.')\n{cell}"

    first = run(used)
    assert first.returncode == 1, first.stderr
    assert first.stdout.startswith("Installing jax>=0.10 mpjax[notebooks] @ file://")
    assert "Now restart the runtime, since pip has replaced jax" in first.stderr

    second = run(timed)
    assert second.returncode == 0, second.stderr
    said, seconds = second.stdout.splitlines()
    assert said.startswith("mpjax is installed, with jax 0.1")
    assert float(seconds) < 1

    third = run(
        f"{cell}\nimport jax, jax.numpy as jnp, mpjax\n"
        "print(mpjax.autocast(lambda x: x @ x)(jnp.eye(2)).sum(), mpjax.__file__)"
    )
    assert third.returncode == 0, third.stderr
    assert re.search(r"^2\.0 .*site-packages", third.stdout, re.M)


# -- executed --


@pytest.fixture
def executed(executed_notebooks, name):
    error = executed_notebooks / f"{name}.error"
    assert not error.exists(), error.read_text()
    return notebooks.read(executed_notebooks / f"{name}.ipynb")


@pytest.mark.slow
def test_it_runs_and_draws(name, executed, executed_notebooks):
    assert " " in str(executed_notebooks)
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert notebooks.texts(executed, "stderr") == ""
    draws = re.compile(r"plt\.subplots\(|\bImage\(")
    for cell in cells:
        num_pictures = len(notebooks.images(cell))
        assert num_pictures == len(draws.findall(cell.source)), cell.source
    assert any(map(notebooks.images, cells))


@pytest.mark.slow
def test_the_parameters_of_the_tests_are_hidden(name, executed):
    (position,) = notebooks.tagged(executed, "remove-input")
    assert notebooks.tagged(executed, PARAMETERS) == [position - 1]
    assert executed.cells[position].outputs == []


def read_executed(directory, number):
    (path,) = directory.glob(f"{number}_*.ipynb")
    return notebooks.texts(notebooks.read(path))


def numbers(pattern, text):
    """Returns what the groups of a pattern match, as numbers, for each match."""
    found = [tuple(map(float, match.groups())) for match in re.finditer(pattern, text)]
    assert found, f"no {pattern!r} in:\n{text}"
    return found


@pytest.mark.slow
def test_the_quickstart_learns_and_saves(executed_notebooks):
    out = read_executed(executed_notebooks, 1)
    for metric in METRICS:
        assert re.search(rf"^{metric} .* at first", out, re.M)
    ((first, last),) = numbers(r"(?m)^loss  +(\S+) at first +(\S+) at last", out)
    assert last < first / 4
    accuracies = numbers(r"test accuracy (\S+)%", out)
    assert len(accuracies) == 2
    assert min(accuracies) > (90,)
    ((loss, half_loss),) = numbers(r"loss (\S+) in float32, (\S+) in mixed", out)
    assert half_loss == pytest.approx(loss, rel=1e-2)
    ((difference,),) = numbers(r"difference of the gradients: (\S+)", out)
    assert 0 < difference < 0.05
    assert "dtypes of the gradients: {'float32'}" in out
    assert "parameters are bitwise the same: True" in out
    assert re.search(r"^dot_general +float16", out, re.M)


@pytest.mark.slow
def test_the_keras_guide_reaches_the_same_in_both_precisions(executed_notebooks):
    out = read_executed(executed_notebooks, 2)
    tests = numbers(r"test loss (\S+), accuracy (\S+); compiled", out)
    assert len(tests) == 2
    (loss, accuracy), (half_loss, half_accuracy) = tests
    assert half_loss == pytest.approx(loss, rel=0.1)
    assert min(accuracy, half_accuracy) > 0.8
    assert len(numbers(r"(?m)^(?:b?float16): (\S+) times the speed", out)) == 2


@pytest.mark.slow
def test_loss_scaling_is_seen(executed_notebooks):
    out = read_executed(executed_notebooks, 3)
    errors = dict(re.findall(r"(?m)^(\S.*?) +RMS error at the end: (\S+) mm", out))
    errors = {name: float(error) for name, error in errors.items()}
    assert errors["float16, no scaling"] > 2 * errors["float32"]
    for name in ("float16, fixed", "float16, dynamic"):
        assert errors[name] < 1.7 * errors["float32"]
    layers = numbers(r"dot_general +(\S+)% become zero", out)
    assert max(layers) > (50,)
    ((skipped, total),) = numbers(r"(\d+) of (\d+) steps were skipped", out)
    assert 3 < skipped < total / 2
    assert out.count("overflow of half precision: dot_general in energy") == 2
    assert "loss scaling cannot help" in out


@pytest.mark.slow
def test_speech_is_heard(executed_notebooks):
    out = read_executed(executed_notebooks, 4)
    ((cer,),) = numbers(r"test loss \S+, CER (\S+)%", out)
    assert cer < 40
    assert re.findall(r"(?m)^(starting|going on with) runs/mandarin$", out) == [
        "starting",
        "going on with",
    ]
    assert out.count("epoch 1/") == 1
    assert len(re.findall(r"test-\d+\.wav, float32 after \d+ steps: [a-z]+", out)) == 2
    (path,) = executed_notebooks.glob("4_*.ipynb")
    assert path.read_text().count("<audio") == 6


@pytest.mark.slow
def test_autocast_takes_each_framework(executed_notebooks):
    out = read_executed(executed_notebooks, 5)
    assert "Split it outside, graphdef, state = nnx.split(model)" in out
    assert re.search(r"^dot_general +float16", out, re.M)
    ((first, last),) = numbers(r"loss (\S+) at first, (\S+) after 30 steps", out)
    assert last < first / 2
    assert re.search(r"^body +float16 *$", out, re.M)
    assert re.search(r"^head +float32 +a rule says float32$", out, re.M)
    assert "('haed',)" in out
    assert "traced in float32\nthe kernel is traced in float16\n" in out
    ((difference,),) = numbers(r"largest difference to float32: (\S+)", out)
    assert 0 < difference < 0.01


@pytest.mark.slow
def test_half_predicts_what_float64_does(executed_notebooks):
    (path,) = executed_notebooks.glob("6_*.ipynb")
    text = path.read_text()
    assert "weights: mnist_convnet.safetensors" in text
    rows = set(numbers(r"mnist_convnet +\u2502 b?float\d+ +\u2502 +(\S+)%", text))
    assert min(rows) > (98,)
    assert max(rows)[0] - min(rows)[0] < 0.5
    changed = numbers(r"float16: (\d+) of 500 predictions changed", text)
    assert len(changed) == 2
    assert max(changed) < (5,)


@pytest.mark.weekly
def test_speech_goes_on_after_a_lost_runtime(executed_notebooks, tmp_path):
    """The kernel is killed after an epoch, and the notebook run from the top."""
    path = notebooks.COLAB / "4_mandarin_speech.ipynb"
    cells = [c.source for c in notebooks.read(path).cells if c.cell_type == "code"]
    end = next(i for i, source in enumerate(cells) if "result = run()" in source)
    (position,) = notebooks.tagged(notebooks.read(path), PARAMETERS)
    values = notebooks.PARAMETERS["4_mandarin_speech"] | {"NUM_EPOCHS": 2}
    values |= {"NUM_TRAIN": 64, "NUM_TEST": 8}
    given = [f"{name} = {value!r}" for name, value in values.items()]
    script = tmp_path / "cells.py"
    script.write_text(
        "\n".join([*cells[:position], *given, *cells[position : end + 1]])
    )
    pipe = subprocess.PIPE
    started = {"cwd": tmp_path, "env": notebooks.environment(), "text": True}
    command = [sys.executable, "-u", str(script)]
    with subprocess.Popen(command, stdout=pipe, **started) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("epoch 1/2"):
                process.kill()
    assert "starting runs/mandarin\n" in said
    assert process.returncode == -9
    again = subprocess.run(command, capture_output=True, timeout=300, **started)
    assert again.returncode == 0, again.stderr
    assert "going on with runs/mandarin\n" in again.stdout
    assert re.findall(r"^epoch (\d)/2", again.stdout, re.M) == ["2"]
