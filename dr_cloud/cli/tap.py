"""`dr-cloud tap`: export protected disks over NBD. Also `python -m dr_cloud.cli.tap`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvloop

from dr_cloud.model.blocks import DISK_INDEX_MAX
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.units import parse_size
from dr_cloud.tap.log import LogThread
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.tap.process import DiskSource, TapOptions, serve


def _disk(text: str) -> DiskSource:
    name, equals, address = text.partition("=")
    if not equals or not name or not address:
        raise typer.BadParameter(f"{text!r} is not NAME=PATH or NAME=NBD-URI")
    return DiskSource(name, address)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except DrCloudError as error:
        raise typer.BadParameter(f"{error}. {error.remedy}") from error


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 0xFFFF:
        raise typer.BadParameter(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def tap(
    disk: Annotated[list[str], typer.Option(help="NAME=PATH of a raw file or block device, or NAME=NBD-URI.")],
    vdsa: Annotated[Path, typer.Option(help="Unix socket of the source VDSA. It need not be there yet.")],
    state: Annotated[Path, typer.Option(help="The tap's intent bitmap. Made at the first start; keep it.")],
    socket: Annotated[Path | None, typer.Option(help="Unix socket on which to serve NBD.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT on which to serve NBD.")] = None,
    queue: Annotated[str, typer.Option(help="Most memory for copies that the VDSA has not taken.")] = "64MiB",
    first_index: Annotated[
        int,
        typer.Option(min=0, max=DISK_INDEX_MAX, help="Numbers new disks from here: each tap of a VPG its own range."),
    ] = 0,
) -> None:
    """Export disks over NBD and send a copy of every write to the source VDSA.

    The guest's I/O goes on whether or not the VDSA lives. Runs until SIGTERM.
    """
    if socket is None and listen is None:
        raise typer.BadParameter("give --socket PATH or --listen HOST:PORT, or both")
    host, port = (None, 0) if listen is None else _address(listen)
    options = TapOptions([_disk(text) for text in disk], vdsa, state, socket, host, port, _size(queue), first_index)
    keep_freed_memory()
    # Standard output belongs to the one line that says where the disks are.
    log = LogThread(sys.stderr)
    structlog.configure(logger_factory=log)
    try:
        uvloop.run(serve(options, lambda line: print(line, flush=True)))
    except DrCloudError as error:
        print(f"dr-cloud tap: {error}. {error.remedy}".rstrip(), file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        log.close()


if __name__ == "__main__":
    app()
