"""`dr-cloud vpg`: protection groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command
from dr_cloud.model.cloud import VpgFilter
from dr_cloud.model.errors import InvalidError
from dr_cloud.model.provider import load_yaml
from dr_cloud.model.units import parse_size
from dr_cloud.model.vpg import Order, ProtectedServer, TargetConfig, VpgSettings, VpgStatus

app = group("Protection groups.")
Vpg = Annotated[str, typer.Argument(help="The protection group.")]
File = Annotated[Path | None, typer.Option("--file", "-f", help="YAML with all settings, in place of the options.")]
Source = Annotated[str | None, typer.Option(help="Where its servers run.")]
Servers = Annotated[
    list[str] | None, typer.Option("--server", help="SERVER, or SERVER:DISK,DISK for some of its disks.")
]
Targets = Annotated[
    list[str] | None, typer.Option("--target", help="NAME=SITE:HOST:DATASTORE; clusters and pools too.")
]
Seconds = Annotated[float | None, typer.Option(help="Between checkpoints.")]
OrderOption = Annotated[Order | None, typer.Option(help="How writes of several hosts are ordered.")]
Hours = Annotated[float | None, typer.Option(help="How much history is kept.")]
Territory = Annotated[list[str] | None, typer.Option(help="A jurisdiction that targets may be in; none: any.")]
Limit = Annotated[str | None, typer.Option("--throttle", help="Most bytes a second, e.g. 20MiB; 0: any.")]
Description = Annotated[str | None, typer.Option(help="What it is for.")]
Force = Annotated[bool, typer.Option("--force", help="Also where it could not be done otherwise.")]
OneTarget = Annotated[str | None, typer.Option(help="Only at this target.")]


def parse_server(text: str) -> ProtectedServer:
    """Return what `SERVER` or `SERVER:DISK,DISK` says."""
    name, _, disks = text.partition(":")
    return ProtectedServer(name=name, disks=[disk for disk in disks.split(",") if disk])


def _target(text: str) -> TargetConfig:
    name, equals, place = text.partition("=")
    parts = place.split(":")
    if not equals or len(parts) != 3:
        raise typer.BadParameter(f"{text!r} is not NAME=SITE:HOST:DATASTORE")
    return TargetConfig(name=name, site=parts[0], host=parts[1], datastore=parts[2])


def _settings(file: Path | None, base: dict[str, Any], **given: Any) -> VpgSettings:
    """Return `base` with what options say; or what a file says, whose name for the group must be the same."""
    if file is not None:
        settings = load_yaml(file, VpgSettings)
        if settings.name != base["name"]:
            raise InvalidError(f"{file} is of the group {settings.name}, not {base['name']}", "Name the right one.")
        return settings
    changes = {name: value for name, value in given.items() if value not in (None, [])}
    if "servers" in changes:
        changes["servers"] = [parse_server(text) for text in changes["servers"]]
    if "targets" in changes:
        changes["targets"] = [_target(text) for text in changes["targets"]]
    if "throttle_bytes_per_second" in changes:
        changes["throttle_bytes_per_second"] = parse_size(changes["throttle_bytes_per_second"])
    return VpgSettings.model_validate(base | changes)


@command(app, "list")
def list_vpgs(
    call: Call,
    status: Annotated[VpgStatus | None, typer.Option(help="Only in this status.")] = None,
    source: Annotated[str | None, typer.Option(help="Only from this site.")] = None,
    target: Annotated[str | None, typer.Option(help="Only to this site.")] = None,
    begins: Annotated[str | None, typer.Option(help="Only names that begin so.")] = None,
) -> None:
    """List protection groups."""
    which = VpgFilter(status=status, source_site=source, target_site=target, name_begins=begins)
    vpgs = call.client.vpgs(which)
    call.out.rows(vpgs, "enterprise name status settings.source_site settings.servers settings.targets paused problem")


@command(app, "show")
def show(call: Call, vpg: Vpg) -> None:
    """Show one group: settings, status, targets with lag and history, disks."""
    call.out.record(call.client.vpg(vpg))


@command(app, "create")
def create(
    call: Call,
    vpg: Vpg,
    file: File = None,
    source: Source = None,
    servers: Servers = None,
    targets: Targets = None,
    checkpoint_seconds: Seconds = None,
    order: OrderOption = None,
    history_hours: Hours = None,
    territory: Territory = None,
    throttle: Limit = None,
    description: Description = None,
    no_wait: NoWait = False,
) -> None:
    """Create a protection group; replication begins."""
    settings = _settings(
        file,
        {"name": vpg},
        source_site=source,
        servers=servers,
        targets=targets,
        checkpoint_seconds=checkpoint_seconds,
        order=order,
        history_hours=history_hours,
        territory=territory,
        throttle_bytes_per_second=throttle,
        description=description,
    )
    call.task(call.client.create_vpg(settings), no_wait=no_wait, done=f"{vpg} is protected")


@command(app, "update")
def update(
    call: Call,
    vpg: Vpg,
    file: File = None,
    source: Source = None,
    servers: Servers = None,
    targets: Targets = None,
    checkpoint_seconds: Seconds = None,
    order: OrderOption = None,
    history_hours: Hours = None,
    territory: Territory = None,
    throttle: Limit = None,
    description: Description = None,
    force: Force = False,
    no_wait: NoWait = False,
) -> None:
    """Change a group's settings. What is not given stays; servers, targets and territory are given whole."""
    settings = _settings(
        file,
        call.client.vpg(vpg).settings.model_dump(),
        source_site=source,
        servers=servers,
        targets=targets,
        checkpoint_seconds=checkpoint_seconds,
        order=order,
        history_hours=history_hours,
        territory=territory,
        throttle_bytes_per_second=throttle,
        description=description,
    )
    call.task(call.client.update_vpg(vpg, settings, force), no_wait=no_wait, done=f"{vpg} is changed")


