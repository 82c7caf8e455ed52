"""`dr-cloud report`: signed reports of recovery tests, and whether one is what was signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.output import Json, Output
from dr_cloud.cli.rest import Call, check_new, command, write_new
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.recovery import ReportFormat, ReportQuery
from dr_cloud.recovery.report import check_report

app = group("Signed reports of recovery tests.")


@command(app, "make")
def make(
    call: Call,
    test: Annotated[list[str] | None, typer.Argument(help="Ids of tests.")] = None,
    task: Annotated[str | None, typer.Option(help="All tests that this task has started.")] = None,
    vpg: Annotated[str | None, typer.Option(help="All tests of this group; or with others: only of it.")] = None,
    drill: Annotated[str | None, typer.Option(help="The last run of this drill of the group.")] = None,
    form: Annotated[ReportFormat, typer.Option("--format", help="html to read, json for programs.")] = "json",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this new file.")] = None,
) -> None:
    """Make one signed report of tests: who, which times, what the probes found, how long it took.

    Keep the file byte by byte: it is signed as it is.
    """
    if out is None:
        raise InvalidError("a report is a file", "Say which: --out FILE")
    check_new(out)
    which = ReportQuery(test=test or [], task=task, vpg=vpg, drill=drill)
    data = call.client.tests_report(which, form)
    write_new(out, data)
    call.out.said({"file": str(out), "bytes": len(data)}, f"the report is in {out}")


@app.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="The report, JSON or HTML.")],
    key: Annotated[
        str, typer.Option(help="The provider's public key: PEM, or a file. Without it the API is asked.")
    ] = "",
    profile: Annotated[str, typer.Option(envvar="DR_CLOUD_PROFILE", help="Which provider's API is asked.")] = "",
    as_json: Json = False,
) -> None:
    """See that a report is what the provider has signed, every byte. Offline, if the key is given."""
    data = _read(file)
    if key.lstrip().startswith("-----BEGIN"):
        public = key
    elif key:
        public = _read(Path(key)).decode(errors="replace")
    else:
        public = Call(profile, "", as_json).client.report_key().public
    report = check_report(data, public)
    verdicts = [test.verdict or "no verdict" for test in report.tests]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
    Output(as_json).said(
        report,
        f"the report is whole: {report.enterprise} at {report.provider}, made {report.made}, tests: {counts}; "
        f"signed by key {report.key}",
    )


@command(app, "key")
def key(
    call: Call, out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it to this new file.")] = None
) -> None:
    """Print the public key of the provider's reports, or write it to a file. Keep it apart from the reports."""
    check_new(out)
    found = call.client.report_key()
    if out is not None:
        write_new(out, found.public.encode())
    call.out.said(found, f"key {found.id} is in {out}" if out is not None else found.public.rstrip())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidError(f"{path} cannot be read: {error.strerror}", "Name a file that is there.") from None
