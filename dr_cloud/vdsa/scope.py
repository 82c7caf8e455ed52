"""One scope on the target side: its writer, its stream, its connections. The shell around `TargetCore`.

Concurrency
    One task applies items in order, one at a time, in a thread; one commit is under way at a time, in another, while
    the next interval fills. The threads are shared: `workers` for the processor's work, `store_threads` for what waits
    for the store.

Failures
    The store is away: the commit is tried again for ever; the source stops at its credit, the taps go on by bitmap.
    Another writer took over (`FencedError`): the scope is closed and every hello is refused. A frame that does not
    open: the stream is refused; the scope goes on with the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from concurrent.futures import Executor
from typing import Final

import structlog
from pydantic import BaseModel, ConfigDict

from dr_cloud.journal.writer import JournalWriter
from dr_cloud.link.messages import (
    KNOWN,
    CheckpointItem,
    Durable,
    Hello,
    Refused,
    RefusedCode,
    RequestCheckpoint,
    Welcome,
    encode_control,
    encode_data,
)
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.errors import DrCloudError, FencedError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import Checkpoint, Disk
from dr_cloud.model.replication import TargetReport
from dr_cloud.store.errors import StoreUnavailableError
from dr_cloud.vdsa.target import FILLING_BYTES_MAX, Item, Pending, TargetCore

_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class ScopeStatus(BaseModel):
    """What a target tells of one scope."""

    model_config = ConfigDict(frozen=True)

    scope: Scope
    generation: int
    connections: int
    stream: str | None
    items_received: int
    duplicates: int
    checkpoints: int
    newest: Checkpoint
    """The newest checkpoint of any kind."""
    horizon_ns: int | None
    newest_ns: int | None
    """The latest time that has an image."""
    disks: list[Disk]
    cuts: dict[str, int]
    problem: str = ""


class ScopeService:
    """The target side of one scope. All methods belong to the event loop."""

    def __init__(self, scope: Scope, writer: JournalWriter, workers: Executor, store_threads: Executor) -> None:
        """Serve `scope` with its `writer`."""
        self.scope = scope
        self.core = TargetCore(writer)
        self.problem = ""
        self._code: RefusedCode = "denied"
        self._workers = workers
        self._store_threads = store_threads
        self._summed = (0, 0)
        self._connections: dict[int, MessageStream] = {}
        self._queue: asyncio.Queue[tuple[str, Item]] = asyncio.Queue()
        self._commit: asyncio.Task[None] | None = None
        self._waiting: dict[str, asyncio.Future[Durable]] = {}
        self._requests: dict[str, RequestCheckpoint] = {}
        self._worker = asyncio.create_task(self._work(), name=f"journal {scope.prefix}")

    # Connections.

    async def attach(self, hello: Hello, stream: MessageStream) -> bool:
        """Take a connection of a source in; False (with the reason sent) if it is refused."""
        if self.problem:
            await refuse(stream, self._code, self.problem)
            return False
        before = self.core.stream
        welcome = self.core.hello(hello.stream)
        if not isinstance(welcome, Welcome):
            await refuse(stream, welcome, f"this stream of {self.scope.prefix} has ended")
            return False
        if hello.stream != before:
            _log.info("vdsa.stream", scope=self.scope.prefix, stream=hello.stream, before=before)
            await self._refuse_all("replaced", f"another source has taken {self.scope.prefix} over")
        elif (former := self._connections.pop(hello.connection, None)) is not None:
            former.close()
        self._connections[hello.connection] = stream
        await stream.send(encode_control(welcome))
        if hello.connection == 0:
            for durable in list(self.core.durables):
                await stream.send(encode_control(durable))
            for request in list(self._requests.values()):
                await stream.send(encode_control(request))
        return True

    def detach(self, hello: Hello, stream: MessageStream) -> None:
        """The connection has ended."""
        if self._connections.get(hello.connection) is stream:
            del self._connections[hello.connection]

    def take(self, stream_id: str, item: Item) -> None:
        """An item came over a connection of `stream_id`. Raises `ProtocolError`."""
        if stream_id == self.core.stream:
            for ready in self.core.receive(item):
                self._queue.put_nowait((stream_id, ready))

    async def answer_offer(self, stream: MessageStream, number: int, digests: bytes) -> None:
        """Tell which blocks the journal has."""
        loop = asyncio.get_running_loop()
        locs = await loop.run_in_executor(self._workers, self.core.writer.known, digests)
        await stream.send(encode_data(KNOWN, number, locs.astype("<u8").tobytes()))

    async def _refuse_all(self, code: RefusedCode, reason: str, remedy: str = "") -> None:
        connections, self._connections = self._connections, {}
        for stream in connections.values():
            await refuse(stream, code, reason, remedy)

    async def _tell(self, message: Durable | RequestCheckpoint) -> None:
        for stream in list(self._connections.values()):
            try:
                await asyncio.wait_for(stream.send(encode_control(message)), 10.0)
                return
            except (OSError, TimeoutError):
                stream.close()

    # The journal.

    async def _work(self) -> None:
        """Apply items in order; commits run beside, one at a time."""
        loop = asyncio.get_running_loop()
        while True:
            stream_id, item = await self._queue.get()
            full = self.core.writer.pending_bytes >= FILLING_BYTES_MAX
            if self._commit is not None and (full or isinstance(item, CheckpointItem)):
                await asyncio.wait([self._commit])
            if self.problem:
                return
            try:
                pending = await loop.run_in_executor(self._workers, self.core.apply, stream_id, item)
            except DrCloudError as error:
                await self._refuse_stream(stream_id, error)
                continue
            if pending is not None:
                self._commit = asyncio.create_task(self._commit_until_done(pending))

    async def _refuse_stream(self, stream_id: str, error: DrCloudError) -> None:
        """An item cannot be applied: nothing of its stream after it may be."""
        _log.error("vdsa.refused", scope=self.scope.prefix, stream=stream_id, reason=str(error))
        waiting = [self._queue.get_nowait() for _ in range(self._queue.qsize())]
        for other, item in waiting:
            if other != stream_id:
                self._queue.put_nowait((other, item))
        if self.core.stream == stream_id:
            self.core.retire("stream")
            await self._refuse_all("stream", str(error), error.remedy)

    async def _commit_until_done(self, pending: Pending) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                durable = await loop.run_in_executor(self._store_threads, self.core.commit, pending)
                break
            except StoreUnavailableError as error:
                _log.error("vdsa.store", scope=self.scope.prefix, reason=str(error), remedy=error.remedy)
                await asyncio.sleep(_RETRY_SECONDS)
            except Exception as error:
                await self._fail(error)
                return
        if self.core.committed(pending, durable):
            await self._tell(durable)
        self._requests.pop(durable.request, None)
        future = self._waiting.pop(durable.request, None)
        if future is not None and not future.done():
            future.set_result(durable)

    async def _fail(self, error: Exception) -> None:
        """The writer cannot go on: say so, and serve this scope no more."""
        _log.error("vdsa.scope_failed", scope=self.scope.prefix, reason=str(error), exc_info=error)
        self._code = "fenced" if isinstance(error, FencedError) else "denied"
        self.problem = str(error) or repr(error)
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(DrCloudError(self.problem))
        self._waiting.clear()
        await self._refuse_all(self._code, self.problem, getattr(error, "remedy", ""))

    # For actors.

    async def checkpoint(self, tag: str, description: str, wait_seconds: float | None, request_id: str = "") -> str:
        """Ask the source for a checkpoint by hand and return the request's id.

        Args:
            tag: Its name.
            description: Its description.
            wait_seconds: How long to wait until it is durable; None returns at once.
            request_id: The id the request is to have; empty makes one up. One that is made or asked for is not made
                again.

        Raises:
            DrCloudError: There is no source, or the time has passed; the request is kept and sent again.
        """
        if self.problem:
            raise DrCloudError(self.problem)
        if request_id and any(one.request == request_id for one in reversed(self.core.catalogue.checkpoints)):
            return request_id
        request = RequestCheckpoint(id=request_id or uuid.uuid4().hex, tag=tag, description=description)
        future = self._waiting.setdefault(request.id, asyncio.get_running_loop().create_future())
        self._requests[request.id] = request
        await self._tell(request)
        if wait_seconds is None:
            return request.id
        try:
            await asyncio.wait_for(asyncio.shield(future), wait_seconds)
        except TimeoutError:
            why = "a disk is synchronising or a tap is away" if self._connections else "no source is connected"
            raise DrCloudError(
                f"checkpoint {tag!r} of {self.scope.prefix} is not durable after {wait_seconds:g} s: {why}",
                "It is made as soon as it can be; look at the VPG's status.",
            ) from None
        return request.id

    def status(self) -> ScopeStatus:
        """Return the state in figures."""
        writer = self.core.writer
        return ScopeStatus(
            scope=self.scope,
            generation=writer.generation,
            connections=len(self._connections),
            stream=self.core.stream,
            items_received=self.core.received,
            duplicates=self.core.duplicates,
            checkpoints=len(writer.catalogue.checkpoints),
            newest=writer.newest,
            horizon_ns=writer.catalogue.horizon_ns,
            newest_ns=writer.catalogue.newest_ns,
            disks=writer.disks,
            cuts=writer.cuts,
            problem=self.problem,
        )

    def report(self) -> TargetReport:
        """Return the state as the site or the manager is told of it."""
        writer = self.core.writer
        checkpoints = writer.catalogue.checkpoints
        seen, total_bytes = self._summed
        total_bytes += sum(ref.size_bytes for checkpoint in checkpoints[seen:] for ref in checkpoint.objects)
        self._summed = (len(checkpoints), total_bytes)
        return TargetReport(
            scope=self.scope,
            generation=writer.generation,
            connections=len(self._connections),
            newest=writer.newest,
            horizon_ns=writer.catalogue.horizon_ns,
            newest_ns=writer.catalogue.newest_ns,
            journal_bytes=total_bytes,
            problem=self.problem,
        )

    async def close(self) -> None:
        """Finish the commit under way and let the writer go. What was not cut is sent again by the taps."""
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        for stream in self._connections.values():
            stream.close()
        if self._commit is not None:
            await asyncio.wait([self._commit], timeout=_RETRY_SECONDS)
            self._commit.cancel()
        await asyncio.get_running_loop().run_in_executor(self._store_threads, self.core.writer.close)


async def refuse(stream: MessageStream, code: RefusedCode, reason: str, remedy: str = "") -> None:
    """Say why, and close."""
    with contextlib.suppress(OSError, TimeoutError):
        await asyncio.wait_for(stream.send(encode_control(Refused(code=code, reason=reason, remedy=remedy))), 1.0)
    stream.end()
