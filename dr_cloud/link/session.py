"""A session: one link between a site and its provider, with its channels and calls. The shell around `Channels`.

Purpose
    Runs over any `MessageStream`: a WebSocket between sites, a plain stream or memory in tests. Either end opens
    channels (`open`), serves those that the other opens (`on_channel`), and calls methods of the other (`call`). A
    channel is accepted when its handler first uses it, and refused when the handler raises before.

        async with await dial(url, context) as session:
            stream = await session.open("replication", {...})

Scheduling
    One task sends: control, then calls, then the channels in turns, one fragment at a time. The carrier is to hold few
    fragments only, so control finds it nearly empty. One task receives; it never waits for a reader.

Cuts
    When the carrier fails, every stream and call raises `OSError` or `UnavailableError`. A peer that has gone without
    a word (half-open) is noticed after four rounds of 5 s in which nothing came; it is asked after each of them, and
    not while there is traffic. A process that was itself stopped for a while does not count that time. Nothing arrives
    twice. After a cut a message either had arrived whole or is lost, and the sender does not know which: that is for
    the protocols above.

Cancellation
    `receive` and `open` may be cancelled. A `send` that is cancelled while it waits has been queued all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

import structlog
from pydantic import JsonValue

from dr_cloud.link.channels import Channel, Channels
from dr_cloud.link.fault import Fault
from dr_cloud.link.rpc import CALL_SECONDS, Method, Params, Rpc
from dr_cloud.link.stream import Message, MessageStream, Received
from dr_cloud.link.throttle import Bucket
from dr_cloud.model.errors import DrCloudError, NotFoundError, ProtocolError, UnavailableError
from dr_cloud.model.replication import Throttle
from dr_cloud.seal.identity import Peer

OPEN_SECONDS: Final = 30.0
PING_SECONDS: Final = 5.0
_SILENT_ROUNDS: Final = 4
_BYE_SECONDS: Final = 2.0
_HANDLERS_SECONDS: Final = 5.0
_QUEUED_BYTES: Final = 1 << 20
"""Beyond this a channel's `send` waits."""
_PAUSE_SECONDS_MAX: Final = 1.0
"""Throttles are looked at again that often, for they may have been lifted."""

_log = structlog.get_logger(__name__)


class ChannelStream:
    """`MessageStream` over one channel of a session. Whoever has one ends or closes it."""

    def __init__(self, session: Session, channel: Channel) -> None:
        """Use `Session.open`."""
        self._session = session
        self._channel = channel
        self._changed = asyncio.Event()
        channel.on_change = self._changed.set

    @property
    def throttle(self) -> Throttle:
        """Of this channel alone; it may be replaced at any time."""
        return self._channel.bucket.throttle

    @throttle.setter
    def throttle(self, throttle: Throttle) -> None:
        self._channel.bucket.throttle = throttle

    async def send(self, message: Message) -> None:
        """Send one message; waits while the peer is slow. Raises `OSError` if the channel is over."""
        channel, core = self._channel, self._session._core
        core.accept(channel)
        core.send(channel, message)
        self._session._wake.set()
        while channel.queued_bytes > _QUEUED_BYTES:
            await self._wait()
            if channel.over:
                raise ConnectionResetError(_reason(channel))

    async def receive(self) -> Received | None:
        """Return the next message, None at a clean end. Raises `OSError` if the channel was broken off."""
        channel, core = self._channel, self._session._core
        core.accept(channel)
        while not channel.inbox:
            if channel.over:
                if channel.fault is not None:
                    raise ConnectionResetError(_reason(channel))
                return None
            core.hunger(channel)
            if core.busy:
                self._session._wake.set()
            await self._wait()
        message = core.taken(channel)
        if core.busy:
            self._session._wake.set()
        return message

    def end(self) -> None:
        """Close after what was sent has left; what the peer still sends is dropped."""
        self._session._core.end(self._channel)
        self._session._wake.set()

    def close(self) -> None:
        """Close at once; what was not sent is lost, and the peer's stream fails."""
        self._refuse(None)

    def _refuse(self, fault: Fault | None) -> None:
        self._session._core.close(self._channel, fault)
        self._session._wake.set()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


