"""`dr-cloud provider rebuild`: the registry from the store into an empty database."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.actors.rebuild import rebuild_database
from dr_cloud.actors.settings import load_provider, locked

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def rebuild(
    config: Annotated[Path, typer.Option("--config", "-c", help="The provider's configuration.")] = Path(
        "infra/local.yaml"
    ),
    state: Annotated[Path | None, typer.Option(help="Folder of the provider's own files.")] = None,
) -> None:
    """Fill an empty database with the registry that is kept in the store. The provider must not run."""
    loaded = load_provider(config, state)
    with locked(loaded.state):
        for enterprise, number in sorted(rebuild_database(loaded).items()):
            print(f"{enterprise}: as of change {number}")
