"""The tap process: disks, bitmaps, feeds and NBD server on one event loop.

It starts without a VDSA, and stops on SIGTERM or SIGINT: requests under way are answered, disks and bitmaps flushed,
the bitmaps closed cleanly. What was queued for a VDSA then is sent again after the next start, by its bits.

SIGHUP: it reads its list of disks again, asks for their sizes, and serves what there is now (`dr_cloud.tap.disks`).
What cannot be done is told in the log, and the tap goes on as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import structlog

from dr_cloud.model.errors import DrCloudError
from dr_cloud.nbd.server import NbdServer
from dr_cloud.tap.address import VdsaAddress
from dr_cloud.tap.bitmap import open_bitmaps
from dr_cloud.tap.disks import DiskSet, DiskSource, close_all, open_disks, read_sources
from dr_cloud.tap.tap import QUEUE_BYTES_MAX, Tap

_log = structlog.get_logger(__name__)


class TapOptions(NamedTuple):
    """What a tap process is started with. At least one of `socket` and `host` is given."""

    server: str
    disks: Sequence[DiskSource]
    vdsa: VdsaAddress
    state: Path
    config: Path | None = None
    """Lists more disks; read again on SIGHUP."""
    copies: int = 1
    socket: Path | None = None
    host: str | None = None
    port: int = 0
    queue_bytes_max: int = QUEUE_BYTES_MAX

    def sources(self) -> list[DiskSource]:
        """Return all disks that are to be served now. Raises `DrCloudError`."""
        return [*self.disks, *(read_sources(self.config) if self.config is not None else ())]


async def serve(options: TapOptions, ready: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        options: What to serve.
        ready: Called once with one line that names every address.

    Raises:
        DrCloudError: A disk, a state file or an address cannot be used.
    """
    stop, again, wake = False, False, asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_stop() -> None:
        nonlocal stop
        stop = True
        wake.set()

    def on_hangup() -> None:
        nonlocal again
        again = True
        wake.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_stop)
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    async with contextlib.AsyncExitStack() as stack:
        disks = await _open(options)
        stack.push_async_callback(disks.close)
        stack.push_async_callback(disks.stop)
        disks.start()
        server = NbdServer(disks.table)
        await server.start(
            unix_path=None if options.socket is None else str(options.socket), host=options.host, port=options.port
        )
        stack.push_async_callback(server.close)
        # What stands now stays: the collector need not look at it again while guests wait.
        gc.collect()
        gc.freeze()
        uris = [uri for name in disks.names for uri in server.uris(name)]
        ready("tap ready: " + " ".join(uris or server.addresses))
        while not stop:
            await wake.wait()
            wake.clear()
            if again and not stop:
                again = False
                await _change(disks, options)


async def _open(options: TapOptions) -> DiskSet:
    sources = options.sources()
    disks = await open_disks(sources)
    try:
        sizes = [(source.name, disks[source.name].size_bytes) for source in sources]
        bitmaps = open_bitmaps(options.state, sizes, options.copies)
    except BaseException:
        await close_all(disks.values())
        raise
    return DiskSet(Tap(options.server, bitmaps, options.queue_bytes_max), sources, disks, options.vdsa)


async def _change(disks: DiskSet, options: TapOptions) -> None:
    try:
        await disks.change(options.sources())
    except (DrCloudError, OSError) as error:
        remedy = error.remedy if isinstance(error, DrCloudError) else ""
        _log.error("tap.disks_not_changed", error=str(error), remedy=remedy)
