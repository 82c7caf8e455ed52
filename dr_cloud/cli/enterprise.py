"""`dr-cloud enterprise`: the provider's tenants."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, command
from dr_cloud.model.cloud import EnterpriseUpdate
from dr_cloud.model.provider import EnterpriseConfig, load_yaml

app = group("The provider's tenants.")
Name = Annotated[str, typer.Argument(help="The enterprise.")]


@command(app, "list")
def list_enterprises(call: Call) -> None:
    """List enterprises."""
    call.out.rows(call.client.enterprises(), "name title owner jurisdiction sites link")


@command(app, "show")
def show(call: Call, name: Annotated[str, typer.Argument(help="The token's own, if not given.")] = "") -> None:
    """Show one enterprise."""
    call.out.record(call.client.enterprise(name))


@command(app, "register")
def register(call: Call, file: Annotated[Path, typer.Argument(help="YAML: name, jurisdiction, sites …")]) -> None:
    """Register an enterprise with its sites."""
    made = call.client.register_enterprise(load_yaml(file, EnterpriseConfig))
    call.out.said(made, f"{made.name} is registered; its sites dial {made.link or '(not yet known)'}")


@command(app, "update")
def update(
    call: Call,
    name: Name,
    title: Annotated[str | None, typer.Option(help="Its full name.")] = None,
    owner: Annotated[str | None, typer.Option(help="Who owns it.")] = None,
) -> None:
    """Change what is told of an enterprise."""
    call.client.enterprise_name = name
    call.out.record(call.client.update_enterprise(EnterpriseUpdate(title=title, owner=owner)))


@command(app, "remove")
def remove(call: Call, name: Name) -> None:
    """Remove an enterprise that has no protection groups. Its tokens and certificates are revoked."""
    call.client.remove_enterprise(name)
    call.out.said({"removed": name}, f"{name} is removed")
