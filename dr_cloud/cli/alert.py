"""`dr-cloud alert`: what someone should look at."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command

app = group("What someone should look at.")


@command(app, "list")
def list_alerts(
    call: Call, cleared: Annotated[bool, typer.Option("--cleared", help="Also those that are over.")] = False
) -> None:
    """List alerts."""
    call.out.rows(call.client.alerts(cleared), "raised_ns cleared_ns enterprise kind subject message remedy")
