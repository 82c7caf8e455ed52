"""The source VDSA of one VPG: tap sockets, threads and the link around `SourceCore`.

Purpose
    Listens on a unix socket for taps (`dr_cloud.tap.wire`), hashes and seals in threads, and keeps a link of one or
    more connections to the target VDSA.

Retries
    The link is made again for ever, with growing waits. Two refusals end the process: another source has taken the VPG
    over; nothing else does. The taps never wait for any of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import structlog

from dr_cloud.link.messages import (
    KNOWN,
    Durable,
    Hello,
    Ping,
    Pong,
    Refused,
    RequestCheckpoint,
    Welcome,
    decode_control,
    decode_data,
    encode_control,
)
from dr_cloud.link.stream import Message, MessageStream
from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.vdsa.actions import (
    Action,
    Answer,
    CloseTap,
    FlushSoon,
    NewStream,
    Prepare,
    ReadTap,
    Seal,
    Send,
    SendTap,
    SourceLimits,
)
from dr_cloud.vdsa.batch import prepare, seal
from dr_cloud.vdsa.feed import FeedParser
from dr_cloud.vdsa.source import SourceCore

_PING_SECONDS: Final = 5.0
_SILENCE_SECONDS: Final = 30.0
_WELCOME_SECONDS: Final = 30.0
_TICK_SECONDS: Final = 0.05
_WAIT_SECONDS_MIN: Final = 0.1
_WAIT_SECONDS_MAX: Final = 5.0
_TAP_WRITE_BYTES_MAX: Final = 1 << 20
"""A tap that does not read its small messages gets no more of them than this."""

_log = structlog.get_logger(__name__)


class ReplacedError(DrCloudError):
    """Another source VDSA has taken the VPG over; this one must stop."""


class _RefusedError(DrCloudError):
    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason, refused.remedy)
        self.code = refused.code


class _TapProtocol(asyncio.BufferedProtocol):
    """One tap's connection."""

    def __init__(self, source: SourceVdsa) -> None:
        self._source = source
        self._parser = FeedParser()
        self.transport: asyncio.Transport | None = None
        self.number = next(source.tap_numbers)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self.transport = cast("asyncio.Transport", transport)
        self._source.tap_made(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._parser.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._source.tap_sent(self, self._parser.advance(nbytes), self._parser)
        except ProtocolError as error:
            self.abort(str(error))

    def send(self, data: bytes) -> None:
        """Send one message to the tap, unless it has stopped to read."""
        assert self.transport is not None
        if self.transport.get_write_buffer_size() > _TAP_WRITE_BYTES_MAX:
            self.abort("the tap does not read")
        elif not self.transport.is_closing():
            self.transport.write(data)

    def read(self, reading: bool) -> None:
        """Read on, or stop to."""
        assert self.transport is not None
        if self.transport.is_closing():
            return
        if reading:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def abort(self, reason: str) -> None:
        """Close at once."""
        assert self.transport is not None
        _log.warning("vdsa.tap_closed", connection=self.number, reason=reason)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._source.tap_lost(self)


class SourceVdsa:
    """See the module's docstring. All methods belong to one event loop."""

    def __init__(
        self,
        keys: VpgKeys,
        scope: Scope,
        tap_socket: Path,
        connect: Callable[[], Awaitable[MessageStream]],
        *,
        connections: int = 1,
        limits: SourceLimits | None = None,
    ) -> None:
        """Prepare a source; `run` starts it.

        Args:
            keys: The scope's keys.
            scope: Which VPG, to which target.
            tap_socket: Where taps connect.
            connect: Makes one connection to the target VDSA.
            connections: How many connections share the stream.
            limits: Bounds and rhythm.
        """
        self.scope = scope
        self.tap_numbers = itertools.count(1)
        self._keys = keys
        self._tap_socket = tap_socket
        self._connect = connect
        self._connection_count = connections
        self._limits = limits or SourceLimits()
        self.core = SourceCore(self._limits, lambda: secrets.token_bytes(16), time.monotonic_ns())
        self._taps: dict[int, _TapProtocol] = {}
        self._pool = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 2)), "seal")
        self._flush_timer: asyncio.TimerHandle | None = None
        self._senders: list[_Sender] = []
        self._turn = 0
        self._link_reset = asyncio.Event()
        self._wait_seconds = _WAIT_SECONDS_MIN
        self._answers: dict[str, asyncio.Future[Durable]] = {}
        self._failure: asyncio.Future[None] | None = None
        self.problem = ""

    async def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until cancelled. Raises `ReplacedError` if another source has taken over."""
        loop = asyncio.get_running_loop()
        self._failure = loop.create_future()
        self._tap_socket.unlink(missing_ok=True)
        server = await loop.create_unix_server(lambda: _TapProtocol(self), str(self._tap_socket))
        tasks = [asyncio.create_task(self._link_for_ever()), asyncio.create_task(self._tick_for_ever())]
        if on_ready is not None:
            on_ready()
        try:
            done, _ = await asyncio.wait([*tasks, self._failure], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                await task
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for tap in list(self._taps.values()):
                assert tap.transport is not None
                tap.transport.abort()
            # The socket's file stays: a source that took over may have put its own there.
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def checkpoint(self, tag: str, description: str = "", wait_seconds: float = 30.0) -> Durable:
        """Make a checkpoint by hand and wait until it is durable. Raises `DrCloudError` after `wait_seconds`."""
        request = uuid.uuid4().hex
        future: asyncio.Future[Durable] = asyncio.get_running_loop().create_future()
        self._answers[request] = future
        self._do(self.core.request_checkpoint(request, tag, description))
        try:
            return await asyncio.wait_for(future, wait_seconds)
        except TimeoutError:
            self._do(self.core.withdraw(request))
            link = "up" if self.core.linked else self.problem or "down"
            raise DrCloudError(
                f"checkpoint {tag!r} of {self.scope.prefix} is not durable after {wait_seconds:g} s",
                f"Taps: {self.core.tap_states() or 'none'}; link: {link}.",
            ) from None
        finally:
            self._answers.pop(request, None)

    def forget_tap(self, tap_id: str) -> None:
        """A tap left the VPG for good: checkpoints no longer wait for it to come back."""
        self._do(self.core.forget_tap(tap_id))

    def status(self) -> dict[str, Any]:
        """Return the state in figures."""
        return {
            "taps": self.core.tap_states(),
            "linked": self.core.linked,
            "problem": self.problem,
            "kept_bytes": self.core.kept_bytes,
            "checkpoints": self.core.checkpoints,
            "skipped": self.core.skipped,
            "resyncs": self.core.resyncs,
        }

    # Taps.

    def tap_made(self, tap: _TapProtocol) -> None:
        """A tap has connected."""
        self._taps[tap.number] = tap
        self._do(self.core.tap_connected(tap.number))

    def tap_sent(self, tap: _TapProtocol, records: list[Any], parser: FeedParser) -> None:
        """A tap's bytes were parsed."""
        if records and tap.number in self._taps:
            self._do(self.core.received(tap.number, records, parser.hello))

    def tap_lost(self, tap: _TapProtocol) -> None:
        """A tap's connection is gone."""
        self._taps.pop(tap.number, None)
        self._do(self.core.tap_closed(tap.number))

    # Actions.

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Send():
                    self._senders[self._turn % len(self._senders)].put(action.message)
                    self._turn += 1
                case Prepare():
                    self._in_thread(prepare, self.core.prepared, action.stream, action.number, action.batch)
                case Seal():
                    self._in_thread(
                        seal,
                        self.core.sealed,
                        action.stream,
                        action.number,
                        action.prepared,
                        action.locs,
                    )
                case SendTap():
                    if (tap := self._taps.get(action.connection)) is not None:
                        tap.send(action.data)
                case ReadTap():
                    if (tap := self._taps.get(action.connection)) is not None:
                        tap.read(action.reading)
                case CloseTap():
                    if (tap := self._taps.pop(action.connection, None)) is not None:
                        tap.abort(action.reason)
                case FlushSoon():
                    if self._flush_timer is None:
                        loop = asyncio.get_running_loop()
                        self._flush_timer = loop.call_later(self._limits.batch_seconds, self._flush)
                case NewStream():
                    self._link_reset.set()
                case Answer():
                    future = self._answers.get(action.durable.request)
                    if future is not None and not future.done():
                        future.set_result(action.durable)

    def _flush(self) -> None:
        self._flush_timer = None
        self._do(self.core.flush())

    def _in_thread(self, work: Callable[..., Any], answer: Callable[..., list[Action]], *arguments: Any) -> None:
        stream, number = arguments[:2]
        call = arguments if work is seal else arguments[2:]
        future = asyncio.get_running_loop().run_in_executor(self._pool, work, self._keys, *call)

        def done(finished: asyncio.Future[Any]) -> None:
            if finished.cancelled():
                return
            try:
                self._do(answer(stream, number, finished.result()))
            except Exception as error:
                self._fail(error)

        future.add_done_callback(done)

    def _fail(self, error: Exception) -> None:
        """A bug: stop, rather than go on with a stream that has a hole."""
        if self._failure is not None and not self._failure.done():
            self._failure.set_exception(error)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(_TICK_SECONDS, self._limits.checkpoint_seconds / 4))
            self._do(self.core.tick(time.monotonic_ns()))

    # The link.

    async def _link_for_ever(self) -> None:
        while True:
            self._link_reset.clear()
            try:
                await self._link()
            except (OSError, TimeoutError, ProtocolError) as error:
                self._trouble(str(error) or type(error).__name__)
            except _RefusedError as error:
                self._trouble(f"{error}. {error.remedy}".strip())
                if error.code == "replaced":
                    raise ReplacedError(str(error), "Stop the other source VDSA, or leave this one stopped.") from None
                if error.code == "stream":
                    self._do(self.core.lost_stream())
            if not self._link_reset.is_set():
                self._do(self.core.unlinked())
            await asyncio.sleep(self._wait_seconds * random.uniform(0.8, 1.2))
            self._wait_seconds = min(self._wait_seconds * 2, _WAIT_SECONDS_MAX)

    def _trouble(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning("vdsa.link", scope=self.scope.prefix, reason=problem)
        self.problem = problem

    async def _link(self) -> None:
        """Connect, and carry the stream until it breaks (an error) or is given up (returns)."""
        stream_id = self.core.stream
        async with contextlib.AsyncExitStack() as stack:
            streams = []
            for number in range(self._connection_count):
                stream = await self._connect()
                stack.callback(stream.close)
                hello = Hello(
                    scope=self.scope,
                    stream=stream_id.hex(),
                    connection=number,
                    connections=self._connection_count,
                )
                await stream.send(encode_control(hello))
                streams.append(stream)
            welcomes = [await self._welcome(stream) for stream in streams]
            if len({welcome.generation for welcome in welcomes}) > 1:
                raise ProtocolError("the connections reached two targets")
            self._senders = [_Sender(stream) for stream in streams]
            self.problem = ""
            self._do(self.core.welcomed(max(welcomes, key=lambda welcome: welcome.received)))
            work: list[Coroutine[Any, Any, Any]] = [sender.run() for sender in self._senders]
            work += [self._read(stream, stream_id) for stream in streams]
            tasks = [asyncio.create_task(part) for part in (*work, self._link_reset.wait())]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _welcome(self, stream: MessageStream) -> Welcome:
        message = await asyncio.wait_for(stream.receive(), _WELCOME_SECONDS)
        if message is None:
            raise ConnectionResetError("the target closed the connection")
        control = decode_control(message) if isinstance(message, str) else None
        if isinstance(control, Refused):
            raise _RefusedError(control)
        if not isinstance(control, Welcome):
            raise ProtocolError("the target did not answer hello with welcome")
        return control

    async def _read(self, stream: MessageStream, stream_id: bytes) -> None:
        while True:
            message = await asyncio.wait_for(stream.receive(), _SILENCE_SECONDS)
            if message is None:
                raise ConnectionResetError("the target closed the connection")
            if stream_id != self.core.stream:
                return
            if not isinstance(message, str):
                kind, number, body = decode_data(message)
                if kind != KNOWN:
                    raise ProtocolError(f"a target does not send binary messages of kind {kind}")
                self._do(self.core.known(number, np.frombuffer(body, "<u8")))
                continue
            control = decode_control(message)
            match control:
                case Durable():
                    self._wait_seconds = _WAIT_SECONDS_MIN
                    self._do(self.core.durable(control))
                case RequestCheckpoint():
                    self._do(self.core.request_checkpoint(control.id, control.tag, control.description))
                case Refused():
                    raise _RefusedError(control)
                case Pong():
                    pass
                case _:
                    raise ProtocolError(f"a target does not send {control.type}")


class _Sender:
    """Sends the messages of one connection, in their order, and a ping when there are none."""

    def __init__(self, stream: MessageStream) -> None:
        self._stream = stream
        self._queue: deque[Message] = deque()
        self._ready = asyncio.Event()

    def put(self, message: Message) -> None:
        """Send `message` when those before it have left."""
        self._queue.append(message)
        self._ready.set()

    async def run(self) -> None:
        """Send until an error."""
        ping_at = 0.0
        while True:
            if time.monotonic() >= ping_at:
                ping_at = time.monotonic() + _PING_SECONDS
                await self._stream.send(encode_control(Ping()))
            while self._queue:
                await self._stream.send(self._queue.popleft())
            self._ready.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ready.wait(), _PING_SECONDS)
