"""The source VDSA of one VPG and one of its targets: threads and the link around `SourceCore`.

Purpose
    Takes what the hub's taps send (`dr_cloud.vdsa.hub`), hashes and seals in threads, and keeps a link of one or more
    connections to the target VDSA. Threads and the clock's ticks are the hub's, shared by all its sources.

Retries
    The link is made again for ever, with growing waits. One refusal ends the source: another one has taken the VPG
    over. The taps never wait for any of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import Executor
from typing import Any, Final, Protocol

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
from dr_cloud.link.stream import Message, MessageStream, parts_of
from dr_cloud.link.throttle import Bucket
from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.model.replication import SourceOrders, SourceReport
from dr_cloud.model.units import SECOND_NS
from dr_cloud.seal.keys import VpgKeys
from dr_cloud.vdsa.actions import (
    Action,
    Answer,
    CloseTap,
    EndHold,
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
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.source import SourceCore
from dr_cloud.vdsa.taps import Announced

_PING_NS: Final = 10 * SECOND_NS
"""The target is asked whether it is there when nothing has come from it for so long, and again after as long."""
_SILENCE_NS: Final = 30 * SECOND_NS
_WELCOME_SECONDS: Final = 30.0
_TICK_SECONDS_MIN: Final = 0.05
_TICK_SECONDS: Final = 0.25
_TICK_SECONDS_MAX: Final = 1.0
_WAIT_SECONDS_MIN: Final = 0.1
_WAIT_SECONDS_MAX: Final = 5.0
_ROOM_BYTES: Final = 2 << 20
"""With less than this waiting to be sent, the link keeps up."""

_log = structlog.get_logger(__name__)


class ReplacedError(DrCloudError):
    """Another source VDSA has taken the VPG over; this one must stop."""


class _RefusedError(DrCloudError):
    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason, refused.remedy)
        self.code = refused.code


class TapPort(Protocol):
    """A tap's connection, as its source sees it."""

    number: int

    def send(self, data: bytes) -> None:
        """Send one message."""

    def read(self, reading: bool) -> None:
        """Read on, or stop to."""

    def abort(self, reason: str) -> None:
        """Close at once."""


