"""`dr-cloud health`: how everything stands, and what changes."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command
from dr_cloud.model.units import format_time

app = group("How everything stands, and what changes.")


@command(app, "show")
def show(call: Call) -> None:
    """Show how sites, links and protection groups stand."""
    call.out.record(call.client.health())


@command(app, "follow")
def follow(
    call: Call,
    after: Annotated[int | None, typer.Option(min=0, help="From after this event; 0: all that are kept.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many events. --json needs it.")] = None,
) -> None:
    """Show tasks, checkpoints, health and alerts as they change, until interrupted."""
    events = islice(call.client.events(after), count)
    if call.out.as_json:
        if count is None:
            raise typer.BadParameter("with --json say --count: it prints one document")
        call.out.rows(events, "")
        return
    for event in events:
        what = " ".join(f"{key}={value}" for key, value in event.data.items())
        call.out.said(None, f"{event.number} {format_time(event.at_ns)} {event.enterprise} {event.subject} {what}")
