"""The documentation site builds without a warning, and its links lead somewhere."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(builder, out, notebooks=None, timeout=300):
    environment = dict(os.environ)
    if notebooks is not None:
        environment["MPJAX_EXECUTED_NOTEBOOKS"] = str(notebooks)
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b")
    done = subprocess.run(
        [*command, builder, ROOT / "docs", out],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert not done.stderr.strip()


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path, executed_notebooks):
    build("html", tmp_path, executed_notebooks)
    for page in ("index", "quickstart", "guides/autocast", "results/memory"):
        assert (tmp_path / f"{page}.html").exists()
    assert "make_train_step" in (tmp_path / "api/mpjax.html").read_text()
    for notebook in (ROOT / "colab").glob("*.ipynb"):
        page = (tmp_path / f"notebooks/{notebook.stem}.html").read_text()
        assert "<img" in page.partition("<article")[2], f"{notebook.stem} has no plot"


@pytest.mark.network
def test_its_outer_links_lead_somewhere(tmp_path):
    build("linkcheck", tmp_path, timeout=600)


def test_the_diagram_that_readers_of_the_source_see_is_of_today():
    spec = importlib.util.spec_from_file_location(
        "pipeline_diagram", ROOT / "docs/pipeline_diagram.py"
    )
    assert spec is not None
    assert spec.loader is not None
    diagram = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagram)
    # `sphinx-build docs docs/_build/html` writes it.
    assert (ROOT / "docs/_static/pipeline.svg").read_text() == diagram.draw()


def test_every_public_name_is_in_the_reference():
    import mpjax
    from mpjax import cost, numerics, sharding

    for module in (mpjax, cost, numerics, sharding):
        page = module.__name__.rpartition(".")[2]
        text = (ROOT / f"docs/api/{page}.md").read_text()
        for name in module.__all__:
            if name in {"cost", "numerics", "sharding"}:
                continue
            assert f":: {name}\n" in text, f"docs/api/{page}.md lacks {name}"
