"""Groups of commands, and groups whose subcommands are imported when they are asked for.

A tap on an enterprise's host carries neither Ray nor an object store in its memory; a client of the API no event loop.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import typer
from typer.core import TyperGroup


def lazy_group(modules: Mapping[str, str]) -> type[TyperGroup]:
    """Return a kind of group that has, beside its own commands, the `app` of each of these modules by name."""

    class Lazy(TyperGroup):
        def list_commands(self, ctx: Any) -> list[str]:
            return [*modules, *super().list_commands(ctx)]

        def get_command(self, ctx: Any, cmd_name: str) -> Any:
            if cmd_name not in modules:
                return super().get_command(ctx, cmd_name)
            command = typer.main.get_command(importlib.import_module(modules[cmd_name]).app)
            command.name = cmd_name
            return command

    return Lazy


def group(what: str, kind: type[TyperGroup] = TyperGroup) -> typer.Typer:
    """Return an empty group. It stays a group when it has but one command."""
    app = typer.Typer(help=what, no_args_is_help=True, cls=kind)
    app.callback()(lambda: None)
    return app
