"""What pyproject.toml requires, what is built from it, and that this is enough."""

import ast
import email
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import filelock
import lower_bounds
import pytest
import yaml

import mpjax

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Modules whose packages have another name.
MODULES = {
    "dm-haiku": "haiku",
    "mixed-precision-for-jax": "mpx",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}
# Packages that are run, or named in a configuration, and not imported.
TOOLS = {
    *("basedpyright", "build", "import-linter", "pytest-cov", "pytest-xdist", "ruff"),
    *("furo", "myst-nb", "sphinx", "sphinx-copybutton"),
    *("ipykernel", "ipywidgets"),
}
# The library imports these if they are there.
OPTIONAL = {"rich"}
# Grain brings absl along, JAX ml_dtypes. TensorFlow is for those data sets of TFDS that
# need it; an error says so where it is missing.
NOT_DECLARED = {"absl", "ml_dtypes", "tensorflow"}
# Modules of this repository, and one that a test asks for because there is none.
LOCAL = {"experiments", "mpjax", "no_such_library"} | {
    path.stem for name in ("docs", "tests") for path in (ROOT / name).iterdir()
}


@functools.cache
def imported(directory):
    """Returns third-party modules that files import, at their top or later on."""
    names = set()
    for node in nodes(directory):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
        elif isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            if name in {"import_module", "import_extra", "importorskip"}:
                names |= {x.value for x in node.args if isinstance(x, ast.Constant)}
    names = {name.partition(".")[0] for name in names}
    return names - LOCAL - sys.stdlib_module_names


