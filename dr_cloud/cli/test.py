"""`dr-cloud test`: recovery tests at any number of past times, in parallel."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.recovery import StopTest, TestsRequest, Verdict
from dr_cloud.model.units import parse_size, parse_time

app = group("Recovery tests at past times, in parallel.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]
TestId = Annotated[str, typer.Argument(help="The test's id.")]
_COLUMNS = "id vpg target status at_ns seconds verdict verdict_note problem"


@command(app, "start")
def start(
    call: Call,
    vpg: Vpg,
    at: Annotated[list[str], typer.Option(help="A time (RFC 3339 with a zone). Give as many as you like.")],
    target: Annotated[str | None, typer.Option(help="At which target; needed where there are several.")] = None,
    quota: Annotated[str | None, typer.Option(help="How much each test may write, e.g. 10GiB.")] = None,
    note: Annotated[str, typer.Option(help="Why it is tested.")] = "",
    no_wait: NoWait = False,
) -> None:
    """Start tests, one at each time, all at once; shows where their disks are served."""
    if quota is not None and parse_size(quota) == 0:
        raise InvalidError("a test with a quota of 0 cannot run", "Leave --quota out for what the node allows.")
    request = TestsRequest(
        target=target,
        times_ns=[parse_time(text) for text in at],
        quota_bytes=None if quota is None else parse_size(quota),
        note=note,
    )
    task = call.client.start_tests(vpg, request)
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    ended = call.wait(task)
    tests = [test for test in call.client.tests(vpg) if test.task == ended.id]
    call.out.rows(tests, "id at_ns status uris note problem denied")


@command(app, "list")
def list_tests(call: Call, vpg: Annotated[str | None, typer.Argument(help="Only of this group.")] = None) -> None:
    """List tests: their times, how long they ran, their verdicts."""
    call.out.rows(call.client.tests(vpg), _COLUMNS)


@command(app, "show")
def show(call: Call, test: TestId) -> None:
    """Show one test."""
    call.out.record(call.client.test(test))


@command(app, "stop")
def stop(
    call: Call,
    test: TestId,
    verdict: Annotated[Verdict | None, typer.Option(help="How it went.")] = None,
    note: Annotated[str, typer.Option(help="What was found.")] = "",
    no_wait: NoWait = False,
) -> None:
    """Stop one test and mark it; the others go on. Its writes are gone."""
    task = call.client.stop_test(test, StopTest(verdict=verdict, note=note))
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    call.wait(task)
    call.out.record(call.client.test(test))


@command(app, "discard")
def discard(
    call: Call, vpg: Vpg, count: Annotated[int, typer.Option(min=1, help="How many, from the oldest on.")]
) -> None:
    """Forget the oldest tests that have ended."""
    number = call.client.discard_tests(vpg, count)
    call.out.said({"discarded": number}, f"{number} tests of {vpg} are forgotten")
