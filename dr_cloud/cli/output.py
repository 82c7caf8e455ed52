"""What commands print: tables for people; for programs exactly one JSON document on standard output.

Values are shown by the unit that ends their name: `_ns` as RFC 3339 to the nanosecond, `_bytes` as KiB, MiB, GiB,
`_seconds` with one digit. JSON keeps them as the API gives them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from dr_cloud.model.units import format_size, format_time

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
_PIPE_WIDTH = 400
"""Columns where standard output is no terminal: nothing is cut."""


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _cell(name: str, value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_ns") and isinstance(value, int):
        return format_time(value) if value > 0 else "–"
    if name.endswith("_bytes") and isinstance(value, int | float):
        return format_size(value)
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list):
        return ", ".join(str(item.get("name", item)) if isinstance(item, dict) else str(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(str(key), item)}" for key, item in value.items())
    return str(value)


def _title(name: str) -> str:
    for suffix in ("_ns", "_bytes", "_seconds"):
        name = name.removesuffix(suffix)
    return name.replace("_", " ").replace(".", " ")


def _field(row: Mapping[str, Any], path: str) -> Any:
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


class Output:
    """Where one command's answer goes."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self._console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)
        self._errors = Console(stderr=True, highlight=False)

    def json(self, document: Any) -> None:
        """Print the document."""
        json.dump(document, sys.stdout, ensure_ascii=False, indent=2)
        print()

    def said(self, document: Any, sentence: str) -> None:
        """Print the document, or for people the sentence."""
        if self.as_json:
            self.json(_plain(document))
        else:
            self._console.print(Text(sentence), soft_wrap=True)

    def note(self, sentence: str) -> None:
        """Tell people something on the way to the answer; programs get the answer only."""
        if not self.as_json:
            self._console.print(Text(sentence), soft_wrap=True)

    def rows(self, rows: Iterable[Any], columns: str) -> None:
        """Print a list; people see the columns that are named, `a b.c`."""
        plain = [_plain(row) for row in rows]
        if self.as_json:
            self.json(plain)
            return
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        names = columns.split()
        for name in names:
            table.add_column(_title(name), overflow="fold", justify="right" if name.endswith("_bytes") else "left")
        for row in plain:
            table.add_row(*(Text(_cell(name, _field(row, name))) for name in names))
        self._console.print(table)

    def table(self, document: Any, header: list[str], rows: list[list[str]]) -> None:
        """Print the document, or for people a table made of it."""
        if self.as_json:
            self.json([_plain(item) for item in document] if isinstance(document, list) else _plain(document))
            return
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(Text(name), overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        self._console.print(table)

    def record(self, record: Any) -> None:
        """Print one record; people see a line for each field."""
        plain = _plain(record)
        if self.as_json:
            self.json(plain)
            return
        grid = Table.grid(padding=(0, 2))
        for name, value in plain.items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                for number, item in enumerate(value):
                    grid.add_row(Text(_title(name) if number == 0 else ""), Text(_cell("", item)))
            else:
                grid.add_row(Text(_title(name)), Text(_cell(name, value)))
        self._console.print(grid)

    @contextmanager
    def progress(self, what: str) -> Iterator[Any]:
        """Show a bar on standard error while something runs, if that is a terminal; yields `show(fraction)`."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        with Progress(
            *columns, TimeElapsedColumn(), console=self._errors, transient=True, disable=not self._errors.is_terminal
        ) as bar:
            shown = bar.add_task(what, total=1.0)
            yield lambda fraction: bar.update(shown, completed=fraction)
