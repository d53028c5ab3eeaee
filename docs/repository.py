"""Writes the repository's address into every file that shows it.

    python docs/repository.py https://github.com/OWNER/NAME    # sets it
    python docs/repository.py ""                               # takes it out again
    python docs/repository.py                                  # writes it once more
    python docs/repository.py --check                          # changes nothing

The address stands in pyproject.toml, as `repository` of `[tool.mpjax]`; an empty one is
not known yet. What shows it is made from it:

- In README.md and the Markdown files of docs/, what stands between the lines
  `<!-- repository: NAME -->` and `<!-- end -->`:

  | NAME | with an address | without |
  |---|---|---|
  | clone | `git clone` and `cd`, in a block of sh | `cd` alone |
  | install | pip installs the library from git, in a block of sh | from a checkout |
  | badges | links to the notebooks in colab/ with Colab badges | links alone |

- In pyproject.toml and CITATION.cff, what stands between the lines `# repository: NAME`
  and `# end`: `urls` is the table `[project.urls]`, `readme` makes README's relative
  links absolute on a package index, `citation` is `repository-code`. All are empty
  without an address.
- In each notebook in colab/, the target of its badge, a link to
  `https://colab.research.google.com/`, and the line of code
  `REPOSITORY = ""  # set by docs/repository.py`. Both occur once in a notebook.

The rest of each file stays as it is, so that an address that is set and taken out again
leaves no trace. After a notebook was added or renamed, run it without an address.
"""

import argparse
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]"

ADDRESS = re.compile(
    r"https://github\.com/[A-Za-z0-9]+(-[A-Za-z0-9]+)*/(?!\.{1,2}$)[\w.-]+", re.ASCII
)
SETTING = re.compile(r'^(\[tool\.mpjax\]\nrepository = )"[^"\n]*"$', re.MULTILINE)
# A block that begins where another has not ended is not taken for one.
MARKDOWN_BLOCK = re.compile(
    r"^(<!-- repository: (.+) -->\n)((?:(?!<!-- ).*\n)*?)(<!-- end -->)$", re.MULTILINE
)
COMMENT_BLOCK = re.compile(
    r"^(# repository: (.+)\n)((?:(?!# ).*\n)*?)(# end)$", re.MULTILINE
)
BLOCK_START = re.compile(r"^(?:<!--|#) repository: ", re.MULTILINE)
# In the JSON of a notebook, where quotes are escaped.
NOTEBOOK_BADGE = re.compile(rf"\({re.escape(COLAB)}(?:github/[^)\s]*)?\)")
NOTEBOOK_LINE = re.compile(
    r'"REPOSITORY = \\"[^"\\]*\\"(  # set by docs/repository\.py)'
)


class RepositoryError(Exception):
    """An address or a file is not as expected; the message says what to do."""


def main(arguments: list[str] | None = None) -> int:
    """Sets the address, writes it again or checks it; returns the exit status."""
    summary, _, rest = str(__doc__).partition("\n")
    parser = argparse.ArgumentParser(
        prog="python docs/repository.py",
        description=summary,
        epilog=rest.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "address",
        nargs="?",
        help='https://github.com/OWNER/NAME, or "" to take the address out; '
        "if it is left out, the one in pyproject.toml",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="change nothing; exit with 1 and name the files that are out of date",
    )
    config = parser.parse_args(arguments)
    if config.check and config.address is not None:
        parser.error("--check compares with the address in pyproject.toml; give none")
    try:
        given = config.address
        address = validate(current_address() if given is None else given)
        outdated = {path: text for path, text in render(address) if text != _read(path)}
    except RepositoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in outdated)
    if outdated and config.check:
        print(
            f"out of date: {names}. `python docs/repository.py` writes them.",
            file=sys.stderr,
        )
        return 1
    for path, text in outdated.items():
        path.write_text(text, encoding="utf-8", newline="")
    print(f"written: {names}" if outdated else "everything is up to date")
    return 0


def validate(address: str) -> str:
    """Returns an address without `/` or `.git` at its end.

    Raises:
      RepositoryError: if it is neither empty nor that of a repository on GitHub.
    """
    short = address.removesuffix("/").removesuffix(".git")
    if address and not ADDRESS.fullmatch(short):
        raise RepositoryError(
            "expected the address of a repository, https://github.com/OWNER/NAME, or "
            f'"" while there is none, got {address!r}. Colab opens notebooks from '
            "GitHub only."
        )
    return short


def current_address() -> str:
    """Returns the address in pyproject.toml."""
    path = ROOT / "pyproject.toml"
    try:
        return tomllib.loads(_read(path))["tool"]["mpjax"]["repository"]
    except (KeyError, tomllib.TOMLDecodeError) as error:
        raise RepositoryError(
            f"{path} has no `repository` in [tool.mpjax] ({error!r}); restore the line "
            '`repository = ""`.'
        ) from error


def render(address: str) -> list[tuple[Path, str]]:
    """Returns each file that shows the address, with its text for this address."""
    notebooks = sorted((ROOT / "colab").glob("*.ipynb"))
    docs = sorted((ROOT / "docs").rglob("*.md"))
    pages = [page for page in docs if "_build" not in page.parts]
    return [
        (path, text)
        for paths, render_one in (
            ([ROOT / "pyproject.toml"], _render_pyproject),
            ([ROOT / "CITATION.cff"], _render_citation),
            ([ROOT / "README.md", *pages], _render_page),
            (notebooks, _render_notebook),
        )
        for path in paths
        for text in [render_one(path, address)]
    ]