OnChannel = Callable[[str, dict[str, JsonValue], ChannelStream], Awaitable[None]]


async def refuse_channels(purpose: str, arguments: dict[str, JsonValue], stream: ChannelStream) -> None:
    """Refuse every channel."""
    raise NotFoundError(f"channels of purpose {purpose!r} are not served here", "Bring both sides to the same release.")


class Session:
    """One link. Nothing passes before `async with`; leaving it closes the link. Belongs to one event loop."""

    def __init__(
        self,
        carrier: MessageStream,
        *,
        dialled: bool,
        peer: Peer | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        ping_seconds: float = PING_SECONDS,
    ) -> None:
        """Make the session of one connection.

        Args:
            carrier: The connection; the session closes it.
            dialled: Whether this end made the connection.
            peer: Who is at the other end, as its certificate says.
            clock_ns: Nanoseconds since the epoch, for throttles.
            ping_seconds: A quarter of the silence after which the peer counts as gone.
        """
        self.peer = peer
        self.on_channel: OnChannel = refuse_channels
        """Serves a channel that the peer opened: purpose, arguments, stream. The stream is ended when it returns."""
        self.methods: dict[str, Method] = {}
        """What the peer may call."""
        self.reason = ""
        """Why the link was closed; empty while it is not."""
        self._carrier = carrier
        self._core = Channels(dialled=dialled, clock_ns=clock_ns)
        self._rpc = Rpc(ChannelStream(self, self._core.calls), self.methods)
        self._ping_seconds = ping_seconds
        self._wake = asyncio.Event()
        self._heard = True
        self._last = ""
        self._clean = False
        """Whether the other end knows that the link is over: what was sent may then leave."""
        self._stopping = asyncio.Event()
        self._handlers: set[asyncio.Task[None]] = set()
        self._run_task: asyncio.Task[None] | None = None

    @property
    def throttle(self) -> Throttle:
        """Of the link as a whole, control counted; it may be replaced at any time."""
        return self._core.bucket.throttle

    @throttle.setter
    def throttle(self, throttle: Throttle) -> None:
        self._core.bucket.throttle = throttle

    def share(self, bucket: Bucket) -> None:
        """Take the bytes of the link as a whole from `bucket`: sessions that share one keep its limit together."""
        self._core.bucket = bucket

    async def __aenter__(self) -> Session:
        self._run_task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close("the other end has finished")
        await self.wait_closed()

    async def open(
        self, purpose: str, arguments: dict[str, JsonValue], timeout_seconds: float = OPEN_SECONDS
    ) -> ChannelStream:
        """Open a channel and wait until the peer accepts it.

        Raises:
            DrCloudError: The peer refuses it; message and remedy are the peer's.
            UnavailableError: The peer does not answer in time, or the link is cut.
        """
        if self.reason:
            raise UnavailableError(f"the link is closed: {self.reason}", "Try again when it is back.")
        channel = self._core.open(purpose, arguments)
        stream = ChannelStream(self, channel)
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_seconds):
                while not channel.accepted and not channel.over:
                    await stream._wait()
        except BaseException as error:
            stream.close()
            if not isinstance(error, TimeoutError):
                raise
            raise UnavailableError(f"the other end did not answer within {timeout_seconds:g} s", "Try again.") from None
        if not channel.accepted and channel.fault is not None:
            raise channel.fault.error()
        return stream

    async def call(self, method: str, params: Params | None = None, timeout_seconds: float = CALL_SECONDS) -> JsonValue:
        """Call a method of the peer; see `Rpc.call`."""
        return await self._rpc.call(method, params, timeout_seconds)

    def close(self, reason: str) -> None:
        """Close the link and tell the peer why. Returns at once; see `wait_closed`."""
        self._stop(reason, tell=True)

    async def wait_closed(self) -> str:
        """Wait until the link is closed and its handlers have ended; return the reason."""
        if self._run_task is not None:
            await asyncio.shield(self._run_task)
        return self.reason

    # The tasks.

    async def _run(self) -> None:
        parts = (self._write(), self._read(), self._watch(), self._rpc.run())
        tasks = [asyncio.create_task(self._part(part)) for part in parts]
        try:
            await self._stopping.wait()
            if self._last:
                await asyncio.wait(tasks[:1], timeout=_BYE_SECONDS)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._clean:
                self._carrier.end()
            else:
                self._carrier.close()
            if self._handlers:
                _, late = await asyncio.wait(self._handlers, timeout=_HANDLERS_SECONDS)
                for task in late:
                    task.cancel()

    async def _part(self, part: Coroutine[Any, Any, None]) -> None:
        try:
            await part
        except ProtocolError as error:
            _log.warning("link.protocol", peer=self._name, reason=str(error))
            self._stop(f"the other end broke the protocol: {error}", tell=True)
        except OSError as error:
            self._stop(f"the connection was lost: {error}", tell=False)
        except Exception:
            _log.exception("link.failed", peer=self._name)
            self._stop("internal error", tell=True)

    def _stop(self, reason: str, *, tell: bool) -> None:
        if self.reason:
            return
        self.reason = reason
        last = self._core.shut(reason)
        self._last = last if tell else ""
        self._wake.set()
        self._stopping.set()
        _log.info("link.closed", peer=self._name, reason=reason)

    async def _write(self) -> None:
        while not self.reason:
            message = self._core.next()
            if message is not None:
                await self._carrier.send(message)
                continue
            self._wake.clear()
            pause_seconds = self._core.wait_seconds
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_seconds and min(pause_seconds, _PAUSE_SECONDS_MAX)):
                    await self._wake.wait()
        if self._last:
            await self._carrier.send(self._last)
            self._clean = True

    async def _read(self) -> None:
        while (message := await self._carrier.receive()) is not None:
            self._heard = True
            self._core.take(message)
            while self._core.opened:
                task = asyncio.create_task(self._serve(self._core.opened.popleft()))
                self._handlers.add(task)
                task.add_done_callback(self._handlers.discard)
            if self._core.bye is not None:
                self._clean = True
                self._stop(f"the other end closed the link: {self._core.bye}", tell=False)
                return
            if self._core.busy:
                self._wake.set()
        self._stop("the other end closed the connection", tell=False)

    async def _watch(self) -> None:
        silent_rounds = 0
        while silent_rounds < _SILENT_ROUNDS:
            await asyncio.sleep(self._ping_seconds)
            if self._heard:
                self._heard, silent_rounds = False, 0
                continue
            silent_rounds += 1
            self._core.ping()
            self._wake.set()
        self._stop(f"nothing came for {_SILENT_ROUNDS * self._ping_seconds:g} s", tell=False)

    async def _serve(self, channel: Channel) -> None:
        stream = ChannelStream(self, channel)
        try:
            await self.on_channel(channel.purpose, channel.arguments, stream)
            self._core.accept(channel)
            stream.end()
        except DrCloudError as error:
            _log.info("link.channel", peer=self._name, purpose=channel.purpose, reason=str(error))
            stream._refuse(Fault.of(error))
        except (OSError, TimeoutError) as error:
            _log.info("link.channel", peer=self._name, purpose=channel.purpose, reason=str(error))
            # The reason may tell of this end's insides: it stays here.
            stream._refuse(Fault.of(UnavailableError("what the channel leads to cannot be reached", "Try again.")))
        except Exception:
            _log.exception("link.channel_failed", peer=self._name, purpose=channel.purpose)
            stream._refuse(Fault(message="internal error", remedy="The other side's log tells more."))

    @property
    def _name(self) -> str:
        return self.peer.uri if self.peer is not None else ""


def _reason(channel: Channel) -> str:
    return channel.fault.message if channel.fault is not None else "the channel has ended"