@command(app, "remove")
def remove(call: Call, vpg: Vpg, force: Force = False, no_wait: NoWait = False) -> None:
    """Remove a group. Not during a test or a failover, unless forced."""
    call.task(call.client.remove_vpg(vpg, force), no_wait=no_wait, done=f"{vpg} is removed")


@command(app, "add-server")
def add_server(
    call: Call,
    vpg: Vpg,
    server: Annotated[str, typer.Argument(help="SERVER, or SERVER:DISK,DISK.")],
    boot_order: Annotated[int, typer.Option(min=0, help="Its place when the group is started.")] = 0,
    no_wait: NoWait = False,
) -> None:
    """Add a virtual server to a group."""
    added = parse_server(server).model_copy(update={"boot_order": boot_order})
    call.task(call.client.add_server(vpg, added), no_wait=no_wait, done=f"{added.name} is in {vpg}")


@command(app, "remove-server")
def remove_server(
    call: Call, vpg: Vpg, server: Annotated[str, typer.Argument(help="The server.")], no_wait: NoWait = False
) -> None:
    """Take a virtual server out of a group."""
    call.task(call.client.remove_server(vpg, server), no_wait=no_wait, done=f"{server} is no longer in {vpg}")


@command(app, "status")
def status(call: Call, vpg: Vpg) -> None:
    """Tell a group's status."""
    now = call.client.vpg_status(vpg)
    call.out.said({"status": now}, now)


@command(app, "state")
def state(call: Call, vpg: Vpg) -> None:
    """Tell a group's state: 0 protected, 1 recovered."""
    now = call.client.vpg_state(vpg)
    call.out.said({"state": int(now)}, f"{int(now)} {now.name.lower()}")


@command(app, "pause")
def pause(call: Call, vpg: Vpg, reason: Annotated[str, typer.Option(help="Why.")] = "") -> None:
    """Pause replication. What is written meanwhile is remembered."""
    call.out.said(call.client.pause(vpg, reason), f"{vpg} is paused")


@command(app, "resume")
def resume(call: Call, vpg: Vpg) -> None:
    """Let replication go on."""
    call.out.said(call.client.resume(vpg), f"{vpg} goes on")


@command(app, "force-sync")
def force_sync(call: Call, vpg: Vpg, target: OneTarget = None, no_wait: NoWait = False) -> None:
    """Compare all disks with the target and send what differs."""
    call.task(call.client.force_sync(vpg, target), no_wait=no_wait, done=f"{vpg} is synchronised")


@command(app, "reverse-settings")
def reverse_settings(call: Call, vpg: Vpg, target: OneTarget = None) -> None:
    """Show the settings that reverse replication would begin with."""
    call.out.record(call.client.reverse_settings(vpg, target))


@command(app, "active-task")
def active_task(
    call: Call, vpg: Vpg, site: Annotated[str | None, typer.Option(help="At this site only.")] = None
) -> None:
    """Show the task that is at work on a group."""
    found = call.client.active_task(vpg) if site is None else call.client.active_task_at_site(vpg, site)
    if found is None:
        call.out.said(None, f"no task is at work on {vpg}")
    else:
        call.out.record(found)
