"""docs/repository.py writes the repository's address everywhere, and takes it out."""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ADDRESS = "https://github.com/some-owner/a_name.x"
COLAB = "https://colab.research.google.com/"
PAGE = """# A page

<!-- repository: clone -->
<!-- end -->
and
<!-- repository: install -->
<!-- end -->
but this, of another command, stays:
<!-- table: x -->
old
<!-- end -->

<!-- repository: badges -->
an old list
<!-- end -->
"""
PAGE_WITH_ADDRESS = f"""# A page

<!-- repository: clone -->
```sh
git clone {ADDRESS}
cd a_name.x
```
<!-- end -->
and
<!-- repository: install -->
```sh
pip install "mpjax @ git+{ADDRESS}"
```
<!-- end -->
but this, of another command, stays:
<!-- table: x -->
old
<!-- end -->

<!-- repository: badges -->

- [Größe, seen](UPsample.ipynb) [![Open in Colab]({COLAB}assets/colab-badge.svg)]\
({COLAB}github/some-owner/a_name.x/blob/main/colab/sample.ipynb)

<!-- end -->
"""
PAGE_WITHOUT = """# A page

<!-- repository: clone -->
```sh
cd mpjax  # the checkout
```
<!-- end -->
and
<!-- repository: install -->
```sh
pip install .  # in the checkout
```
<!-- end -->
but this, of another command, stays:
<!-- table: x -->
old
<!-- end -->

<!-- repository: badges -->

- [Größe, seen](UPsample.ipynb)

<!-- end -->
"""
BADGE = f"[![Open In Colab]({COLAB}assets/colab-badge.svg)]({COLAB})"
NOTEBOOK = {
    "cells": [
        {
            "cell_type": "markdown",
            "metadata": {},
            "source": [f"{BADGE}\n", "\n", "# Größe, seen\n"],
        },
        {
            "cell_type": "code",
            "execution_count": None,
            "metadata": {},
            "outputs": [],
            "source": [
                "import os\n",
                'REPOSITORY = ""  # set by docs/repository.py\n',
                'print("x")',
            ],
        },
    ],
    "metadata": {},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that show the address, with pages and a notebook beside."""
    for name in ("pyproject.toml", "CITATION.cff", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("docs", "colab"):
        for path in (ROOT / name).rglob("*.*"):
            if path.suffix in {".md", ".py", ".ipynb"}:
                copy = tmp_path / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, copy)
    assert run(tmp_path, "").returncode == 0
    for path in (tmp_path / "colab").glob("*.ipynb"):
        path.unlink()
    (tmp_path / "colab").mkdir(exist_ok=True)
    text = json.dumps(NOTEBOOK, indent=1, ensure_ascii=False) + "\n"
    (tmp_path / "colab/sample.ipynb").write_text(text)
    (tmp_path / "docs/deep").mkdir()
    (tmp_path / "docs/deep/page.md").write_text(PAGE)
    done = run(tmp_path)
    assert "docs/deep/page.md" in done.stdout, done.stdout + done.stderr
    return tmp_path


def run(tree, *arguments):
    """Runs the copy of the script in `tree`, without a process of its own."""
    path = tree / "docs/repository.py"
    spec = importlib.util.spec_from_file_location("repository", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = module.main(list(arguments))
        except SystemExit as stop:  # by argparse
            status = stop.code
    return types.SimpleNamespace(
        returncode=status, stdout=out.getvalue(), stderr=err.getvalue()
    )


def contents(tree):
    return {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in tree.rglob("*.*")
        if path.is_file()
    }


def project(tree):
    return tomllib.loads((tree / "pyproject.toml").read_text())


def expected_page(text):
    return text.replace("UP", "../../colab/")


def test_what_is_committed_is_up_to_date():
    command = [sys.executable, ROOT / "docs/repository.py", "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "everything is up to date\n"


def test_an_address_is_written_everywhere_and_taken_out_again(tree):
    before = contents(tree)
    page, notebook = tree / "docs/deep/page.md", tree / "colab/sample.ipynb"
    assert page.read_text() == expected_page(PAGE_WITHOUT)
    assert json.loads(notebook.read_text()) == NOTEBOOK
    assert "urls" not in project(tree)["project"]

    done = run(tree, f"{ADDRESS}.git/")
    assert done.returncode == 0, done.stderr
    assert page.read_text() == expected_page(PAGE_WITH_ADDRESS)
    written = notebook.read_text()
    link = f"({COLAB}github/some-owner/a_name.x/blob/main/colab/sample.ipynb)"
    line = f'REPOSITORY = "{ADDRESS}"  # set by docs/repository.py\n'
    cells = json.loads(written)["cells"]
    assert cells[0]["source"][0] == BADGE.replace(f"({COLAB})", link) + "\n"
    assert cells[1]["source"][1] == line
    assert (
        written == json.dumps(json.loads(written), indent=1, ensure_ascii=False) + "\n"
    )
    assert project(tree)["tool"]["mpjax"] == {"repository": ADDRESS}
    assert project(tree)["project"]["urls"] == {
        "Homepage": ADDRESS,
        "Source": ADDRESS,
        "Issues": f"{ADDRESS}/issues",
        "Changelog": f"{ADDRESS}/blob/main/CHANGELOG.md",
    }
    citation = yaml.safe_load((tree / "CITATION.cff").read_text())
    assert citation["repository-code"] == ADDRESS
    assert run(tree, "--check").returncode == 0
    assert "up to date" in run(tree).stdout

    other = ADDRESS.replace("some-owner", "another")
    assert run(tree, other).returncode == 0
    assert all(b"some-owner" not in text for text in contents(tree).values())

    assert run(tree, "").returncode == 0
    assert contents(tree) == before


def test_check_names_what_is_out_of_date_and_changes_nothing(tree):
    assert run(tree, "--check").returncode == 0
    text = (tree / "pyproject.toml").read_text()
    text = text.replace('\nrepository = ""', f'\nrepository = "{ADDRESS}"')
    (tree / "pyproject.toml").write_text(text)
    before = contents(tree)
    done = run(tree, "--check")
    assert done.returncode == 1
    names = ("pyproject.toml", "CITATION.cff", "docs/deep/page.md", "sample.ipynb")
    assert all(name in done.stderr for name in names), done.stderr
    assert contents(tree) == before


@pytest.mark.parametrize(
    "address",
    [
        "github.com/owner/name",
        "http://github.com/owner/name",
        "https://github.com/owner",
        "https://github.com/owner/name/tree/main",
        "https://github.com/owner/..",
        "https://github.com/-owner/name",
        'https://github.com/owner/na"me',
        "https://example.org/owner/name",
        "git@github.com:owner/name.git",
        "/",
    ],
)
def test_another_address_is_refused(address, tree):
    before = contents(tree)
    done = run(tree, address)
    assert done.returncode == 1
    assert "expected the address of a repository" in done.stderr
    assert repr(address) in done.stderr
    assert contents(tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("docs/deep/page.md", "install -->", "instal -->", "expected one of clone, "),
        ("docs/deep/page.md", "```\n<!-- end -->", "```", "has 3 blocks .* 1 that end"),
        ("pyproject.toml", "# repository: urls\n# end\n", "", "no block urls"),
        ("pyproject.toml", "[tool.mpjax]\n", "[tool.other]\n", "no `repository` in"),
        ("pyproject.toml", "[tool.mpjax]\n", "[tool.mpjax]\n\n", "got 0; restore it"),
        ("CITATION.cff", "# end\n", "", "1 blocks .* 0 that end"),
        (
            "colab/sample.ipynb",
            f"({COLAB})",
            "(https://else.where)",
            "expected one link",
        ),
        ("colab/sample.ipynb", "set by", "from", "expected one line `REPOSITORY"),
        ("colab/sample.ipynb", "# Größe", "Größe", "has no title"),
        ("README.md", None, None, r"README\.md cannot be read"),
    ],
)
def test_a_damaged_file_is_named_and_nothing_is_written(name, old, new, message, tree):
    path = tree / name
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    before = contents(tree)
    done = run(tree)
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert path.name in done.stderr
    assert contents(tree) == before


def test_check_takes_no_address(tree):
    done = run(tree, "--check", ADDRESS)
    assert done.returncode == 2
    assert "give none" in done.stderr


def test_help_names_the_markers(tree):
    out = run(tree, "--help").stdout
    markers = ("<!-- repository: NAME -->", "clone", "install", "badges", "REPOSITORY")
    assert all(marker in out for marker in markers)
