"""The feed: the connection of one copy to its source VDSA, and the synchronisations over it.

Purpose
    Carries the messages that `dr_cloud.tap.copy` queues (`dr_cloud.tap.wire`) and brings back what the VDSA says. It
    takes its turns on the guest's event loop, so each turn is short: a batch of 512 KiB, a piece of a synchronisation
    of 256 KiB.

Retries
    It connects for ever, 50 ms to 2 s apart. A connection that breaks, or a VDSA that breaks the protocol, costs the
    queue; the set bits are sent again on the next one. A VDSA that stops reading fills the socket, then the queue; that
    is dropped at its limit, and when the socket has drained a synchronisation begins.

Synchronisation
    Blocks that a guest writes while they are read are left out, because their copies are queued behind. Holes and
    zeroes go as ranges. A piece waits until the queue is nearly empty, so guests' copies come first. A block that
    cannot be read keeps its bit; another round begins some seconds later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, cast

import structlog

from dr_cloud.model.blocks import BLOCK_SHIFT, blocks_of
from dr_cloud.model.errors import ProtocolError
from dr_cloud.tap import wire
from dr_cloud.tap.address import VdsaAddress
from dr_cloud.tap.copy import Copy, State
from dr_cloud.tap.disk import Disk
from dr_cloud.tap.export import read_padded

BATCH_SECONDS_MAX: Final = 0.001
PIECE_BLOCKS: Final = 64
"""Blocks that a synchronisation reads and queues in one turn."""
SYNC_QUEUE_BYTES_MAX: Final = 1 << 20
"""A piece is read only while less than this is queued."""
TRANSPORT_BYTES_HIGH: Final = 1 << 20
TRANSPORT_BYTES_LOW: Final = 256 << 10
BACKOFF_SECONDS_MIN: Final = 0.05
BACKOFF_SECONDS_MAX: Final = 2.0
UNREADABLE_SECONDS: Final = 5.0

_log = structlog.get_logger(__name__)


class Feed(asyncio.Protocol):
    """Keeps one copy connected to its VDSA. `run` never returns; cancel it to stop."""

    def __init__(self, copy: Copy, disks: Mapping[int, Disk], address: VdsaAddress) -> None:
        """Take over `copy`'s hooks.

        Args:
            copy: Whose messages are carried.
            disks: Where the blocks to send again are read, by the disk's index.
            address: The VDSA's; nobody need be there yet.
        """
        self._copy = copy
        self._disks = disks
        self._address = address
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._stopped = False
        self._received = bytearray()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        copy.on_batch = self._push_later
        copy.on_full = self._push_soon
        copy.on_change = self._changed.set

    async def run(self) -> None:
        """Connect, follow the connection to its end, and so on."""
        backoff = BACKOFF_SECONDS_MIN
        told = False
        try:
            while True:
                try:
                    await self._address.connect(lambda: self)
                except OSError as error:
                    if not told:
                        _log.warning("tap.no_vdsa", vdsa=str(self._address), copy=self._copy.number, error=str(error))
                        told = True
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
                    continue
                told = False
                since = self._loop.time()
                await self._follow()
                if self._loop.time() - since > BACKOFF_SECONDS_MAX:
                    backoff = BACKOFF_SECONDS_MIN
                await asyncio.sleep(backoff)
                backoff = min(backoff * 2, BACKOFF_SECONDS_MAX)
        finally:
            self._stopped = True
            if self._transport is not None:
                self._transport.abort()
                self.connection_lost(None)

    async def _follow(self) -> None:
        """Begin a synchronisation whenever copies are missing and the socket has drained, until the connection ends."""
        while self._transport is not None:
            if self._copy.state is State.TRACKING and not self._paused and not self._copy.queued_bytes:
                await self._synchronise()
            else:
                self._changed.clear()
                await self._changed.wait()

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say HELLO."""
        if self._stopped:
            cast(asyncio.Transport, transport).abort()
            return
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(TRANSPORT_BYTES_HIGH, TRANSPORT_BYTES_LOW)
        self._paused = False
        self._received.clear()
        self._copy.connected()
        self._push()

    def connection_lost(self, exc: Exception | None) -> None:
        """Go on by bits alone."""
        if self._transport is not None:
            self._transport = None
            self._copy.lost()

    def pause_writing(self) -> None:
        """The VDSA is behind: let the queue grow."""
        self._paused = True

    def resume_writing(self) -> None:
        """The VDSA has caught up."""
        self._paused = False
        self._changed.set()
        self._push()

    def data_received(self, data: bytes) -> None:
        """Take what the VDSA says."""
        received = self._received
        received += data
        at = 0
        try:
            while len(received) - at >= wire.HEAD_BYTES:
                kind, flags, disk, _, sequence, time_ns, _, asked_id = wire.HEAD.unpack_from(received, at)
                at += wire.HEAD_BYTES
                if kind == wire.DURABLE:
                    self._copy.durable(sequence)
                elif kind == wire.MARK:
                    self._copy.mark(asked_id)
                elif kind == wire.HOLD:
                    self._copy.hold(asked_id, time_ns)
                elif kind == wire.RELEASE:
                    self._copy.release(asked_id)
                elif kind == wire.ORDER:
                    self._copy.order(time_ns)
                elif kind == wire.RESYNC and flags & wire.FLAG_WHOLE:
                    self._copy.send_whole(disk)
                elif kind == wire.RESYNC:
                    self._copy.drop("the VDSA asked for it")
                else:
                    raise ProtocolError(f"a VDSA sends no message of type {kind}")
        except ProtocolError as error:
            _log.error("tap.vdsa_protocol", error=str(error))
            if self._transport is not None:
                self._transport.abort()
        del received[:at]

    # Sending.

    def _push_later(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(BATCH_SECONDS_MAX, self._push_due)

    def _push_due(self) -> None:
        self._timer = None
        self._push()

    def _push_soon(self) -> None:
        # Not from within the guest's write: that is answered first.
        self._loop.call_soon(self._push)

    def _push(self) -> None:
        transport = self._transport
        if transport is None:
            return
        while not self._paused and (batch := self._copy.take()) is not None:
            transport.writelines(batch)
        if self._copy.queued_bytes <= SYNC_QUEUE_BYTES_MAX:
            self._changed.set()

    # Synchronising.

    async def _synchronise(self) -> None:
        """Send every block of TO_SEND."""
        copy = self._copy
        try:
            await asyncio.to_thread(copy.bitmap.flush)
        except OSError as error:
            # It guards against the loss of the whole host only, and after that everything is sent again.
            _log.error("tap.bitmap_flush_failed", file=str(copy.bitmap.path), error=str(error))
        if self._transport is None or copy.state is not State.TRACKING or not copy.begin_sync():
            return
        number = copy.sync_number
        _log.info("tap.sync_begins", blocks=copy.bitmap.dirty_blocks())
        all_read = True
        for bits, first, stop in copy.sync_runs():
            disk = self._disks[bits.disk.index]
            data_stop = first
            while first < stop:
                if not await self._room(number):
                    return
                watch = copy.watch(bits, first, stop - first)
                data: memoryview | None = None
                try:
                    if first >= data_stop:
                        hole = await _hole_blocks(disk, first, stop)
                        data_stop = first if hole > 0 else first - hole
                        watch.count = abs(hole)
                    if first < data_stop:
                        watch.count = min(PIECE_BLOCKS, data_stop - first)
                        data = await read_padded(disk, first << BLOCK_SHIFT, (first + watch.count) << BLOCK_SHIFT)
                except OSError as error:
                    _log.error("tap.block_unreadable", disk=bits.disk.name, block=first, error=str(error))
                    all_read = False
                    watch.count = min(PIECE_BLOCKS, stop - first)
                    if copy.sync_number == number:
                        copy.skip_sync(watch)
                else:
                    if copy.sync_number == number:
                        copy.send_sync(watch, data)
                first += watch.count
        if all_read:
            copy.end_sync()
            return
        await asyncio.sleep(UNREADABLE_SECONDS)
        if copy.sync_number == number:
            copy.drop("blocks could not be read in the synchronisation")

    async def _room(self, number: int) -> bool:
        """Wait until a piece may be read; return False if this synchronisation was broken off."""
        await asyncio.sleep(0)
        while self._copy.sync_number == number:
            if not self._paused and self._copy.queued_bytes <= SYNC_QUEUE_BYTES_MAX:
                return True
            self._changed.clear()
            await self._changed.wait()
        return False


async def _hole_blocks(disk: Disk, first: int, stop: int) -> int:
    """Return how many blocks from `first` on are a hole, or minus how many are data; at least one, at most to `stop`.

    A hole that covers a block only in part counts as data.
    """
    start = first << BLOCK_SHIFT
    length = min(stop << BLOCK_SHIFT, disk.size_bytes) - start
    answer = disk.extents(start, length, 1)
    extent = (answer if isinstance(answer, Sequence) else await answer)[0]
    if extent.length >= length:
        return stop - first if extent.hole else first - stop
    if extent.hole:
        return extent.length >> BLOCK_SHIFT or -1
    return -blocks_of(extent.length)
