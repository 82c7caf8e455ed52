"""`dr-cloud checkpoint`: the times of a protection group that can be recovered to."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, Since, Until, command, time_or_none
from dr_cloud.model.cloud import CheckpointFilter, CheckpointOrder, InsertedCheckpoint
from dr_cloud.model.errors import LimitError

app = group("Checkpoints of protection groups.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]
TimeOut = Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait.")]
Poll = Annotated[float, typer.Option(min=0.05, max=60, help="Seconds between looks.")]


@command(app, "list")
def list_checkpoints(
    call: Call,
    vpg: Vpg,
    target: Annotated[str | None, typer.Option(help="Only at this target.")] = None,
    since: Since = "",
    until: Until = "",
    tag: Annotated[str | None, typer.Option(help="Only with this tag.")] = None,
    testable: Annotated[bool, typer.Option("--testable", help="Only times that can be recovered to.")] = False,
) -> None:
    """List a group's checkpoints."""
    which = CheckpointFilter(
        since_ns=time_or_none(since), until_ns=time_or_none(until), tag=tag, testable=testable or None
    )
    rows = call.client.checkpoints(vpg, target, which)
    call.out.rows(rows, "target number time_ns exact_from_ns kind tag description testable")


@command(app, "writes")
def writes(
    call: Call,
    vpg: Vpg,
    target: Annotated[str | None, typer.Option(help="As the journal at this target tells it.")] = None,
    since: Since = "",
    until: Until = "",
) -> None:
    """List when was written: the times to choose from when the last clean one is searched."""
    rows = call.client.writes(vpg, target, time_or_none(since), time_or_none(until))
    call.out.rows(rows, "time_ns blocks exact")


def _told(call: Call, seen: InsertedCheckpoint) -> None:
    if not seen.complete:
        missing = ", ".join(sorted(set(seen.targets) - set(seen.arrived)))
        raise LimitError(f"checkpoint {seen.id} ({seen.tag}) has not arrived at {missing}", "Wait again.")
    call.out.said(seen, f"checkpoint {seen.id} ({seen.tag}) is in the journal of {', '.join(seen.targets)}")


@command(app, "insert")
def insert(
    call: Call,
    vpg: Vpg,
    tag: Annotated[str, typer.Argument(help="Its name.")],
    description: Annotated[str, typer.Option(help="What it marks.")] = "",
    wait: Annotated[float, typer.Option(min=0, help="Wait so many seconds until it is in every journal.")] = 0.0,
) -> None:
    """Insert a tagged checkpoint. Returns at once, unless told to wait."""
    made = call.client.insert_checkpoint(vpg, CheckpointOrder(tag=tag, description=description))
    if wait:
        _told(call, call.client.wait_checkpoint(vpg, made.id, wait))
    else:
        call.out.said(made, f"checkpoint {made.id} ({tag}) is asked for")


@command(app, "show")
def show(call: Call, vpg: Vpg, id: Annotated[str, typer.Argument(help="As `insert` gave it.")]) -> None:
    """Show whether an inserted checkpoint has arrived."""
    call.out.record(call.client.inserted_checkpoint(vpg, id))


@command(app, "wait")
def wait(
    call: Call,
    vpg: Vpg,
    id: Annotated[str, typer.Argument(help="As `insert` gave it.")],
    timeout: TimeOut = 60.0,
    poll: Poll = 0.5,
) -> None:
    """Wait until an inserted checkpoint is in every target's journal."""
    _told(call, call.client.wait_checkpoint(vpg, id, timeout, poll))