class SourceVdsa:
    """See the module's docstring. All methods belong to one event loop.

    Attributes:
        problem: Why the link does not stand, or why the source has stopped; empty if all is well.
        stopped: Done when the source has ended by itself: `ReplacedError`, or a bug.
    """

    def __init__(
        self,
        keys: VpgKeys,
        orders: SourceOrders,
        connect: Callable[[], Awaitable[MessageStream]],
        threads: Executor,
        *,
        connections: int = 1,
    ) -> None:
        """Begin.

        Args:
            keys: The scope's keys.
            orders: What to replicate, and how.
            connect: Makes one connection to the target VDSA.
            threads: For hashing and sealing.
            connections: How many connections share the stream.
        """
        self.orders = orders
        self._keys = keys
        self._connect = connect
        self._connection_count = connections
        self._threads = threads
        self.core = SourceCore(
            _limits(orders), orders.members, lambda: secrets.token_bytes(16), time.monotonic_ns(), time.time_ns
        )
        self._bucket = Bucket(orders.throttle)
        self._taps: dict[int, TapPort] = {}
        self._flush_timer: asyncio.TimerHandle | None = None
        self._senders: list[_Sender] = []
        self._turn = 0
        self._link_reset = asyncio.Event()
        self._wait_seconds = _WAIT_SECONDS_MIN
        self._answers: dict[str, asyncio.Future[Durable]] = {}
        self._begun_ns = time.time_ns()
        self._ping_ns = self._heard_ns = 0
        self.problem = ""
        self._loop = asyncio.get_running_loop()
        self.stopped: asyncio.Future[None] = self._loop.create_future()
        self._link_task = self._loop.create_task(self._link_until_replaced(), name=f"link {orders.scope.prefix}")

    async def close(self) -> None:
        """Stop. The taps' connections are the hub's."""
        self._link_task.cancel()
        await asyncio.wait([self._link_task])
        self.stopped.cancel()
        if self._flush_timer is not None:
            self._flush_timer.cancel()

    def configure(self, orders: SourceOrders) -> None:
        """Follow other orders of the same scope. Taps whose disks change were taken away before."""
        again = orders.sync_number != self.orders.sync_number
        self.orders = orders
        self._bucket.throttle = orders.throttle
        self._do(self.core.configure(_limits(orders), orders.members))
        if again:
            self._do(self.core.send_everything())

    async def checkpoint(self, tag: str, description: str = "", wait_seconds: float = 30.0) -> Durable:
        """Make a checkpoint by hand and wait until it is durable. Raises `DrCloudError` after `wait_seconds`."""
        request = uuid.uuid4().hex
        future: asyncio.Future[Durable] = self._loop.create_future()
        self._answers[request] = future
        self._do(self.core.request_checkpoint(request, tag, description))
        try:
            return await asyncio.wait_for(future, wait_seconds)
        except TimeoutError:
            self._do(self.core.withdraw(request))
            link = "up" if self.core.linked else self.problem or "down"
            raise DrCloudError(
                f"checkpoint {tag!r} of {self.orders.scope.prefix} is not durable after {wait_seconds:g} s",
                f"Taps: {self.core.tap_states() or 'none'}; link: {link}.",
            ) from None
        finally:
            self._answers.pop(request, None)

    def report(self) -> SourceReport:
        """Return the state as the manager is told of it."""
        core = self.core
        return SourceReport(
            scope=self.orders.scope,
            linked=core.linked,
            problem=self.problem,
            taps=core.tap_states(),
            kept_bytes=core.kept_bytes,
            durable_ns=core.durable_ns,
            lag_seconds=max(0.0, (time.time_ns() - (core.durable_ns or self._begun_ns)) / SECOND_NS),
            checkpoints=core.checkpoints,
            skipped=core.skipped,
            resyncs=core.resyncs,
        )

    # Taps.

    def attach(self, tap: TapPort, announced: Announced) -> None:
        """A tap of this VPG has said HELLO."""
        self._taps[tap.number] = tap
        self._do(self.core.tap_connected(tap.number, announced))

    def tap_sent(self, tap: TapPort, records: Iterable[Record]) -> None:
        """A tap's bytes were parsed. Raises `ProtocolError`."""
        if tap.number in self._taps:
            self._do(self.core.received(tap.number, records))

    def detach(self, tap: TapPort) -> None:
        """A tap's connection is gone, or no longer this VPG's."""
        if self._taps.pop(tap.number, None) is not None:
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
                        action.level,
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
                        self._flush_timer = self._loop.call_later(self.core.limits.batch_seconds, self._flush)
                case EndHold():
                    self._loop.call_later(self.core.limits.hold_seconds, self._end_hold, action.id)
                case NewStream():
                    self._link_reset.set()
                case Answer():
                    future = self._answers.get(action.durable.request)
                    if future is not None and not future.done():
                        future.set_result(action.durable)

    def _flush(self) -> None:
        self._flush_timer = None
        self._do(self.core.flush())

    def _end_hold(self, question: int) -> None:
        if not self.stopped.done():
            self._do(self.core.end_hold(question))

    def _in_thread(self, work: Callable[..., Any], answer: Callable[..., list[Action]], *arguments: Any) -> None:
        stream, number = arguments[:2]
        call = arguments if work is seal else arguments[2:]
        future = self._loop.run_in_executor(self._threads, work, self._keys, *call)

        def done(finished: asyncio.Future[Any]) -> None:
            if finished.cancelled() or self.stopped.done():
                return
            try:
                self._do(answer(stream, number, finished.result()))
            except Exception as error:
                self._fail(error)

        future.add_done_callback(done)

    def _fail(self, error: Exception) -> None:
        """Stop, rather than go on with a stream that has a hole."""
        if not self.stopped.done():
            self.problem = str(error) or repr(error)
            self.stopped.set_exception(error)

    def tick_seconds(self, now_ns: int) -> float:
        """Return after how long `tick` is to be called: when a checkpoint is due, and often while much goes on."""
        quiet_seconds = min(_TICK_SECONDS_MAX, self.core.quiet_seconds(now_ns))
        often_seconds = min(_TICK_SECONDS, self.orders.checkpoint_seconds / 4)
        return max(_TICK_SECONDS_MIN, quiet_seconds or often_seconds)

    def tick(self, now_ns: int) -> None:
        """The monotonic clock moved on."""
        if self.stopped.done():
            return
        if self.core.linked:
            if now_ns - self._heard_ns > _SILENCE_NS:
                self._trouble("the target is silent")
                self._link_reset.set()
            if now_ns - max(self._heard_ns, self._ping_ns) >= _PING_NS:
                self._ping_ns = now_ns
                for sender in self._senders:
                    sender.put(encode_control(Ping()))
        queued_bytes = sum(sender.queued_bytes for sender in self._senders)
        self._do(self.core.tick(now_ns, queued_bytes < _ROOM_BYTES))

    # The link.

    async def _link_until_replaced(self) -> None:
        try:
            await self._link_for_ever()
        except Exception as error:
            self._fail(error)

    async def _link_for_ever(self) -> None:
        while True:
            self._link_reset.clear()
            try:
                await self._link()
            except _RefusedError as error:
                self._trouble(f"{error}. {error.remedy}".strip())
                if error.code == "replaced":
                    raise ReplacedError(str(error), "Stop the other source VDSA, or leave this one stopped.") from None
                if error.code == "stream":
                    self._do(self.core.lost_stream())
            except (OSError, TimeoutError, DrCloudError) as error:
                self._trouble(str(error) or type(error).__name__)
            if self.core.linked:
                self._do(self.core.unlinked())
            await asyncio.sleep(self._wait_seconds * random.uniform(0.8, 1.2))
            self._wait_seconds = min(self._wait_seconds * 2, _WAIT_SECONDS_MAX)

    def _trouble(self, problem: str) -> None:
        if problem != self.problem:
            _log.warning("vdsa.link", scope=self.orders.scope.prefix, reason=problem)
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
                    scope=self.orders.scope,
                    stream=stream_id.hex(),
                    connection=number,
                    connections=self._connection_count,
                )
                await stream.send(encode_control(hello))
                streams.append(stream)
            welcomes = [await self._welcome(stream) for stream in streams]
            if len({welcome.generation for welcome in welcomes}) > 1:
                raise ProtocolError("the connections reached two targets")
            self._senders = [_Sender(stream, self._bucket) for stream in streams]
            self.problem = ""
            self._heard_ns = time.monotonic_ns()
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
            message = await stream.receive()
            if message is None:
                raise ConnectionResetError("the target closed the connection")
            self._heard_ns = time.monotonic_ns()
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
    """Sends the messages of one connection, in their order, as fast as the throttle lets it.

    Attributes:
        queued_bytes: What waits.
    """

    def __init__(self, stream: MessageStream, bucket: Bucket) -> None:
        self._stream = stream
        self._bucket = bucket
        self._queue: deque[Message] = deque()
        self._ready = asyncio.Event()
        self.queued_bytes = 0

    def put(self, message: Message) -> None:
        """Send `message` when those before it have left."""
        self._queue.append(message)
        self.queued_bytes += _size(message)
        self._ready.set()

    async def run(self) -> None:
        """Send until an error."""
        while True:
            while self._queue:
                while wait_seconds := self._bucket.wait_seconds(time.time_ns()):
                    await asyncio.sleep(min(wait_seconds, 1.0))
                message = self._queue.popleft()
                size_bytes = _size(message)
                self.queued_bytes -= size_bytes
                self._bucket.spend(size_bytes, time.time_ns())
                await self._stream.send(message)
            self._ready.clear()
            await self._ready.wait()


def _size(message: Message) -> int:
    return sum(map(len, parts_of(message)[1]))


def _limits(orders: SourceOrders) -> SourceLimits:
    return SourceLimits(checkpoint_seconds=orders.checkpoint_seconds, order=orders.order)
