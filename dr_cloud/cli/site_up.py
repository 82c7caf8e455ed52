"""`dr-cloud site up`: an enterprise's site in the foreground. Also `python -m dr_cloud.cli.site_up`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from dr_cloud.model.errors import DrCloudError
from dr_cloud.site.config import load_settings
from dr_cloud.site.logs import SiteLog
from dr_cloud.site.process import serve
from dr_cloud.site.state import StateFolder
from dr_cloud.tap.memory import keep_freed_memory

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def up(
    config: Annotated[Path, typer.Option("--config", "-c", help="The site's configuration file (YAML).")],
) -> None:
    """Run an enterprise's site: its VDSA and its end of the link to the provider. Runs until SIGTERM.

    The first start needs a pairing token in the configuration. Prints one line when ready.
    """
    keep_freed_memory()
    # A record per write makes many short-lived tuples and no cycles: collect seldom, and not what start-up made.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    try:
        settings = load_settings(config)
        state = StateFolder(settings.state)
        log = SiteLog.start(state.path / "logs")
        try:
            uvloop.run(serve(settings, state, log, lambda line: print(line, flush=True)))
        finally:
            log.close()
            state.close()
    except (DrCloudError, OSError) as error:
        print(f"dr-cloud site up: {error}. {getattr(error, 'remedy', '')}".rstrip(), file=sys.stderr)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
