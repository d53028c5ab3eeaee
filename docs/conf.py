"""The documentation site: `sphinx-build -W docs docs/_build/html`.

The notebooks of colab/ are pages, too. They are not executed here: the copies with
outputs come from the directory in $MPJAX_EXECUTED_NOTEBOOKS; without it, the pages
show them as they are in git, without outputs.
"""

import os
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import pipeline_diagram  # noqa: E402

import mpjax  # noqa: E402

project = "mpjax"
author = copyright = "The mpjax authors"
version = release = mpjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "mpjax"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Code blocks of a page are programs, run by the tests, not by the build.
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them; the docstring says more
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_use_ivar = True

# A link to a name of mpjax that does not exist is an error. Other libraries have
# sites of their own, which the build does not ask.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!mpjax\b).*")]


def write_generated_pages(app: object) -> None:
    """Draws the diagram of autocast's passes, and brings the notebooks in."""
    (DOCS / "_static" / "pipeline.svg").write_text(pipeline_diagram.draw())
    source = os.environ.get("MPJAX_EXECUTED_NOTEBOOKS") or DOCS.parent / "colab"
    target = DOCS / "notebooks"
    for old in target.glob("*.ipynb"):
        old.unlink()
    for notebook in sorted(Path(source).glob("*.ipynb")):
        shutil.copy(notebook, target / notebook.name)


def setup(app: object) -> None:
    """Registers what writes the generated pages."""
    app.connect("builder-inited", write_generated_pages)  # type: ignore[attr-defined]
