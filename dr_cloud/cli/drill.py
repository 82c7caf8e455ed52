"""`dr-cloud drill`: recovery tests that come by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command
from dr_cloud.model.recovery import Drill, DrillSettings
from dr_cloud.model.units import parse_duration, parse_size
from dr_cloud.recovery.probes.spec import parse_spec, read_specs

app = group("Recovery tests that come by themselves.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]
Name = Annotated[str, typer.Argument(help="The drill's name.")]


@command(app, "set")
def set_drill(
    call: Call,
    vpg: Vpg,
    name: Name,
    schedule: Annotated[str, typer.Option(help='Five fields as in crontab(5), in UTC: "0 3 * * 1".')],
    age: Annotated[list[str] | None, typer.Option(help="How long ago a tested time is: 0, 24h, 7d. Several.")] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="What is to be looked at: fsck, sqlite:path=/app.db … See probe list.")
    ] = None,
    probes_file: Annotated[Path | None, typer.Option(help="YAML or JSON file with a list of probes.")] = None,
    ttl: Annotated[str, typer.Option(help="After which time a test is ended, whatever its probes do.")] = "1h",
    target: Annotated[str | None, typer.Option(help="At which target; needed where there are several.")] = None,
    quota: Annotated[str | None, typer.Option(help="How much each test may write, e.g. 10GiB.")] = None,
    note: Annotated[str, typer.Option(help="What it is for.")] = "",
    off: Annotated[bool, typer.Option("--off", help="It runs by hand only, until it is set without this.")] = False,
) -> None:
    """Make a drill, or give it other settings. Its tests are started as yours, from where you sit."""
    settings = DrillSettings(
        name=name,
        schedule=schedule,
        target=target,
        ages_seconds=[parse_duration(text) for text in age or ["0"]],
        probes=[parse_spec(text) for text in probe or ()] + (read_specs(probes_file) if probes_file else []),
        quota_bytes=None if quota is None else parse_size(quota),
        lifetime_seconds=int(parse_duration(ttl)),
        enabled=not off,
        note=note,
    )
    _show(call, call.client.put_drill(vpg, settings))


@command(app, "list")
def list_drills(call: Call, vpg: Vpg) -> None:
    """List the drills of a group: when they are due, how they went."""
    columns = "settings.name settings.schedule next_ns last_ns last_verdict resting problem created_by"
    call.out.rows(call.client.drills(vpg), columns)


@command(app, "show")
def show(call: Call, vpg: Vpg, name: Name) -> None:
    """Show a drill: what it tests, when it is due, how its last run went."""
    _show(call, call.client.drill(vpg, name))


@command(app, "run")
def run(call: Call, vpg: Vpg, name: Name, no_wait: NoWait = False) -> None:
    """Run a drill now, as yours. The tests end by themselves; see them with: drill show, test list."""
    call.task(call.client.run_drill(vpg, name), no_wait=no_wait, done=f"the tests of {name} have begun")


@command(app, "remove")
def remove(call: Call, vpg: Vpg, name: Name) -> None:
    """Remove a drill. Its tests and their reports stay."""
    call.out.said(call.client.remove_drill(vpg, name), f"drill {name} of {vpg} is removed")


def _show(call: Call, drill: Drill) -> None:
    if call.out.as_json:
        call.out.record(drill)
        return
    settings = drill.settings.model_dump(mode="json")
    settings["probes"] = [probe.name or probe.kind for probe in drill.settings.probes]
    call.out.record({**settings, **drill.model_dump(mode="json", exclude={"settings"})})
