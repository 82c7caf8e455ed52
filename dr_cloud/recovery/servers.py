"""The servers of one failover, at their target: their disks, a tap in front of each, and where they are served.

Purpose
    What a failover recovers must last: it outlives this process, and once it is promoted, the journal too. A tap stands
    in front of every server from the first write on, so that replication back knows what differs.

Layout
    One folder for each failover: `failover.json` (`RecoveredRecord`), `<index>.raw` and `<index>.map` for each disk
    (`dr_cloud.recovery.recovered`), `<server>.tap` for each server (`dr_cloud.tap.bitmap`). A server has a socket of
    its own, on which its disks have the names that they had at the source.

Order
    The folder is begun by the record; a folder with a record can be opened again, one without is nothing and removed.
    `promoted` is written when every disk holds all of its blocks, durable. `discard` removes the record first.

Crash recovery
    Opened again with the same plan, or without one once it is promoted: disks and taps go on where they stood.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from dr_cloud.model.errors import ConflictError, DamagedError
from dr_cloud.model.journal import ImagePlan
from dr_cloud.nbd.server import NbdServer
from dr_cloud.recovery.recovered import Image, RecoveredDisk
from dr_cloud.seal.identity import replace_file
from dr_cloud.tap.address import VdsaAddress
from dr_cloud.tap.bitmap import open_bitmaps
from dr_cloud.tap.disk import Disk
from dr_cloud.tap.disks import DiskSet, DiskSource
from dr_cloud.tap.tap import Tap

RECORD: Final = "failover.json"
_AT_ONCE: Final = 2
"""How many disks are brought over at a time."""
log = structlog.get_logger(__name__)


class RecoveredRecord(BaseModel):
    """What a folder of recovered disks is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    failover: str
    store: str
    """Where the journal of the plan is."""
    plan: ImagePlan
    promoted: bool = False


class RecoveredProgress(BaseModel):
    """How recovered servers stand."""

    model_config = ConfigDict(frozen=True)

    promoting: bool
    promoted: bool
    size_bytes: int
    missing_bytes: int
    """Still to be brought over from the journal; 0 once promoted."""
    problem: str
    """What keeps it from being promoted, at present; empty if nothing does."""
    paused: str = ""
    """Why they are not served; empty if they are."""


