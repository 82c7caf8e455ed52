"""`dr-cloud probe`: look at the disks of a stack, wherever they are served over NBD, and say pass or fail."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.output import Json, Output
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.probe import ProbeLimits
from dr_cloud.recovery.probes.probe import kinds, load_kind
from dr_cloud.recovery.probes.runner import run_probes
from dr_cloud.recovery.probes.spec import parse_spec, read_specs

app = group("Probes of recovery tests: is what is on these disks good?")


@app.command("list")
def list_probes(json: Json = False) -> None:
    """List the probes that are here, plug-ins too."""
    rows = []
    for kind, place in sorted(kinds().items()):
        try:
            what = (inspect.getdoc(load_kind(kind)) or "").partition("\n")[0]
        except InvalidError as error:
            what = str(error)
        rows.append({"probe": kind, "what": what, "from": place.partition(":")[0]})
    Output(json).rows(rows, "probe what from")


@app.command("run")
def run(
    spec: Annotated[
        list[str] | None, typer.Argument(help="fsck, sqlite:path=/app.db,query=…, command:/path/prog arg, … See list.")
    ] = None,
    disk: Annotated[list[str] | None, typer.Option(help="NAME=NBD-URI. Give each disk of the stack.")] = None,
    file: Annotated[Path | None, typer.Option(help="YAML or JSON file with a list of probes.")] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for scratch space, and where artefacts are kept. Else: none are.")
    ] = None,
    kernel_mounts: Annotated[
        bool, typer.Option(help="Whether this machine's kernel may mount file systems of the disks.")
    ] = True,
    json: Json = False,
) -> None:
    """Run probes, one after another. Nothing on the disks is changed. Exit code 0: all passed, 1: not all."""
    specs = [parse_spec(text) for text in spec or ()] + (read_specs(file) if file else [])
    if not specs or not disk:
        raise typer.BadParameter("give at least one probe and one --disk NAME=NBD-URI")
    disks: dict[str, str] = {}
    for text in disk:
        name, equals, uri = text.partition("=")
        if not (name and equals and uri) or name in disks:
            raise typer.BadParameter(f"{text!r} is not NAME=NBD-URI with a name of its own")
        disks[name] = uri
    limits = ProbeLimits(kernel_mounts=kernel_mounts)
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        results = run_probes(specs, disks, work, limits)
    else:
        with tempfile.TemporaryDirectory(prefix="dr-cloud-probes-") as folder:
            results = [
                result.model_copy(update={"artefacts": []}) for result in run_probes(specs, disks, Path(folder), limits)
            ]
    out = Output(json)
    out.rows(results, "probe verdict seconds reason")
    if not json:
        for result in results:
            if not result.passed and result.output:
                typer.echo(f"── {result.probe} printed:\n{result.output}")
    if not all(result.passed for result in results):
        raise typer.Exit(1)
