"""`dr-cloud demo`: the whole picture on real input, on this machine, in under two minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dr_cloud.demo.run import run_demo

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def demo(
    json: Annotated[Path | None, typer.Option(help="Write the report to this file as JSON.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Save what is shown as a picture.")] = None,
    stacks: Annotated[int, typer.Option(min=3, max=32, help="Stacks that are open at once.")] = 8,
) -> None:
    """Protect three enterprises, corrupt one at an unknown moment, find its last clean time with parallel tests."""
    if not run_demo(stacks, json, svg):
        raise typer.Exit(1)