def read_record(folder: Path) -> RecoveredRecord | None:
    """Return what a folder is; None if it is nothing. Raises `DamagedError`."""
    try:
        return RecoveredRecord.model_validate_json((folder / RECORD).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise DamagedError(f"{folder / RECORD} is damaged: {error}", "Recover the servers anew.") from None


class RecoveredServers:
    """See the module's docstring. All methods belong to one event loop.

    Attributes:
        record: What it is.
        uris: NBD URIs by `<server>/<disk>`.
    """

    def __init__(self, folder: Path, record: RecoveredRecord) -> None:
        """Use `open`."""
        self.record = record
        self.uris: dict[str, list[str]] = {}
        self._folder = folder
        self._disks: list[RecoveredDisk] = []
        self._loose: list[RecoveredDisk] = []
        """Those that no set closes (yet)."""
        self._sets: list[DiskSet] = []
        self._servers: list[NbdServer] = []
        self._sockets: list[Path] = []
        """Of each set."""
        self._paused = ""
        self._promoting: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        folder: Path,
        record: RecoveredRecord,
        images: Sequence[Image],
        socket: Callable[[str], Path],
        vdsa: Path,
        boot: bytes | None = None,
    ) -> RecoveredServers:
        """Recover the servers, or go on with them where the folder holds them already.

        Args:
            folder: Theirs alone; made if it is not there.
            record: What they are. If the folder is something else, that is refused.
            images: For each disk of the plan, in its order, what it begins as; none are needed once it is promoted.
            socket: Returns where a server's disks are to be served.
            vdsa: Where taps find their VDSA; it need not be there.
            boot: Id of this run of the host.

        Raises:
            ConflictError: The folder is another failover's.
            DamagedError: What is in the folder is damaged.
            OSError: The folder cannot be used.
        """
        before = read_record(folder)
        if before is not None and before.failover != record.failover:
            raise ConflictError(f"{folder} holds failover {before.failover}", "End that one first.")
        if before is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, mode=0o700)
            replace_file(folder / RECORD, record.model_dump_json(), 0o600)
        servers = cls(folder, before or record)
        try:
            await servers._serve(images, socket, vdsa, boot)
        except BaseException:
            await servers.close()
            raise
        return servers

    async def _serve(
        self, images: Sequence[Image], socket: Callable[[str], Path], vdsa: Path, boot: bytes | None
    ) -> None:
        given: list[Image | None] = [None] * len(self.record.plan.disks) if self.record.promoted else list(images)
        by_server: dict[str, dict[str, RecoveredDisk]] = {}
        for disk, image in zip(self.record.plan.disks, given, strict=True):
            server, _, name = disk.name.rpartition("/")
            opened = RecoveredDisk(self._folder / f"{disk.index}.raw", image, disk.size_bytes, boot)
            self._disks.append(opened)
            self._loose.append(opened)
            by_server.setdefault(server or "server", {})[name] = opened
        for server, disks in by_server.items():
            await self._serve_one(server, disks, socket(server), vdsa, boot)

    async def _serve_one(
        self, server: str, recovered: Mapping[str, RecoveredDisk], socket: Path, vdsa: Path, boot: bytes | None
    ) -> None:
        sizes = [(name, disk.size_bytes) for name, disk in recovered.items()]
        tap = Tap(server, open_bitmaps(self._folder / f"{server}.tap", sizes, 1, boot))
        sources = [DiskSource(name=name, address=str(disk.path)) for name, disk in recovered.items()]
        disks: dict[str, Disk] = dict(recovered)
        served = DiskSet(tap, sources, disks, VdsaAddress(vdsa))
        self._sets.append(served)
        self._loose = [disk for disk in self._loose if disk not in recovered.values()]
        served.start()
        self._sockets.append(socket)
        nbd = await self._listen(served, socket)
        for name in recovered:
            self.uris[f"{server}/{name}"] = nbd.uris(name)

    async def _listen(self, served: DiskSet, socket: Path) -> NbdServer:
        nbd = NbdServer(served.table)
        await nbd.start(unix_path=str(socket))
        self._servers.append(nbd)
        return nbd

    async def pause(self, reason: str) -> None:
        """Close every door: whoever uses the disks is disconnected, until `resume`. May be repeated."""
        self._paused = reason
        servers, self._servers = self._servers, []
        for server in servers:
            await server.close(0.0)

    async def resume(self) -> None:
        """Open them again. May be repeated."""
        if self._paused:
            self._paused = ""
            for served, socket in zip(self._sets, self._sockets, strict=True):
                await self._listen(served, socket)

    def promote(self) -> None:
        """Begin to make the disks their own; goes on by itself until it is done. May be repeated."""
        if self._promoting is None and not self.record.promoted:
            self._promoting = asyncio.create_task(self._promote(), name="promote")
            self._promoting.add_done_callback(_tell)

    async def _promote(self) -> None:
        turns = asyncio.Semaphore(_AT_ONCE)

        async def one(disk: RecoveredDisk) -> None:
            async with turns:
                await disk.bring_over()

        async with asyncio.TaskGroup() as group:
            for disk in self._disks:
                group.create_task(one(disk))
        self.record = self.record.model_copy(update={"promoted": True})
        await asyncio.to_thread(replace_file, self._folder / RECORD, self.record.model_dump_json(), 0o600)
        log.info("recovered.promoted", failover=self.record.failover)

    def progress(self) -> RecoveredProgress:
        """Return how they stand."""
        return RecoveredProgress(
            promoting=self._promoting is not None and not self._promoting.done(),
            promoted=self.record.promoted,
            size_bytes=sum(disk.size_bytes for disk in self._disks),
            missing_bytes=sum(disk.missing_bytes for disk in self._disks),
            problem="; ".join(disk.problem for disk in self._disks if disk.problem),
            paused=self._paused,
        )

    async def close(self) -> None:
        """Answer what is under way, flush, and let go of everything. The folder stays."""
        if self._promoting is not None:
            self._promoting.cancel()
            await asyncio.gather(self._promoting, return_exceptions=True)
        for server in self._servers:
            await server.close()
        for served in self._sets:
            await served.stop()
            await served.close()
        for disk in self._loose:
            await disk.close()

    async def discard(self) -> None:
        """End them: what was written to them is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._folder / RECORD)
        await self.close()
        await asyncio.to_thread(shutil.rmtree, self._folder, True)


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("recovered.not_promoted", error=repr(error))
