"""`dr-cloud logs`: logs of an enterprise's sites, or of the provider, as one archive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, Since, Until, check_new, command, time_or_none, write_new
from dr_cloud.model.cloud import LogRequest

app = group("Logs as one archive.")
Out = Annotated[Path, typer.Option("--out", "-o", help="Write the archive (tar.gz) to this new file.")]


def _fetch(call: Call, task: str, out: Path) -> None:
    archive = call.client.log_archive(task)
    write_new(out, archive)
    call.out.said({"task": task, "file": str(out), "size_bytes": len(archive)}, f"{out}: {len(archive)} bytes")


@command(app, "collect")
def collect(
    call: Call,
    out: Out = Path("logs.tar.gz"),
    site: Annotated[str | None, typer.Option(help="Only of this site or data center.")] = None,
    level: Annotated[Literal["debug", "info", "warning", "error"], typer.Option(help="Least level.")] = "info",
    vdsa: Annotated[bool, typer.Option(help="With what the VDSAs say.")] = True,
    core: Annotated[bool, typer.Option("--core", help="With the state of their cores.")] = False,
    since: Since = "",
    until: Until = "",
    no_wait: NoWait = False,
) -> None:
    """Collect logs and download them."""
    check_new(None if no_wait else out)
    request = LogRequest(
        site=site, level=level, vdsa=vdsa, core=core, since_ns=time_or_none(since), until_ns=time_or_none(until)
    )
    task = call.client.collect_logs(request)
    if no_wait:
        call.task(task, no_wait=True, done="")
    else:
        _fetch(call, call.wait(task).id, out)


@command(app, "fetch")
def fetch(call: Call, task: Annotated[str, typer.Argument(help="The task that collected.")], out: Out) -> None:
    """Download the archive of a collection that is done."""
    _fetch(call, task, out)
