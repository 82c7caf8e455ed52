"""A tap's connection to the source hub: bytes in, records out, small messages back.

It reads until HELLO, then stops until it belongs to a VPG; so a tap without orders waits at the cost of one socket, its
guest's writes kept by its bitmap alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final, Protocol, cast

import structlog

from dr_cloud.model.errors import DrCloudError
from dr_cloud.model.replication import SeenServer
from dr_cloud.tap import wire
from dr_cloud.vdsa.feed import FeedParser, Record

_WRITE_BYTES_MAX: Final = 1 << 20
"""A tap that does not read its small messages gets no more of them than this."""

_log = structlog.get_logger(__name__)


class PortOwner(Protocol):
    """Who is told what comes over a connection."""

    def tap_greeted(self, port: TapConnection) -> None:
        """HELLO came."""

    def tap_sent(self, port: TapConnection, records: list[Record]) -> None:
        """Records came. Raises `DrCloudError`: the connection is closed."""

    def tap_lost(self, port: TapConnection) -> None:
        """The connection is gone."""


class TapConnection(asyncio.BufferedProtocol):
    """One connection.

    Attributes:
        number: Unique in the hub.
        host: Where the tap is: told by where it was listened for.
        begun: Event loop time of its beginning.
        closed: Whether it has ended, or is about to.
        seen: What is told of its server; made when it is first asked for.
    """

    def __init__(self, owner: PortOwner, number: int, host: str) -> None:
        self.number = number
        self.host = host
        self.begun = asyncio.get_running_loop().time()
        self._owner = owner
        self._parser = FeedParser()
        self._transport: asyncio.Transport | None = None
        self._reading = True
        self.closed = False
        self.seen: SeenServer | None = None

    @property
    def hello(self) -> wire.Hello | None:
        """What the tap said first; None until then."""
        return self._parser.hello

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        """Take in `nbytes`."""
        greeted = self.hello is not None
        try:
            records = self._parser.advance(nbytes)
            if records:
                self._owner.tap_sent(self, records)
            elif not greeted and self.hello is not None:
                self.read(False)
                self._owner.tap_greeted(self)
        except DrCloudError as error:
            self.abort(str(error))

    def attach(self, indexes: Mapping[int, int]) -> None:
        """It belongs to a VPG now, where its disks have these indexes. `read` begins when the VPG can take more."""
        self._parser.attach(indexes)
        asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        # What came together with HELLO.
        if not self.closed:
            self.buffer_updated(0)

    def send(self, data: bytes) -> None:
        """Send one message to the tap, unless it has stopped to read."""
        assert self._transport is not None
        if self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() > _WRITE_BYTES_MAX:
            self.abort("the tap does not read")
        else:
            self._transport.write(data)

    def read(self, reading: bool) -> None:
        """Read on, or stop to."""
        assert self._transport is not None
        if self._transport.is_closing() or reading == self._reading:
            return
        self._reading = reading
        if reading:
            self._transport.resume_reading()
        else:
            self._transport.pause_reading()

    def abort(self, reason: str) -> None:
        """Close at once."""
        if self.closed or self._transport is None:
            return
        self.closed = True
        _log.info("vdsa.tap_closed", host=self.host, server=self.hello and self.hello.server, reason=reason)
        self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self.closed = True
        self._owner.tap_lost(self)
