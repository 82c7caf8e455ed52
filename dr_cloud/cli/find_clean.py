"""`dr-cloud find-clean`: the last time at which all probes pass."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from dr_cloud.cli.rest import Call, NoWait, command
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.recovery import CleanPoint, CleanRequest, CleanRound
from dr_cloud.model.task import CompletionCode
from dr_cloud.model.units import SECOND_NS, format_time, parse_duration, parse_time
from dr_cloud.recovery.probes.spec import parse_spec, read_specs

app = typer.Typer()
_ONE_WRITE: Final = "one-write"
_LOOK_SECONDS: Final = 1.0
"""How often it is looked for a round that has ended."""


@command(app, "find-clean")
def find_clean(
    call: Call,
    vpg: Annotated[str, typer.Argument(help="The protection group.")],
    since: Annotated[str, typer.Option("--from", help="From this time on (RFC 3339 with a zone).")],
    until: Annotated[str, typer.Option("--to", help="Up to this time.")],
    probe: Annotated[list[str] | None, typer.Option(help="fsck, sqlite:path=/app.db, … See dr-cloud probe.")] = None,
    probes_file: Annotated[Path | None, typer.Option(help="YAML or JSON file with a list of probes.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="How many times to test at once.")] = 8,
    precision: Annotated[
        str, typer.Option("--until", help="How near the last clean and the first dirty time are to be: 1s, 10m, …")
    ] = _ONE_WRITE,
    target: Annotated[str | None, typer.Option(help="At which target; needed where there are several.")] = None,
    no_wait: NoWait = False,
) -> None:
    """Find the last clean time: rounds of recovery tests in parallel. Exit code 1 if there is none."""
    probes = [parse_spec(text) for text in probe or ()] + (read_specs(probes_file) if probes_file else [])
    if not probes:
        raise InvalidError("nothing says what clean is", "Give --probe or --probes-file.")
    request = CleanRequest(
        target=target,
        since_ns=parse_time(since),
        until_ns=parse_time(until),
        probes=probes,
        parallel=parallel,
        precision_ns=0 if precision == _ONE_WRITE else int(parse_duration(precision) * SECOND_NS),
    )
    task = call.client.find_clean(vpg, request)
    if no_wait:
        call.task(task, no_wait=True, done="")
        return
    call.out.note(f"search {task.id}")
    told = 0
    while True:
        rounds = CleanPoint.model_validate(task.result).rounds if task.result else []
        for number, one in enumerate(rounds[told:], start=told + 1):
            call.out.note(_round(number, one))
        told = len(rounds)
        if task.completion is not CompletionCode.NOT_AVAILABLE:
            break
        task = call.client.wait_task(task.id, _LOOK_SECONDS)
    ended = call.wait(task)
    found = CleanPoint.model_validate(ended.result)
    call.out.said(found, "\n".join(_answer(vpg, ended.id, request, found)))
    if found.clean_ns is None:
        raise typer.Exit(1)


def _round(number: int, done: CleanRound) -> str:
    bounds = [f"clean up to {format_time(done.clean_ns)}"] if done.clean_ns is not None else []
    bounds += [f"dirty from {format_time(done.dirty_ns)}"] if done.dirty_ns is not None else []
    silent = f", of which {done.silent} could not say" if done.silent else ""
    left = f"{done.left} left between" if done.left else "nothing left between"
    return f"round {number}: {done.tests} tested{silent}; {'; '.join([*bounds, left])}"


def _answer(vpg: str, task: str, request: CleanRequest, found: CleanPoint) -> list[str]:
    """Return what was found, in words."""
    tests = sum(one.tests for one in found.rounds)
    said = [f"{found.writes} changed blocks, {tests} tests in {len(found.rounds)} rounds, {found.known} known before"]
    if found.clean_ns is not None:
        said.append(f"last clean:  {format_time(found.clean_ns)}")
    if found.dirty_ns is not None:
        said.append(f"first dirty: {format_time(found.dirty_ns)}  {found.reason}")
    else:
        said.append(f"nothing is dirty up to {format_time(request.until_ns)}")
    if found.problem:
        said.append(f"not as near as asked for: {found.problem}")
    if not found.monotone:
        said.append("after a dirty time there are clean ones again; every change from clean to dirty that was seen:")
        said += [f"  {format_time(e.clean_ns)} → {format_time(e.dirty_ns)}  {e.reason}" for e in found.edges]
    if found.checkpoints:
        said.append("tagged checkpoints nearby:")
        said += [f"  {c.number}  {format_time(c.time_ns)}  {c.tag}" for c in found.checkpoints]
    if found.clean_ns is None:
        said.append(f"no clean time is known: dr-cloud find-clean {vpg} --to {format_time(request.since_ns)} --from …")
    else:
        at = format_time(found.clean_ns)
        said.append(f"to recover:  dr-cloud failover start {vpg} --target {found.target} --at {at}")
        said.append(f"         or  dr-cloud failover start {vpg} --clean {task}")
    return said
