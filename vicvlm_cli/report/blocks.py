"""What every table is put together from: a title, columns, remarks."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vicvlm_cli.report.sheet import printable


def table(first: str, right: Iterable[str] = ()) -> Table:
    """An empty table of a column `first` and columns of figures."""
    made = Table()
    made.add_column(first)
    for name in right:
        made.add_column(name, justify="right")
    return made


def block(title: str, body: Table | None, lines: list[str]) -> Group:
    """A table between its title and its remarks, which may be wider than it is."""
    parts: list[Table | Text] = [words(title, "bold")]
    parts += [body] if body is not None else []
    return Group(*parts, *(words(line, "dim") for line in lines), Text())


def words(text: str, style: str = "") -> Text:
    """People's words: [brackets] are no markup, and file names need not be UTF-8."""
    return Text(printable(text), style=style)
