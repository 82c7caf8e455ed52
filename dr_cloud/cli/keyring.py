"""`dr-cloud keyring`: the local keyring of enterprises' keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.seal.keyring import Keyring

app = typer.Typer(help="The local keyring of enterprises' keys.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """The local keyring of enterprises' keys."""


@app.command()
def create(
    enterprise: Annotated[str, typer.Argument(help="The enterprise.")],
    keyring: Annotated[Path, typer.Option(help="The keyring's file. Made if it is not there.")],
) -> None:
    """Make a key for an enterprise, unless it has one. Both sides need the same: copy the file, keep it secret."""
    Keyring.open(keyring).create(enterprise)
    print(f"{keyring} has a key of {enterprise}; without it its data cannot be read: back it up")
