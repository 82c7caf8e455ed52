"""`dr-cloud site`: sites of an enterprise, as the provider knows them; `site up` runs one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from dr_cloud.cli.lazy import group, lazy_group
from dr_cloud.cli.rest import Call, check_new, command, write_new
from dr_cloud.model.cloud import SiteUpdate
from dr_cloud.model.replication import Throttle, ThrottleWindow
from dr_cloud.model.units import format_time, parse_size

COMMANDS: Final = {"up": "dr_cloud.cli.site_up"}
app = group("Sites: run one; pair, show, change them.", lazy_group(COMMANDS))
Site = Annotated[str, typer.Argument(help="The site.")]


@command(app, "list")
def list_sites(call: Call) -> None:
    """List an enterprise's sites."""
    call.out.rows(
        call.client.sites(), "enterprise name jurisdiction location paired connected last_seen_ns version denied"
    )


@command(app, "show")
def show(call: Call, site: Site) -> None:
    """Show a site: information, address and port, VDSA port, pairing, link."""
    call.out.record(call.client.site(site))


def _window(text: str) -> ThrottleWindow:
    hours, equals, rate = text.partition("=")
    since, dash, until = hours.partition("-")
    if not equals or not dash:
        raise typer.BadParameter(f"{text!r} is not HH:MM-HH:MM=SIZE")
    return ThrottleWindow(since=since, until=until, bytes_per_second=parse_size(rate))


@command(app, "update")
def update(
    call: Call,
    site: Site,
    location: Annotated[str | None, typer.Option(help="Where it is.")] = None,
    contact: Annotated[str | None, typer.Option(help="Who looks after it.")] = None,
    address: Annotated[str | None, typer.Option(help="Address of its manager.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port of its manager.")] = None,
    vdsa_port: Annotated[int | None, typer.Option(min=0, max=65535, help="TCP port of its VDSAs.")] = None,
    throttle: Annotated[str | None, typer.Option(help="Most bytes a second over its link, e.g. 20MiB; 0: any.")] = None,
    throttle_at: Annotated[list[str] | None, typer.Option(help="At hours (UTC): 08:00-18:00=5MiB.")] = None,
) -> None:
    """Change a site. What is not given stays."""
    limit = None
    if throttle is not None or throttle_at:
        windows = [_window(text) for text in throttle_at or []]
        limit = Throttle(bytes_per_second=parse_size(throttle or "0"), windows=windows)
    changes = SiteUpdate(
        location=location, contact=contact, address=address, port=port, vdsa_port=vdsa_port, throttle=limit
    )
    call.out.record(call.client.update_site(site, changes))


@command(app, "pair")
def pair(
    call: Call,
    site: Site,
    hours: Annotated[float, typer.Option(min=0.02, max=168, help="How long the token may be used.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Write the token to this new file (0600), do not print it.")] = None,
) -> None:
    """Make a one-time pairing token for the site's configuration."""
    check_new(out)
    made = call.client.create_pairing(site, int(hours * 3600))
    until = f"valid once, until {format_time(made.expires_ns)}"
    if out is not None:
        write_new(out, f"{made.token}\n".encode())
        call.out.said(made.model_dump(exclude={"token"}), f"pairing token of {site} is in {out}; {until}")
    else:
        call.out.said(made, f"{made.token}\n{until}; shown only now")


@command(app, "unpair")
def unpair(call: Call, site: Site) -> None:
    """Unpair a site: its certificate is revoked, its link closed."""
    call.out.said(call.client.unpair(site), f"{site} is unpaired")