@functools.cache
def strings(directory):
    """Returns the strings of files, up to their first point."""
    return {
        node.value.partition(".")[0]
        for node in nodes(directory)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def nodes(directory):
    for path in sorted((ROOT / directory).rglob("*.py")):
        yield from ast.walk(ast.parse(path.read_text()))


def requirements(*extras):
    """Returns the packages that extras require, other extras of mpjax entered."""
    names = set()
    for line in (line for extra in extras for line in EXTRAS[extra]):
        if inner := re.fullmatch(r"mpjax\[(.+)\]", line):
            names |= requirements(*inner[1].split(","))
        else:
            names.add(package(line))
    return names


def package(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


DEPENDENCIES = {module(package(line)) for line in PROJECT["dependencies"]}


def test_the_library_requires_what_it_imports_and_nothing_else():
    assert imported("mpjax") == DEPENDENCIES | OPTIONAL


@pytest.mark.parametrize("extra", EXTRAS)
def test_what_an_extra_requires_is_used(extra):
    used = imported("experiments") | imported("tests") | imported("docs")
    # By way of a loop over names.
    used |= strings("experiments")
    packages = requirements(extra) - TOOLS - {"jax"}
    assert [name for name in packages if module(name) not in used] == []


@pytest.mark.parametrize(
    ("directory", "extras"),
    [
        ("experiments", ("detection", "speech", "bench")),
        ("tests", ("test",)),
        ("docs", ("test",)),
    ],
)
def test_what_is_imported_is_required(directory, extras):
    required = set(map(module, requirements(*extras)))
    extra = {"torch"} if directory == "tests" else set()  # skipped where it is not
    declared = required | DEPENDENCIES | NOT_DECLARED | extra
    assert imported(directory) - declared == set()


def test_each_package_of_an_extra_has_a_lower_bound_or_a_version():
    lines = [line for lines in EXTRAS.values() for line in lines]
    lines = [x for x in lines + PROJECT["dependencies"] if not x.startswith("mpjax[")]
    assert [x for x in lines if not re.search(r"[>=]=\d", x)] == ["jax[cuda13]"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert citation["type"] == "software"
    assert citation["version"] == mpjax.__version__
    assert citation["license"] == PROJECT["license"]
    assert all("name" in author for author in citation["authors"])


# Builds and installs, in environments of their own.

SCRIPT = """
import importlib.util, sys
from pathlib import Path

import jax, jax.numpy as jnp, optax
import mpjax, mpjax.cost, mpjax.numerics

missing = sys.argv[1:]
assert missing
assert not [name for name in missing if importlib.util.find_spec(name)]
assert Path(mpjax.__file__).is_relative_to(sys.prefix), mpjax.__file__


def loss_fn(params, batch, key):
    hidden = jax.nn.gelu(batch["x"] @ params["w0"] + params["b0"])
    return jnp.mean((hidden @ params["w1"] - batch["y"]) ** 2), None


keys = jax.random.split(jax.random.key(0), 4)
params = {
    "w0": jax.random.normal(keys[0], (16, 32)) / 4,
    "b0": jnp.zeros(32),
    "w1": jax.random.normal(keys[1], (32, 1)) / 6,
}
batch = {
    "x": jax.random.normal(keys[2], (64, 16)),
    "y": jax.random.normal(keys[3], (64, 1)),
}
tx = mpjax.with_loss_scale(optax.adam(1e-2))
state = mpjax.TrainState.create(params=params, tx=tx)
train_step = mpjax.make_train_step(loss_fn, tx, policy="mixed_float16", donate=False)
losses = []
for _ in range(10):
    state, metrics = train_step(state, batch)
    losses.append(float(metrics["loss"]))
assert losses[-1] < losses[0], losses


def scanned(params, batch):  # its residuals are chosen by scipy
    def body(carry, _):
        carry = jnp.tanh(carry @ params["w0"] @ params["w0"].T)
        return carry * jax.nn.sigmoid(carry), None

    return jnp.mean(jax.lax.scan(body, batch["x"], length=3)[0])


mpjax.autocast_report(jax.value_and_grad(scanned), "mixed_bfloat16")(
    params, batch
).print()
mpjax.numerics.precision_report(jax.grad(scanned))(params, batch).print()
mpjax.cost.analyze(train_step, state, batch).print()
print("version", mpjax.__version__)
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A directory with an sdist, the wheel made from it, and one from the checkout.

    The workers of a parallel run share it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    directory = root / "built"
    with filelock.FileLock(root / "built.lock"):
        if not (directory / "done").exists():
            build = (sys.executable, "-m", "build", ROOT, "--outdir")
            run(*build, directory)
            run(*build, directory / "direct", "--wheel")
            (directory / "done").touch()
    return directory


def run(*command, **options):
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, **options
    )
    assert done.returncode == 0, (
        f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    )
    return done.stdout


def files(directory):
    """Returns a directory's files without those that git ignores."""
    ignored = (ROOT / ".gitignore").read_text().split()
    return {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / directory).rglob("*")
        if path.is_file()
        and not any(
            fnmatch(path.relative_to(ROOT).as_posix(), f"{pattern}*")
            or fnmatch(part, pattern.rstrip("/"))
            for pattern in ignored
            for part in path.relative_to(ROOT).parts
        )
    }


def wheel(directory):
    (path,) = directory.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_library_alone(built):
    contents = wheel(built)
    info = f"mpjax-{mpjax.__version__}.dist-info"
    own = {name for name in contents if not name.startswith(info)}
    assert own == files("mpjax")
    assert "mpjax/py.typed" in own
    assert set(contents) - own == {
        f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "licenses/LICENSE")
    }
    assert contents[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()

    metadata = email.message_from_bytes(contents[f"{info}/METADATA"])
    assert metadata["Name"] == "mpjax"
    assert metadata["Version"] == mpjax.__version__
    assert metadata["License-Expression"] == PROJECT["license"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra", [])) == set(EXTRAS)
    required = [x for x in metadata.get_all("Requires-Dist", []) if "extra ==" not in x]
    assert sorted(required) == sorted(PROJECT["dependencies"])
    if not PYPROJECT["tool"]["mpjax"]["repository"]:
        # The readme is written in UTF-8, which email takes for ASCII.
        text = contents[f"{info}/METADATA"].decode().partition("\n\n")[2]
        assert text.strip() == (ROOT / "README.md").read_text().strip()


@pytest.mark.slow
def test_the_sdist_holds_what_the_tests_need_and_makes_the_same_wheel(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    always = {"PKG-INFO", ".gitignore", "pyproject.toml", "LICENSE", "README.md"}
    always |= {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md"}
    folders = (".ci", "colab", "docs", "experiments", "mpjax", "tests")
    assert names == always.union(*map(files, folders))
    assert wheel(built) == wheel(built / "direct")


@pytest.mark.slow
def test_the_wheel_is_enough_in_a_bare_environment(built, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    (path,) = built.glob("*.whl")
    run(*pip, "install", "--quiet", "--no-compile", path)
    elsewhere = tmp_path / "a folder"
    elsewhere.mkdir()
    (elsewhere / "script.py").write_text(SCRIPT)
    missing = set(map(module, requirements(*EXTRAS))) | OPTIONAL
    missing -= DEPENDENCIES
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for name in ("PYTHONPATH", "XLA_FLAGS"):
        environment.pop(name, None)
    out = run(
        *(python, "-W", "error", "script.py", *sorted(missing)),
        cwd=elsewhere,
        env=environment,
    )
    assert f"version {mpjax.__version__}" in out
    # Plain tables, without rich.
    assert re.search(r"^-+(  -+)+$", out, re.MULTILINE), out
    run(*pip, "check")


@pytest.mark.slow
def test_a_package_index_gets_absolute_links_once_there_is_an_address(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "LICENSE", "CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, copy)
    for name in ("mpjax", "docs", "colab"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name)
    code = 'fns["relu"](x / 2)\n'
    text = (
        f"[a](CHANGELOG.md) ![two\nlines](docs/a.png) [b](#c) [d](https://e.f) {code}"
        "[![badge](docs/b.svg)](colab/c.ipynb)"
    )
    readme = (copy / "README.md").read_text()
    (copy / "README.md").write_text(f"{text}\n{readme}")
    address = "https://github.com/owner/name"
    run(sys.executable, copy / "docs/repository.py", address)
    run(sys.executable, "-m", "build", copy, "--wheel", "--outdir", tmp_path)
    (metadata,) = (
        data.decode() for name, data in wheel(tmp_path).items() if "METADATA" in name
    )
    header, _, description = metadata.partition("\n\n")
    assert f"Project-URL: Source, {address}" in header
    assert (
        f"[a]({address}/blob/main/CHANGELOG.md) ![two\nlines]"
        f"({address}/raw/main/docs/a.png) [b](#c) [d](https://e.f) {code}"
        f"[![badge]({address}/raw/main/docs/b.svg)]({address}/blob/main/colab/c.ipynb)"
    ) in description
    prose = re.sub(r"```.*?```", "", description, flags=re.DOTALL)
    prose = prose.replace(code, "")
    targets = re.findall(r'\]\(([^)\s]+)|(?:src|href)="([^"]+)', prose)
    assert [x for x in map("".join, targets) if not re.match("https://|#", x)] == []


def test_the_page_of_platforms_tells_the_oldest_versions():
    page = (ROOT / "docs/guides/platforms.md").read_text()
    rows = re.findall(r"^\| (\w+)(?: \([^|]*\))? \| ([\d.]+) \| [\d.]+ \|$", page, re.M)
    bounds = dict(line.split("==") for line in lower_bounds.constraints())
    bounds["Python"] = PROJECT["requires-python"].removeprefix(">=")
    assert {"Python", "jax", "numpy", "scipy", "flax"} <= dict(rows).keys()
    assert dict(rows) == {name: bounds[name] for name, _ in rows}
