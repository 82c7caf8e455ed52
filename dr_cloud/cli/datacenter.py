"""`dr-cloud datacenter`: the provider's data centers."""

from __future__ import annotations

from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command

app = group("The provider's data centers.")


@command(app, "list")
def list_centers(call: Call) -> None:
    """List data centers with the hosts, clusters, datastores and pools that a target may name."""
    call.out.rows(call.client.data_centers(), "name jurisdiction location hosts datastores denied")


@command(app, "show")
def show(call: Call, name: Annotated[str, typer.Argument(help="The data center.")]) -> None:
    """Show one data center."""
    call.out.record(call.client.data_center(name))
