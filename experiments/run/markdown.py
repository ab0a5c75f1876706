"""Tables in Markdown, and documents whose tables are made from figures."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MARKED = re.compile(r"(<!-- table: ([^\n]*) from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], lines: Iterable[Iterable]) -> str:
    """A table in Markdown, one line of text for each row, each with its end."""
    head = list(head)
    rows = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(str(cell).replace("|", " ") for cell in row) + " |\n" for row in rows)


def with_tables(text: str, tables: Mapping[str, Callable[[Any], str]], figures: Callable[[str], Any]) -> str:
    """The document, with a new table between each `<!-- table: NAME from FILE -->` and `<!-- end -->`.

    Args:
      text: the document.
      tables: {NAME: what makes the table of the figures}.
      figures: of a FILE's name, what was measured.
    """
    return MARKED.sub(lambda match: match[1] + tables[match[2]](figures(match[3])) + match[4], text)
