"""`dr-cloud provider up`: the provider in the foreground."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer

from dr_cloud.actors.settings import load_provider, locked
from dr_cloud.actors.up import RunningProvider

app = typer.Typer(pretty_exceptions_enable=False)


def _on_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


@app.command()
def up(
    config: Annotated[Path, typer.Option("--config", "-c", help="The provider's configuration.")] = Path(
        "infra/local.yaml"
    ),
    state: Annotated[Path | None, typer.Option(help="Folder of the provider's own files, not the file's.")] = None,
) -> None:
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
            if provider is not None and not provider.close():
                # Ray's own end would wait for what has gone.
                os._exit(0)
