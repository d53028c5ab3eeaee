"""The programs of README.md and of the documentation run, and print what they say."""

import pytest
from helpers.pages import pages, run_page

QUICK = {"README.md", "docs/quickstart.md", "docs/guides/autocast.md"}


@pytest.mark.parametrize(
    "page",
    [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in pages()],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_programs_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)
