"""`dr-cloud profile`: which providers this person talks to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.cli.lazy import group
from dr_cloud.cli.output import Json, Output
from dr_cloud.cli.profiles import Profile, Profiles
from dr_cloud.client.session import tls_context
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import check_name

app = group("Providers that are known here, each with a token.")
_Name = Annotated[str, typer.Argument(help="The profile.", autocompletion=lambda: sorted(Profiles.load().profiles))]


def _text(path: Path, what: str) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise DrCloudError(f"{what} {path} cannot be read: {reason}", "Name an existing file.") from None


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="A name for it.")],
    url: Annotated[str, typer.Option(help="The provider's API: https://HOST:PORT.")],
    token_file: Annotated[Path, typer.Option(help="File that holds the token; - reads standard input.")],
    ca: Annotated[Path | None, typer.Option(help="The provider's CA certificate (PEM). It is copied.")] = None,
    enterprise: Annotated[str, typer.Option(help="Meant where no --enterprise is given; - is the token's own.")] = "-",
    as_json: Json = False,
) -> None:
    """Add a provider, or replace what is known of it. The token is copied into a file that only you can read."""
    check_name(name, "profile")
    if not url.startswith("https://"):
        raise DrCloudError(f"{url!r} is no https:// address", "Tokens go over TLS only: give https://HOST:PORT.")
    pem = "" if ca is None else _text(ca, "the CA")
    if ca is not None:
        tls_context(pem)
    token = _text(token_file, "the token").strip()
    if not token.isascii() or not token.isprintable() or not token or " " in token:
        raise DrCloudError(f"{token_file} holds no token", "It has one line: the token as it was shown.")
    known = Profiles.load()
    known.profiles[name] = Profile(url=url.rstrip("/"), ca=pem, token=token, enterprise=enterprise)
    known.default = known.default or name
    known.save()
    Output(as_json).said({"profile": name, "url": url, "default": known.default == name}, f"profile {name}: {url}")


@app.command("list")
def list_profiles(as_json: Json = False) -> None:
    """Show all; never their tokens."""
    known = Profiles.load()
    rows = [
        {"profile": name, "url": profile.url, "enterprise": profile.enterprise, "default": name == known.default}
        for name, profile in sorted(known.profiles.items())
    ]
    Output(as_json).rows(rows, "profile url enterprise default")


@app.command()
def use(name: _Name, as_json: Json = False) -> None:
    """Make one the default. DR_CLOUD_PROFILE and --profile come before it."""
    known = Profiles.load()
    known.get(name)
    known.default = name
    known.save()
    Output(as_json).said({"default": name}, f"{name} is the default")


@app.command()
def remove(name: _Name, as_json: Json = False) -> None:
    """Forget one, and its token. The token itself stays valid until it is revoked."""
    known = Profiles.load()
    known.get(name)
    del known.profiles[name]
    if known.default == name:
        known.default = next(iter(known.profiles)) if len(known.profiles) == 1 else ""
    known.save()
    Output(as_json).said({"removed": name}, f"{name} is forgotten")
