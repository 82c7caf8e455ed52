"""The disks of a tap process: opened, exported, fed; and exchanged while guests write.

A change of disks (`DiskSet.change`)
    1. New disks are opened and the sizes of all asked for. Nothing is changed yet: what cannot be used is told, and
       the tap goes on as it was.
    2. The feeds stop. Guests go on by intent bitmap alone.
    3. Exports of disks that are removed, or have shrunk, close; calls under way end first.
    4. The bitmaps move to their new files (`dr_cloud.tap.bitmap`). From here on the change is made.
    5. New disks are exported. One that has grown shows its new size to clients that connect from now on; its clients
       of before stay.
    6. The feeds start: each copy says HELLO with the disks of now, and sends what is missing.

A disk is known by its name. One whose address changes is another disk: it is sent whole, under an index of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence, Set
from itertools import zip_longest
from pathlib import Path

import structlog
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.provider import Name
from dr_cloud.nbd.table import ExportTable
from dr_cloud.tap.address import VdsaAddress
from dr_cloud.tap.bitmap import Beside
from dr_cloud.tap.disk import Disk, FileDisk
from dr_cloud.tap.export import TapExport
from dr_cloud.tap.feed import Feed
from dr_cloud.tap.head import check_disks
from dr_cloud.tap.tap import Tap
from dr_cloud.tap.upstream import NbdDisk

_log = structlog.get_logger(__name__)


class DiskSource(BaseModel):
    """A disk to export: its name, and the path of a file or block device, or an NBD URI."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    address: str


_SOURCES = TypeAdapter(list[DiskSource])


def read_sources(path: Path) -> list[DiskSource]:
    """Return the disks that a YAML or JSON file lists. Raises `DrCloudError` that says where it is wrong."""
    try:
        return _SOURCES.validate_python(yaml.safe_load(path.read_text()) or [])
    except OSError as error:
        raise DrCloudError(f"{path} cannot be read: {error.strerror}", "Give --config a file that exists.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DrCloudError(f"{path} is neither YAML nor JSON: {error}", "Correct it.") from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DrCloudError(
            f"{path}: {place}: {first['msg']}", "List disks as `- {name: NAME, address: PATH or NBD-URI}`."
        ) from error


async def open_disk(address: str) -> Disk:
    """Return the disk at a path or NBD URI. Raises `DrCloudError`."""
    if "://" in address:
        return await NbdDisk.connect(address)
    return await asyncio.to_thread(FileDisk, Path(address))


async def open_disks(sources: Sequence[DiskSource]) -> dict[str, Disk]:
    """Open disks, by name; all or none. Raises `DrCloudError`."""
    disks: dict[str, Disk] = {}
    try:
        for source in sources:
            disks[source.name] = await open_disk(source.address)
    except BaseException:
        await close_all(disks.values())
        raise
    return disks


async def close_all(disks: Iterable[Disk]) -> None:
    """Close disks."""
    for disk in disks:
        await disk.close()


