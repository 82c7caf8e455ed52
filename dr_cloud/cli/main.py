"""`dr-cloud`: the one command, with a subcommand for each process and each operation.

A subcommand's module is imported when it is asked for: a tap on an enterprise's host carries neither Ray nor an object
store in its memory.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any, Final

import typer
from typer.core import TyperGroup

from dr_cloud.model.errors import DrCloudError

COMMANDS: Final = {
    "demo": "dr_cloud.cli.demo",
    "keyring": "dr_cloud.cli.keyring",
    "tap": "dr_cloud.cli.tap",
    "vdsa": "dr_cloud.cli.vdsa",
}


class _Commands(TyperGroup):
    """The subcommands, each the `app` of its module."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(importlib.import_module(COMMANDS[cmd_name]).app)
        command.name = cmd_name
        return command


app = typer.Typer(cls=_Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _describe() -> None:
    """Continuous data protection, and recovery tests at any number of past times in parallel."""


def main() -> None:
    """Run the command; an operating error is one line on stderr that says what to do, and exit code 1."""
    try:
        app()
    except DrCloudError as error:
        print(f"dr-cloud: {error}. {error.remedy}".rstrip(), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
