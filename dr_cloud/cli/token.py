"""`dr-cloud token`: who may call the API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.rest import Call, check_new, command, write_new
from dr_cloud.model.cloud import TokenRequest
from dr_cloud.model.principal import Role

app = group("Who may call the API, and as what.")


@command(app, "list")
def list_tokens(call: Call) -> None:
    """List tokens, without their secrets."""
    call.out.rows(call.client.tokens(), "id name role enterprise place expires_ns revoked_ns last_used_ns")


@command(app, "create")
def create(
    call: Call,
    name: Annotated[str, typer.Argument(help="For whom or what it is.")],
    role: Annotated[Role, typer.Option(help="What its bearer may do.")],
    days: Annotated[int, typer.Option(min=1, max=366, help="How long it lasts.")] = 90,
    place: Annotated[
        str | None, typer.Option(help="The jurisdiction its bearer sits in; without: the enterprise's own.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the secret to this new file (0600), do not print it.")] = None,
) -> None:
    """Make a token, of the enterprise that --enterprise names, or of the provider. Its secret is shown once."""
    check_new(out)
    own = call.client.enterprise_name
    request = TokenRequest(
        name=name,
        role=role,
        enterprise=None if own == "-" else own,
        place=place,
        lifetime_seconds=days * 86400,
    )
    made = call.client.create_token(request)
    if out is not None:
        write_new(out, f"{made.secret}\n".encode())
        call.out.said(made.token, f"token {made.token.id} ({role}) is in {out}")
    else:
        call.out.said(made, f"token {made.token.id} ({role}), shown only now: {made.secret}")


@command(app, "revoke")
def revoke(call: Call, token: Annotated[str, typer.Argument(help="Its id.")]) -> None:
    """Revoke a token."""
    call.out.said(call.client.revoke_token(token), f"token {token} is revoked")
