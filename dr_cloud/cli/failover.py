"""`dr-cloud failover`: run a protection group's servers from a target."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command, time_or_none
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.recovery import CleanPoint, FailoverRequest
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.units import parse_duration

app = group("Failover of protection groups.")
Then = Literal["wait", "commit", "rollback"]
Vpg = Annotated[str, typer.Argument(help="The protection group.")]


@command(app, "start")
def start(
    call: Call,
    vpg: Vpg,
    target: Annotated[str | None, typer.Option(help="To which target; needed where there are several.")] = None,
    checkpoint: Annotated[int | None, typer.Option(min=0, help="To this checkpoint.")] = None,
    at: Annotated[str, typer.Option(help="To this time (RFC 3339 with a zone). Neither: to the latest.")] = "",
    clean: Annotated[str, typer.Option(metavar="TASK", help="To what this search (find-clean) has found.")] = "",
    reverse: Annotated[bool, typer.Option(help="Whether replication back is wanted after the commit.")] = True,
    then: Annotated[Then, typer.Option(help="What happens by itself, some time later.")] = "wait",
    after: Annotated[str, typer.Option(help="How much later, e.g. 30m.")] = "1h",
    no_wait: NoWait = False,
) -> None:
    """Fail over: servers are recovered on disks that last. Then commit it, or roll it back."""
    if (checkpoint is not None) + bool(at) + bool(clean) > 1:
        raise InvalidError("more than one time is given", "Give one of --checkpoint, --at and --clean.")
    at_ns = time_or_none(at)
    if clean:
        found = _found(call, vpg, clean)
        if target not in (None, found.target):
            raise InvalidError(f"the search was at target {found.target}", "Leave --target out, or name that one.")
        target, at_ns = found.target, found.clean_ns
    request = FailoverRequest(
        target=target,
        checkpoint=checkpoint,
        at_ns=at_ns,
        reverse=reverse,
        then=then,
        after_seconds=int(parse_duration(after)),
    )
    task = call.client.failover(vpg, request)
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    ended = call.wait(task)
    served = [test for test in call.client.tests(vpg) if test.task == ended.id]
    call.out.rows(served, "id at_ns status uris note problem")


def _found(call: Call, vpg: str, search: str) -> CleanPoint:
    task = call.client.task(search)
    if task.type != "clean.find" or task.vpg != vpg:
        raise InvalidError(f"task {search} is not a search for a clean time of {vpg}", "See dr-cloud find-clean.")
    if task.completion is not CompletionCode.SUCCESS or task.result is None:
        raise InvalidError(f"search {search} has not come to its end", f"See dr-cloud task show {search}")
    found = CleanPoint.model_validate(task.result)
    if found.clean_ns is None:
        raise InvalidError(f"search {search} has found no clean time", "Search from an earlier time on.")
    return found


@command(app, "commit")
def commit(call: Call, vpg: Vpg, no_wait: NoWait = False) -> None:
    """Have the recovered servers stay. Ends when their disks need the journal no more; they run meanwhile."""
    call.task(call.client.commit_failover(vpg), no_wait=no_wait, done=f"the servers of {vpg} stay at the target")


@command(app, "release")
def release(
    call: Call,
    vpg: Vpg,
    yes: Annotated[bool, typer.Option("--yes", help="Their disks are deleted; say that you know.")] = False,
    no_wait: NoWait = False,
) -> None:
    """End the servers of a committed failover, and delete their disks."""
    if not yes:
        raise InvalidError(f"this deletes the disks on which the servers of {vpg} run", "Add --yes if you mean it.")
    call.task(call.client.release_failover(vpg), no_wait=no_wait, done=f"the recovered servers of {vpg} are gone")


@command(app, "show")
def show(call: Call, vpg: Vpg) -> None:
    """Show the failovers of a group: their time, where they are served, how far their disks are their own."""
    found = [test for test in call.client.tests(vpg) if test.kind == "failover"]
    call.out.rows(found, "id at_ns status then expires_ns uris statistics ended problem denied")


@command(app, "rollback")
def rollback(call: Call, vpg: Vpg, no_wait: NoWait = False) -> None:
    """Roll a failover back: what was written to the recovered disks is gone, protection goes on."""
    call.task(call.client.rollback_failover(vpg), no_wait=no_wait, done=f"the failover of {vpg} is rolled back")
