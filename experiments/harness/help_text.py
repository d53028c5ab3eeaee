"""The texts of --help: paragraphs, wherever the lines of a docstring end."""

import dataclasses
import re
import textwrap
import types
import typing

import docstring_parser

WIDTH = 79


def fill(doc: str) -> str:
    """Returns a docstring whose paragraphs are filled, for tyro's description.

    Args:
      doc: paragraphs between empty lines; those that begin with a space stay as they
        are.

    Returns:
      The text; every line but the first begins with a space, because tyro joins lines
      that begin with a letter, and fills none.

    >>> print(fill("A run.\\n\\n    a command\\n\\nOne\\n2 three."))
    A run.
    <BLANKLINE>
        a command
    <BLANKLINE>
     One 2 three.
    """
    paragraphs = re.split(r"\n\s*\n", doc.strip())
    filled = [
        text
        if text.startswith(" ")
        else textwrap.fill(
            " ".join(text.split()),
            WIDTH,
            initial_indent=" " * bool(index),
            subsequent_indent=" ",
            break_on_hyphens=False,
            break_long_words=False,
        )
        for index, text in enumerate(paragraphs)
    ]
    return "\n\n".join(filled)


def fill_flags(config_type: type) -> None:
    """Makes one line of each flag's docstring, which tyro fills; it keeps line breaks.

    Args:
      config_type: a dataclass whose fields have docstrings; those of fields that are
        dataclasses, too, are made lines.
    """
    docs = {}
    for cls in reversed(config_type.__mro__[:-1]):
        params = docstring_parser.parse_from_object(cls).params
        docs |= {param.arg_name: param.description for param in params}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        if dataclasses.is_dataclass(hints[field.name]):
            fill_flags(hints[field.name])
        if text := docs.get(field.name):
            metadata = {**field.metadata, "help": " ".join(text.split())}
            field.metadata = types.MappingProxyType(metadata)
