"""The page that maps web services to operations says what the API, the client and the command line are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from dr_cloud.api.app import make_app
from dr_cloud.cli.main import app as command_line
from dr_cloud.client.client import Client
from dr_cloud.manager.cloud import Cloud

PAGE = (Path(__file__).parents[2] / "docs" / "api-mapping.md").read_text()
NOT_REST = {"once", "authenticate", "known_caller"}
"""Methods of the manager that serve other operations."""
FROM_THE_FABRIC = {"renew"}


@pytest.fixture(scope="module")
def operations() -> dict[str, str]:
    """Return by its name how each operation is reached."""
    document = make_app(Cloud.__new__(Cloud)).openapi()
    return {
        operation["operationId"]: f"{method.upper()} {path.removeprefix('/v1').replace('{enterprise}', '{e}')}"
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def rows() -> dict[str, tuple[str, str]]:
    table = PAGE[PAGE.index("## All operations") :]
    found = re.findall(r"^\| `(\w+)` \| ([A-Z]+) `([^`]+)` \| `([^`]+)` \|$", table, re.MULTILINE)
    return {name: (f"{method} {path}", command) for name, method, path, command in found}


def test_the_page_lists_every_operation(operations: dict[str, str]) -> None:
    """R21: everything the console does, the API does."""
    assert {name: path for name, (path, _) in rows().items()} == operations


def test_every_method_of_the_web_services_has_its_operation(operations: dict[str, str]) -> None:
    """R16, R17, R18, R19, R20: each method of appendices I–V is an operation."""
    services = PAGE[: PAGE.index("## All operations")]
    lines = [line for line in services.splitlines() if line.startswith("| ") and "| method |" not in line]
    named = [{word for word in re.findall(r"`(\w+)`", line.split("|")[2]) if word in operations} for line in lines]
    assert len(lines) >= 6 + 6 + 13 + 8 + 1
    assert [line for line, operation in zip(lines, named, strict=True) if not operation] == []


def test_every_operation_is_a_method_of_the_client(operations: dict[str, str]) -> None:
    assert sorted(name for name in operations if not callable(getattr(Client, name, None))) == []


def test_every_operation_of_the_manager_is_in_the_api(operations: dict[str, str]) -> None:
    asked_by_people = {
        name
        for name, method in inspect.getmembers(Cloud, inspect.isfunction)
        if not name.startswith("_") and "who" in inspect.signature(method).parameters
    }
    assert sorted(asked_by_people - NOT_REST - set(operations) - {"newest_event"}) == []


def every_command() -> set[str]:
    def walk(command: Any, path: tuple[str, ...]) -> set[str]:
        if not hasattr(command, "list_commands"):
            return {" ".join(path)}
        with command.make_context("dr-cloud", [], resilient_parsing=True) as context:
            return {
                found
                for name in command.list_commands(context)
                for found in walk(command.get_command(context, name), (*path, name))
            }

    return walk(typer.main.get_command(command_line), ())


def test_every_operation_has_its_command() -> None:
    """R21: every operation of the API is a command."""
    assert sorted({command for _, command in rows().values()} - every_command()) == []
