"""`dr-cloud failover`: run a protection group's servers from a target."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command, time_or_none
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.recovery import FailoverRequest

app = group("Failover of protection groups.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]


@command(app, "start")
def start(
    call: Call,
    vpg: Vpg,
    target: Annotated[str | None, typer.Option(help="To which target; needed where there are several.")] = None,
    checkpoint: Annotated[int | None, typer.Option(min=0, help="To this checkpoint.")] = None,
    at: Annotated[str, typer.Option(help="To this time (RFC 3339 with a zone). Neither: to the latest.")] = "",
    reverse: Annotated[bool, typer.Option(help="Whether replication back is wanted after the commit.")] = True,
    no_wait: NoWait = False,
) -> None:
    """Fail over: the recovered disks are served, writable. Can be rolled back."""
    if checkpoint is not None and at:
        raise InvalidError("both a checkpoint and a time are given", "Give one of --checkpoint and --at.")
    request = FailoverRequest(target=target, checkpoint=checkpoint, at_ns=time_or_none(at), reverse=reverse)
    task = call.client.failover(vpg, request)
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    ended = call.wait(task)
    served = [test for test in call.client.tests(vpg) if test.task == ended.id]
    call.out.rows(served, "id at_ns status uris note problem")


@command(app, "rollback")
def rollback(call: Call, vpg: Vpg, no_wait: NoWait = False) -> None:
    """Roll a failover back: what was written to the recovered disks is gone, protection goes on."""
    call.task(call.client.rollback_failover(vpg), no_wait=no_wait, done=f"the failover of {vpg} is rolled back")
