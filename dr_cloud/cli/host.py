"""`dr-cloud host`: hosts of a site or a data center, their VDSAs, and the virtual servers on them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, NoWait, command
from dr_cloud.model.cloud import VdsaDeployment, VdsaState

app = group("Hosts, their VDSAs, the virtual servers on them.")
Site = Annotated[str, typer.Argument(help="The site; with --data-center, a data center of the provider.")]
Host = Annotated[str, typer.Argument(help="The host.")]
Center = Annotated[bool, typer.Option("--data-center", help="It is one of the provider's data centers.")]


@command(app, "list")
def list_hosts(
    call: Call,
    site: Site,
    data_center: Center = False,
    vdsa: Annotated[VdsaState | None, typer.Option(help="Only where the VDSA is in this state.")] = None,
) -> None:
    """List hosts, all or by the state of their VDSA."""
    hosts = call.client.center_hosts(site, vdsa) if data_center else call.client.hosts(site, vdsa)
    call.out.rows(hosts, "site name vdsa servers last_seen_ns problem")


@command(app, "deploy")
def deploy(
    call: Call,
    site: Site,
    host: Host,
    data_center: Center = False,
    datastore: Annotated[str, typer.Option(help="Where the appliance lies.")] = "",
    network: Annotated[Literal["dhcp", "static"], typer.Option(help="Kind of its network.")] = "dhcp",
    ip: Annotated[str, typer.Option(help="Its address, if static.")] = "",
    mask: Annotated[str, typer.Option(help="Its subnet mask, if static.")] = "",
    gateway: Annotated[str, typer.Option(help="Its gateway, if static.")] = "",
    no_wait: NoWait = False,
) -> None:
    """Deploy a VDSA on a host."""
    how = VdsaDeployment(datastore=datastore, network=network, ip=ip, mask=mask, gateway=gateway)
    start = call.client.deploy_center_vdsa if data_center else call.client.deploy_vdsa
    call.task(start(site, host, how), no_wait=no_wait, done=f"{host} has a VDSA")


@command(app, "undeploy")
def undeploy(call: Call, site: Site, host: Host, data_center: Center = False, no_wait: NoWait = False) -> None:
    """Undeploy the VDSA of a host."""
    start = call.client.undeploy_center_vdsa if data_center else call.client.undeploy_vdsa
    call.task(start(site, host), no_wait=no_wait, done=f"{host} has no VDSA")


@command(app, "servers")
def servers(call: Call, site: Site) -> None:
    """List the virtual servers that taps of a site have announced."""
    call.out.rows(call.client.servers(site), "name host connected disks vpgs last_seen_ns")


@command(app, "report")
def report(call: Call, site: Site, server: Annotated[str, typer.Argument(help="The virtual server.")]) -> None:
    """Show what is known of a virtual server: file systems, operating system, activity, what looks suspicious."""
    call.out.record(call.client.server_report(site, server))
