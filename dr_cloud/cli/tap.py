"""`dr-cloud tap`: export protected disks over NBD. Also `python -m dr_cloud.cli.tap`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
import uvloop
from pydantic import ValidationError

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import check_name
from dr_cloud.model.units import parse_size
from dr_cloud.tap.address import TlsFiles, VdsaAddress
from dr_cloud.tap.disks import DiskSource
from dr_cloud.tap.log import LogThread
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.tap.process import TapOptions, serve
from dr_cloud.tap.wire import COPIES_MAX


def _disk(text: str) -> DiskSource:
    name, equals, address = text.partition("=")
    if not equals or not name or not address:
        raise typer.BadParameter(f"{text!r} is not NAME=PATH or NAME=NBD-URI")
    try:
        return DiskSource(name=name, address=address)
    except ValidationError as error:
        raise typer.BadParameter(f"{text!r}: {error.errors()[0]['msg']}") from None


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


def _server(text: str) -> str:
    try:
        return check_name(text, "server")
    except DrCloudError as error:
        raise typer.BadParameter(f"{error}. {error.remedy}") from None


@app.command()
def tap(
    server: Annotated[str, typer.Option(callback=_server, help="Name of the virtual server whose disks these are.")],
    vdsa: Annotated[str, typer.Option(help="The source VDSA: PATH of its unix socket, or tls:HOST:PORT.")],
    state: Annotated[Path, typer.Option(help="The tap's intent bitmap. Made at the first start; keep it.")],
    disk: Annotated[
        list[str] | None, typer.Option(help="NAME=PATH of a raw file or block device, or NAME=NBD-URI.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML or JSON file that lists disks as {name, address}. Read again on SIGHUP."),
    ] = None,
    copies: Annotated[
        int, typer.Option(min=1, max=COPIES_MAX, help="To how many replication targets writes are copied.")
    ] = 1,
    cert: Annotated[Path | None, typer.Option(help="Certificate of this tap, for tls:.")] = None,
    key: Annotated[Path | None, typer.Option(help="Key of the certificate.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificate of the authority that vouches for the VDSA.")] = None,
    socket: Annotated[Path | None, typer.Option(help="Unix socket on which to serve NBD.")] = None,
    listen: Annotated[str | None, typer.Option(help="HOST:PORT on which to serve NBD.")] = None,
    queue: Annotated[str, typer.Option(help="Most memory for what a VDSA has not taken, for each copy.")] = "64MiB",
) -> None:
    """Export disks over NBD and send copies of every write to the source VDSA.

    The guest's I/O goes on whether or not the VDSA lives. Runs until SIGTERM; on SIGHUP it looks at its disks again.
    """
    if socket is None and listen is None:
        raise typer.BadParameter("give --socket PATH or --listen HOST:PORT, or both")
    if not disk and config is None:
        raise typer.BadParameter("give --disk NAME=PATH or --config FILE, or both")
    if (given := [cert, key, ca].count(None)) not in (0, 3):
        raise typer.BadParameter(f"--cert, --key and --ca go together; {given} of them are missing")
    host, port = (None, 0) if listen is None else _address(listen)
    disks, queue_bytes = [_disk(text) for text in disk or ()], _size(queue)
    keep_freed_memory()
    # Standard output belongs to the one line that says where the disks are.
    log = LogThread(sys.stderr)
    structlog.configure(logger_factory=log)
    try:
        files = None if cert is None or key is None or ca is None else TlsFiles(cert, key, ca)
        options = TapOptions(
            server=server,
            disks=disks,
            vdsa=VdsaAddress.parse(vdsa, files),
            state=state,
            config=config,
            copies=copies,
            socket=socket,
            host=host,
            port=port,
            queue_bytes_max=queue_bytes,
        )
        uvloop.run(serve(options, lambda line: print(line, flush=True)))
    except DrCloudError as error:
        print(f"dr-cloud tap: {error}. {error.remedy}".rstrip(), file=sys.stderr)
        raise typer.Exit(1) from error
    finally:
        log.close()


if __name__ == "__main__":
    app()
