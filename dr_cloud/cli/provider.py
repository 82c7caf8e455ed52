"""`dr-cloud provider`: the provider's own processes."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from dr_cloud.actors.manager import rebuild_database
from dr_cloud.actors.settings import load_provider
from dr_cloud.actors.up import RunningProvider, locked

app = typer.Typer(help="The provider's own processes.", no_args_is_help=True)

_Config = Annotated[Path, typer.Option("--config", "-c", help="The provider's configuration.")]
_State = Annotated[Path | None, typer.Option(help="Folder of the provider's own files, in place of the file's.")]
_DEFAULT = Path("infra/local.yaml")


@app.callback()
def _group() -> None:
    """The provider's own processes."""


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


@app.command()
def up(config: _Config = _DEFAULT, state: _State = None) -> None:
    """Start the provider: manager, API, connectors, VDSAs, stacks. Runs until SIGTERM.

    Prints one line when all is ready: where the API is, and where each enterprise's sites dial.
    """
    # Standard output belongs to that one line.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    _on_signals(signal.default_int_handler)
    provider: RunningProvider | None = None
    loaded = load_provider(config, state)
    with locked(loaded.state):
        try:
            provider = RunningProvider(loaded)
            _on_signals(signal.default_int_handler)  # Ray has put its own there.
            print(provider.line, flush=True)
            while True:
                signal.pause()
        except KeyboardInterrupt:
            pass
        finally:
            _on_signals(signal.SIG_IGN)
            if provider is not None:
                provider.close()


@app.command()
def rebuild(config: _Config = _DEFAULT, state: _State = None) -> None:
    """Fill an empty database with the registry that is kept in the store. The provider must not run."""
    loaded = load_provider(config, state)
    with locked(loaded.state):
        for enterprise, rows in sorted(rebuild_database(loaded).items()):
            print(f"{enterprise or 'provider'}: {rows} records")


if __name__ == "__main__":
    app()
