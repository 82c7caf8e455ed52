"""`dr-cloud`: the one command, with a subcommand for each process and each operation."""

from __future__ import annotations

import sys

import typer

from dr_cloud.cli import vdsa
from dr_cloud.cli.demo import demo
from dr_cloud.cli.tap import tap
from dr_cloud.model.errors import DrCloudError

app = typer.Typer(
    help="Continuous data protection, and recovery tests at any number of past times in parallel.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(demo)
app.command()(tap)
app.add_typer(vdsa.app, name="vdsa")


def main() -> None:
    """Run the command; an operating error is one line on stderr that says what to do, and exit code 1."""
    try:
        app()
    except DrCloudError as error:
        print(f"dr-cloud: {error}. {error.remedy}".rstrip(), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
