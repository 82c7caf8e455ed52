"""The tap process: disks, bitmap, feed and NBD server on one event loop.

It starts without a VDSA, and stops on SIGTERM or SIGINT: requests under way are answered, disks and bitmap flushed, the
bitmap closed cleanly. What was queued for the VDSA then is sent again after the next start, by its bits.
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
from dr_cloud.nbd.table import ExportTable
from dr_cloud.tap.bitmap import IntentBitmap
from dr_cloud.tap.disk import Disk, FileDisk
from dr_cloud.tap.export import TapExport
from dr_cloud.tap.feed import Feed
from dr_cloud.tap.tap import Tap
from dr_cloud.tap.upstream import NbdDisk

_log = structlog.get_logger(__name__)


class DiskSource(NamedTuple):
    """A disk to export: its name, and the path of a file or block device, or an NBD URI."""

    name: str
    address: str


class TapOptions(NamedTuple):
    """What a tap process is started with. At least one of `socket` and `host` is given."""

    disks: Sequence[DiskSource]
    vdsa: Path
    state: Path
    socket: Path | None = None
    host: str | None = None
    port: int = 0
    queue_bytes_max: int = 64 << 20
    first_index: int = 0
    """Indexes of new disks begin here."""


async def open_disk(address: str) -> Disk:
    """Return the disk at a path or NBD URI. Raises `DrCloudError`."""
    if "://" in address:
        return await NbdDisk.connect(address)
    return FileDisk(Path(address))


async def serve(options: TapOptions, ready: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT.

    Args:
        options: What to serve.
        ready: Called once with one line that names every address.

    Raises:
        DrCloudError: A disk, the state file or an address cannot be used.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        disks = []
        for source in options.disks:
            disk = await open_disk(source.address)
            stack.push_async_callback(disk.close)
            disks.append(disk)
        bitmap = IntentBitmap(
            options.state,
            [(source.name, disk.size_bytes) for source, disk in zip(options.disks, disks, strict=True)],
            first_index=options.first_index,
        )
        stack.push_async_callback(_close_bitmap, bitmap, disks)
        tap = Tap(bitmap, options.queue_bytes_max)
        table = ExportTable()
        for bits, disk in zip(bitmap.disks, disks, strict=True):
            table.add(TapExport(tap, bits, disk))
        feed = asyncio.create_task(Feed(tap, disks, options.vdsa).run())
        stack.push_async_callback(_cancel, feed)
        server = NbdServer(table)
        await server.start(
            unix_path=None if options.socket is None else str(options.socket), host=options.host, port=options.port
        )
        stack.push_async_callback(server.close)
        # What stands now stays: the collector need not look at it again while guests wait.
        gc.collect()
        gc.freeze()
        ready("tap ready: " + " ".join(uri for source in options.disks for uri in server.uris(source.name)))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, feed}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            # A bug in the feed. The guest's path stands; bits keep what has to be sent after a restart.
            _log.critical("tap.feed_failed", error=repr(feed.exception()))
            await stop.wait()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


async def _close_bitmap(bitmap: IntentBitmap, disks: Sequence[Disk]) -> None:
    """Flush the disks, then close the bitmap as clean; it stays unclean if a disk cannot be flushed."""
    try:
        await asyncio.gather(*[disk.flush() for disk in disks])
        await asyncio.to_thread(bitmap.close)
    except OSError as error:
        raise DrCloudError(
            f"the tap could not flush at its end: {error}", "Look at the disks; their set bits are sent again."
        ) from error