def _render_pyproject(path: Path, address: str) -> str:
    text, count = SETTING.subn(rf'\1"{address}"', _read(path))
    if count != 1:
        raise RepositoryError(
            f"expected one line `repository = ...` below [tool.mpjax] in {path}, got "
            f"{count}; restore it."
        )
    blocks = {"urls": _urls, "readme": _readme_substitutions}
    return _fill(COMMENT_BLOCK, path, text, address, blocks, each=True)


def _render_citation(path: Path, address: str) -> str:
    blocks = {"citation": _repository_code}
    return _fill(COMMENT_BLOCK, path, _read(path), address, blocks, each=True)


def _render_page(path: Path, address: str) -> str:
    def badges(address: str) -> str:
        return _badges(path, address)

    blocks = {"clone": _clone, "install": _install, "badges": badges}
    return _fill(MARKDOWN_BLOCK, path, _read(path), address, blocks)


def _render_notebook(path: Path, address: str) -> str:
    text = _read(path)
    repository = address.removeprefix("https://github.com/")
    for pattern, new, what in (
        (NOTEBOOK_BADGE, f"({_colab_address(path, repository)})", f"link to {COLAB}"),
        (NOTEBOOK_LINE, rf'"REPOSITORY = \\"{address}\\"\1', "line `REPOSITORY = ...`"),
    ):
        text, count = pattern.subn(new, text)
        if count != 1:
            raise RepositoryError(
                f"expected one {what} in {path}, got {count}; "
                "`python docs/repository.py --help` shows its form."
            )
    return text


def _fill(
    block: re.Pattern[str],
    path: Path,
    text: str,
    address: str,
    blocks: dict[str, Callable[[str], str]],
    *,
    each: bool = False,
) -> str:
    """Returns the text with the content of its blocks made anew.

    Raises:
      RepositoryError: if a block has another name or no end; with `each`, also if one
        of `blocks` is missing.
    """
    missing = set(blocks) if each else set()

    def fill(match: re.Match[str]) -> str:
        start, name, _, end = match.groups()
        missing.discard(name)
        if name not in blocks:
            raise RepositoryError(
                f"{path} has a block `repository: {name}`; expected one of "
                f"{', '.join(blocks)}."
            )
        return f"{start}{blocks[name](address)}{end}"

    text, count = block.subn(fill, text)
    started = len(BLOCK_START.findall(text))
    if count != started:
        raise RepositoryError(
            f"{path} has {started} blocks `repository: NAME`, but {count} that end; "
            "add the missing `end`."
        )
    if missing:
        raise RepositoryError(
            f"{path} has no block {', '.join(sorted(missing))}; restore the lines "
            "`# repository: NAME` and `# end`."
        )
    return text


def _clone(address: str) -> str:
    if not address:
        return "```sh\ncd mpjax  # the checkout\n```\n"
    return f"```sh\ngit clone {address}\ncd {address.rpartition('/')[2]}\n```\n"


def _install(address: str) -> str:
    source = f'"mpjax @ git+{address}"' if address else ".  # in the checkout"
    return f"```sh\npip install {source}\n```\n"


def _badges(page: Path, address: str) -> str:
    repository = address.removeprefix("https://github.com/")
    lines = []
    for path in sorted((ROOT / "colab").glob("*.ipynb")):
        target = Path(os.path.relpath(path, page.parent)).as_posix()
        badge = f" {BADGE}({_colab_address(path, repository)})" if address else ""
        lines.append(f"- [{_title(path)}]({target}){badge}\n")
    return f"\n{''.join(lines)}\n" if lines else ""


def _title(path: Path) -> str:
    """Returns the first heading of a notebook."""
    try:
        cells = json.loads(_read(path))["cells"]
        texts = ["".join(x["source"]) for x in cells if x["cell_type"] == "markdown"]
        return re.findall(r"^# (.+?) *$", "\n".join(texts), re.MULTILINE)[0]
    except (ValueError, LookupError, TypeError) as error:
        raise RepositoryError(
            f"{path} has no title ({error!r}): expected a notebook with a cell of "
            "Markdown that has a line `# TITLE`."
        ) from error


def _colab_address(path: Path, repository: str) -> str:
    where = f"github/{repository}/blob/{BRANCH}/colab/{path.name}" if repository else ""
    return f"{COLAB}{where}"


def _urls(address: str) -> str:
    if not address:
        return ""
    return (
        "[project.urls]\n"
        f'Homepage = "{address}"\n'
        f'Source = "{address}"\n'
        f'Issues = "{address}/issues"\n'
        f'Changelog = "{address}/blob/{BRANCH}/CHANGELOG.md"\n'
    )


def _repository_code(address: str) -> str:
    return f'repository-code: "{address}"\n' if address else ""


def _readme_substitutions(address: str) -> str:
    """Returns replacements for the targets of images and links to files."""
    if not address:
        return ""
    # Code like `x["y"](z)` is no link.
    relative = r"(?=\.?[\w-]+/|[\w-]+\.(?:md|toml|cff)\b|LICENSE\b)"
    return (
        "substitutions = [\n"
        f"  {{ pattern = '(!\\[[^\\]]*\\]\\(){relative}', "
        f"replacement = '\\1{address}/raw/{BRANCH}/' }},\n"
        f"  {{ pattern = '(\\]\\(){relative}', "
        f"replacement = '\\1{address}/blob/{BRANCH}/' }},\n"
        "]\n"
    )


def _read(path: Path) -> str:
    """Returns a file's text, line ends as they are.

    Raises:
      RepositoryError: if it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        raise RepositoryError(
            f"{path} cannot be read ({error}); restore it."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
