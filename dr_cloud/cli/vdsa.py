"""`dr-cloud vdsa`: each side of a VDSA as a plain process. Also `python -m dr_cloud.cli.vdsa`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
import uvloop

from dr_cloud.link.messages import CONNECTIONS_MAX
from dr_cloud.link.stream import PlainStream, address_of, connect, listen, split_address
from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.ids import Scope, check_name
from dr_cloud.model.replication import SourceOrders
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.open import open_store
from dr_cloud.store.store import Store
from dr_cloud.tap.memory import keep_freed_memory
from dr_cloud.vdsa.hub import SourceHub
from dr_cloud.vdsa.target_io import TargetVdsa

app = typer.Typer(help="The two sides of a VDSA as plain processes.", no_args_is_help=True)


async def _until_stopped(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` until it ends or SIGTERM or SIGINT comes."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _run(name: str, work: Coroutine[Any, Any, None]) -> None:
    # Standard output belongs to the one line that says what is ready.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    keep_freed_memory()
    # A record per write makes many short-lived tuples and no cycles: collect seldom, and not what start-up made.
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    try:
        uvloop.run(_until_stopped(work))
    except (DrCloudError, OSError) as error:
        print(f"dr-cloud vdsa {name}: {error}. {getattr(error, 'remedy', '')}".rstrip(), file=sys.stderr)
        raise typer.Exit(1) from error


def _scope(text: str) -> Scope:
    parts = text.split("/")
    if len(parts) != 3:
        raise DrCloudError(f"{text!r} is not a scope", "Write ENTERPRISE/VPG/TARGET.")
    return Scope(*parts).checked()


def _members(texts: list[str]) -> dict[str, dict[str, int]]:
    """Return the members that `SERVER/DISK=INDEX` words name."""
    members: dict[str, dict[str, int]] = {}
    for text in texts:
        place, _, index = text.rpartition("=")
        server, _, disk = place.partition("/")
        if not disk or not index.isdecimal():
            raise DrCloudError(f"{text!r} is no member", "Write SERVER/DISK=INDEX, like db/sda=0.")
        members.setdefault(check_name(server, "server"), {})[disk] = int(index)
    return members


async def _source(orders: SourceOrders, target: str, socket: Path, keyring: Path, connections: int) -> None:
    split_address(target)
    hub = SourceHub(Keyring.open(keyring), lambda scope: connect(target), connections=connections)
    await hub.listen("localhost", f"unix:{socket}")
    await hub.configure([orders])
    print(f"source VDSA ready: taps unix:{socket}, target {target}", flush=True)
    try:
        while not hub.replaced(orders.scope):
            await asyncio.sleep(0.2)
        raise DrCloudError(hub.reports()[0].problem, "Stop the other source VDSA, or leave this one stopped.")
    finally:
        await hub.close()


async def _target(name: str, address: str, store_url: str, keyring: Path, work: Path) -> None:
    store = open_store(store_url)

    def admit(scope: Scope) -> Store:
        if scope.target != name:
            raise DrCloudError(f"this is target {name!r}, not {scope.target!r}", "Connect to the other target.")
        return store

    vdsa = TargetVdsa(Keyring.open(keyring), work, admit)
    if (parts := split_address(address))[0] == "unix":
        Path(parts[1]).unlink(missing_ok=True)
    connections: set[asyncio.Task[Any] | None] = set()

    async def serve(stream: PlainStream) -> None:
        task = asyncio.current_task()
        connections.add(task)
        try:
            await vdsa.serve(stream)
        finally:
            connections.discard(task)

    server = await listen(address, serve)
    print(f"target VDSA {name} ready: {address_of(server)}, store {store_url}", flush=True)
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        server.close()
        await vdsa.close()
        for task in list(connections):
            if task is not None:
                task.cancel()


@app.command()
def source(
    scope: Annotated[str, typer.Option(help="ENTERPRISE/VPG/TARGET.")],
    target: Annotated[str, typer.Option(help="The target VDSA: unix:/path or tcp:host:port.")],
    socket: Annotated[Path, typer.Option(help="Unix socket where the VPG's taps connect.")],
    keyring: Annotated[Path, typer.Option(help="The local keyring.")],
    member: Annotated[list[str], typer.Option(help="SERVER/DISK=INDEX: a disk of the VPG, and its index there.")],
    connections: Annotated[int, typer.Option(min=1, max=CONNECTIONS_MAX, help="Connections to the target.")] = 1,
    checkpoint_seconds: Annotated[float, typer.Option(min=0.1, help="Time between checkpoints.")] = 5.0,
    copy_number: Annotated[int, typer.Option(min=0, max=2, help="Which copy of the taps.")] = 0,
) -> None:
    """Run the source side of one VPG: taps in, sealed frames out. Runs until SIGTERM."""

    async def run() -> None:
        orders = SourceOrders(
            scope=_scope(scope),
            copy_number=copy_number,
            members=_members(member),
            checkpoint_seconds=checkpoint_seconds,
        )
        await _source(orders, target, socket, keyring, connections)

    _run("source", run())


@app.command()
def target(
    name: Annotated[str, typer.Option(help="This target's name, the third part of a scope.")],
    listen_on: Annotated[str, typer.Option("--listen", help="unix:/path or tcp:host:port.")],
    store: Annotated[str, typer.Option(help="The object store: file:///directory or s3://bucket/prefix.")],
    keyring: Annotated[Path, typer.Option(help="The local keyring.")],
    work: Annotated[Path, typer.Option(help="Folder for digest indexes. May be lost; then more space is used.")],
) -> None:
    """Run the target side: frames in, journal objects and checkpoints into the store. Runs until SIGTERM."""
    _run("target", _target(name, listen_on, store, keyring, work))


if __name__ == "__main__":
    app()
