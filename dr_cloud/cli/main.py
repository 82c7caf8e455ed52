"""`dr-cloud`: the one command, with a subcommand for each process and each operation.

Exit codes: 0 done, 1 it failed (one line on stderr says what to do), 2 wrong usage, 3 not allowed.
"""

from __future__ import annotations

import sys
from typing import Final

import typer

from dr_cloud.cli.lazy import lazy_group
from dr_cloud.model.errors import DrCloudError, ForbiddenError

COMMANDS: Final = {
    name: f"dr_cloud.cli.{name.replace('-', '_')}"
    for name in (
        "alert",
        "audit",
        "checkpoint",
        "datacenter",
        "demo",
        "drill",
        "enterprise",
        "failover",
        "find-clean",
        "health",
        "host",
        "keyring",
        "logs",
        "probe",
        "profile",
        "provider",
        "report",
        "rights",
        "site",
        "tap",
        "task",
        "test",
        "token",
        "vdsa",
        "vpg",
    )
}
"""By name, the module whose `app` it is."""

app = typer.Typer(cls=lazy_group(COMMANDS), no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _describe() -> None:
    """Continuous data protection, and recovery tests at any number of past times in parallel."""


def main() -> None:
    """Run the command; an operating error is one line on stderr that says what to do, and exit code 1 or 3."""
    try:
        app()
    except DrCloudError as error:
        print(f"dr-cloud: {error}. {error.remedy}".rstrip(), file=sys.stderr)
        sys.exit(3 if isinstance(error, ForbiddenError) else 1)


if __name__ == "__main__":
    main()