class DiskSet:
    """See the module's docstring. All methods belong to one event loop.

    Attributes:
        table: The exports.
    """

    def __init__(self, tap: Tap, sources: Sequence[DiskSource], disks: dict[str, Disk], vdsa: VdsaAddress) -> None:
        """Export `disks`, by name, which the tap's bitmaps know; `start` begins to feed them."""
        self.table = ExportTable()
        self._tap = tap
        self._vdsa = vdsa
        self._sources = list(sources)
        self._disks = disks
        self._exports: dict[str, TapExport] = {}
        self._feeds: list[asyncio.Task[None]] = []
        self._export_missing()

    @property
    def names(self) -> list[str]:
        """The disks, in the order in which they were given."""
        return [source.name for source in self._sources]

    def start(self) -> None:
        """Begin to feed every copy."""
        by_index = {entry.index: self._disks[entry.disk.name] for entry in self._tap.disks}
        for copy in self._tap.copies:
            feed = asyncio.create_task(Feed(copy, by_index, self._vdsa).run())
            feed.add_done_callback(_tell_failure)
            self._feeds.append(feed)

    async def stop(self) -> None:
        """Stop feeding. What is queued is sent again, by its bits."""
        feeds, self._feeds = self._feeds, []
        for feed in feeds:
            feed.cancel()
        if feeds:
            await asyncio.wait(feeds)

    async def close(self) -> None:
        """Flush and close the disks, then the bitmaps as clean; those stay unclean if a disk cannot be flushed."""
        try:
            await asyncio.gather(*[disk.flush() for disk in self._disks.values()])
            for copy in self._tap.copies:
                await asyncio.to_thread(copy.bitmap.close)
        except OSError as error:
            raise DrCloudError(
                f"the tap could not flush at its end: {error}", "Look at the disks; their set bits are sent again."
            ) from error
        finally:
            await close_all(self._disks.values())

    async def change(self, sources: Sequence[DiskSource]) -> None:
        """Serve `sources` from now on, with the sizes that they have now.

        Raises:
            DrCloudError: One cannot be used, or there is no space for a bitmap. Nothing was changed, but that clients
                of disks that would have gone, or have shrunk, may have been disconnected.
        """
        given = {source.name: source for source in self._sources}
        kept = [source.name for source in sources if given.get(source.name) == source]
        fresh = await open_disks([source for source in sources if source.name not in kept])
        try:
            sizes = {name: await self._disks[name].measure() for name in kept}
            sizes |= {name: disk.size_bytes for name, disk in fresh.items()}
            wanted = [(source.name, sizes[source.name]) for source in sources]
            check_disks(wanted)
            leaving = self._disks.keys() - set(kept)
            closing = leaving | {name for name in kept if sizes[name] < self._disks[name].size_bytes}
            if not leaving and wanted == [(entry.disk.name, entry.disk.size_bytes) for entry in self._tap.disks]:
                return
            await self.stop()
            try:
                for name in closing:
                    del self._exports[name]
                    await self.table.remove(name)
                await self._move(wanted, leaving)
            except BaseException:
                self._export_missing()
                self.start()
                raise
        except BaseException:
            await close_all(fresh.values())
            raise
        gone = [self._disks.pop(name) for name in leaving]
        self._disks |= fresh
        self._sources = list(sources)
        for name, disk in self._disks.items():
            disk.size_bytes = sizes[name]
        for name, export in self._exports.items():
            export.size_bytes = sizes[name]
        self._export_missing()
        self.start()
        await close_all(gone)
        _log.info("tap.disks_changed", disks=sizes)

    async def _move(self, wanted: Sequence[tuple[str, int]], leaving: Set[str]) -> None:
        """Have every bitmap know the disks in `wanted`, and none of `leaving` by its old index."""
        bitmaps = [copy.bitmap for copy in self._tap.copies]
        for bitmap in bitmaps:
            for bits in bitmap.disks:
                bits.begin_move()
        besides: list[Beside] = []
        try:
            for bitmap in bitmaps:
                first = besides[0] if besides else None
                besides.append(await asyncio.to_thread(bitmap.prepare, wanted, leaving, first))
        except BaseException:
            for bitmap, beside in zip_longest(bitmaps, besides):
                bitmap.give_up(beside)
            raise
        for bitmap, beside in zip(bitmaps, besides, strict=True):
            bitmap.switch(beside)
        self._tap.rebuild()
        for bitmap in bitmaps:
            try:
                await asyncio.to_thread(bitmap.settle)
            except OSError as error:
                # Only a loss of the whole host could bring the old file back, and after that everything is sent again.
                _log.error("tap.bitmap_flush_failed", file=str(bitmap.path), error=str(error))

    def _export_missing(self) -> None:
        for entry in self._tap.disks:
            name = entry.disk.name
            if name not in self._exports:
                self._exports[name] = TapExport(self._tap, entry, self._disks[name])
                self.table.add(self._exports[name])


def _tell_failure(feed: asyncio.Task[None]) -> None:
    if not feed.cancelled() and (error := feed.exception()) is not None:
        # A bug. The guest's path stands; bits keep what has to be sent after a restart.
        _log.critical("tap.feed_failed", error=repr(error))
