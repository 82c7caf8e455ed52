"""The target VDSA: serves the sources of many scopes (enterprises), each apart from the others.

Purpose
    One process takes in streams over any `MessageStream`. What belongs to a scope (keys, store, writer, digest index,
    streams) is in its `ScopeService`; nothing is shared but threads. Its owner says by `admit` which scopes it serves.

Threads
    They do not grow with the scopes: a few for the processor's work, and a few for each store, so that a store that
    hangs holds up only the scopes that lie in it.

Hostile or broken peers
    A peer that says no valid hello in time, breaks the protocol, has a wrong scope or no key here, gets a reason and is
    closed. The other connections and scopes go on.

Crash recovery
    A scope is opened by its source's first hello: the writer claims a new generation and recovers from the store. One
    that failed (another writer took over) stays closed until `release`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import structlog

from dr_cloud.journal.catalogue import Catalogue
from dr_cloud.journal.writer import JournalWriter
from dr_cloud.link.messages import (
    FRAME,
    LINK_VERSION,
    OFFER,
    CheckpointItem,
    Hello,
    Ping,
    Pong,
    Taps,
    decode_control,
    decode_data,
    encode_control,
)
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.errors import DrCloudError, ProtocolError
from dr_cloud.model.ids import Scope
from dr_cloud.model.journal import ImagePlan
from dr_cloud.model.replication import TargetReport
from dr_cloud.seal.keyring import Keyring
from dr_cloud.store.store import Store
from dr_cloud.vdsa.scope import ScopeService, ScopeStatus, refuse
from dr_cloud.vdsa.target import FrameItem

HELLO_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 60.0
"""A connection on which nothing came for so long is closed (a source pings every few seconds)."""
STORE_THREADS: Final = 8
"""For each store: openings and commits at the same time."""

_log = structlog.get_logger(__name__)


class TargetVdsa:
    """The target side of any number of scopes. All methods belong to one event loop."""

    def __init__(
        self,
        keyring: Keyring,
        work_dir: Path | None,
        admit: Callable[[Scope], Store],
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Serve every scope that `admit` lets in and whose enterprise has a key in `keyring`.

        Args:
            keyring: The enterprises' keys.
            work_dir: For digest indexes, one folder per scope; None keeps none, so nothing is deduplicated.
            admit: Returns the store of a scope's journal, or raises `DrCloudError` if the scope is not served here. It
                is called on the event loop for every hello; scopes that share a store are given the same object.
            clock_ns: Nanoseconds since the epoch.
        """
        self._keyring = keyring
        self._work_dir = work_dir
        self._admit = admit
        self._clock_ns = clock_ns
        self._scopes: dict[Scope, ScopeService] = {}
        self._opening: dict[Scope, asyncio.Lock] = {}
        self._workers = ThreadPoolExecutor(max(2, os.cpu_count() or 2), "journal")
        self._stores: dict[Store, ThreadPoolExecutor] = {}

    # Sources.

    async def serve(self, stream: MessageStream) -> None:
        """Serve one connection of a source until it ends."""
        try:
            hello = await self._hello(stream)
            service = await self._service(hello.scope)
        except DrCloudError as error:
            _log.warning("vdsa.denied", reason=str(error))
            await refuse(stream, "denied", str(error), error.remedy)
            return
        except (OSError, TimeoutError) as error:
            _log.info("vdsa.no_hello", reason=str(error))
            stream.close()
            return
        try:
            if await service.attach(hello, stream):
                await self._serve_stream(service, hello, stream)
        except ProtocolError as error:
            _log.warning("vdsa.protocol", scope=hello.scope.prefix, reason=str(error))
            await refuse(stream, "stream", str(error), error.remedy)
        except (OSError, TimeoutError) as error:
            _log.info("vdsa.connection_lost", scope=hello.scope.prefix, reason=str(error))
        finally:
            service.detach(hello, stream)
            stream.end()

    async def _hello(self, stream: MessageStream) -> Hello:
        message = await asyncio.wait_for(stream.receive(), HELLO_SECONDS)
        if message is None:
            raise ConnectionResetError("closed before hello")
        if not isinstance(message, str) or not isinstance(hello := decode_control(message), Hello):
            raise ProtocolError("the first message must be hello")
        if hello.version != LINK_VERSION:
            raise ProtocolError(
                f"the source speaks version {hello.version} of the link, this is {LINK_VERSION}",
                "Bring both sides to the same release.",
            )
        return hello

    async def _serve_stream(self, service: ScopeService, hello: Hello, stream: MessageStream) -> None:
        while (message := await asyncio.wait_for(stream.receive(), SILENCE_SECONDS)) is not None:
            if isinstance(message, str):
                control = decode_control(message)
                if isinstance(control, Ping):
                    await stream.send(encode_control(Pong()))
                elif isinstance(control, Taps | CheckpointItem):
                    service.take(hello.stream, control)
                else:
                    raise ProtocolError(f"a source does not send {control.type}")
                continue
            kind, number, body = decode_data(message)
            if kind == FRAME:
                service.take(hello.stream, FrameItem(number, body))
            elif kind == OFFER:
                await service.answer_offer(stream, number, bytes(body))
            else:
                raise ProtocolError(f"a source does not send binary messages of kind {kind}")

    async def _service(self, scope: Scope) -> ScopeService:
        """Return the scope's service, opened if need be. Raises `DrCloudError`."""
        scope.checked()
        async with self._opening.setdefault(scope, asyncio.Lock()):
            store = self._admit(scope)
            service = self._scopes.get(scope)
            if service is None:
                threads = self._threads(store)
                writer = await asyncio.get_running_loop().run_in_executor(threads, self._open, store, scope)
                service = self._scopes[scope] = ScopeService(scope, writer, self._workers, threads)
                _log.info("vdsa.scope", scope=scope.prefix, generation=writer.generation)
        return service

    def _threads(self, store: Store) -> ThreadPoolExecutor:
        threads = self._stores.get(store)
        if threads is None:
            threads = self._stores[store] = ThreadPoolExecutor(STORE_THREADS, "store")
        return threads

    def _open(self, store: Store, scope: Scope) -> JournalWriter:
        keys = self._keyring.vpg_keys(scope)
        work_dir = self._work_dir / scope.enterprise / scope.vpg / scope.target if self._work_dir else None
        return JournalWriter.open(store, keys, scope, clock_ns=self._clock_ns, work_dir=work_dir)

    async def release(self, scope: Scope) -> None:
        """Close one scope, if it is open here. Its source may come again as far as `admit` lets it."""
        async with self._opening.setdefault(scope, asyncio.Lock()):
            service = self._scopes.pop(scope, None)
            if service is not None:
                await service.close()
                _log.info("vdsa.released", scope=scope.prefix)

    # For actors.

    async def catalogue(self, scope: Scope) -> Catalogue:
        """Return the scope's catalogue: the writer's if it is open here, else read from the store."""
        service = self._scopes.get(scope)
        if service is not None:
            return service.core.catalogue
        store = self._admit(scope)
        keys = self._keyring.vpg_keys(scope)
        return await asyncio.get_running_loop().run_in_executor(
            self._threads(store), Catalogue.load, store, keys, scope
        )

    async def plan(self, scope: Scope, at_ns: int) -> ImagePlan:
        """Return the plan of the scope's image at a time. Raises `TimeOutOfRangeError`."""
        return (await self.catalogue(scope)).plan(at_ns)

    async def checkpoint(
        self,
        scope: Scope,
        tag: str,
        description: str = "",
        wait_seconds: float | None = 30.0,
        request_id: str = "",
    ) -> str:
        """Make a checkpoint by hand; see `ScopeService.checkpoint`."""
        return await self._open_service(scope).checkpoint(tag, description, wait_seconds, request_id)

    def status(self, scope: Scope) -> ScopeStatus:
        """Return the state of a scope that is open here."""
        return self._open_service(scope).status()

    def reports(self) -> list[TargetReport]:
        """Return how each scope that is open here stands."""
        return [service.report() for service in self._scopes.values()]

    def _open_service(self, scope: Scope) -> ScopeService:
        service = self._scopes.get(scope)
        if service is None:
            raise DrCloudError(f"no source of {scope.prefix} has connected to this target", "Start its source VDSA.")
        return service

    async def close(self) -> None:
        """Close every scope; commits under way are finished."""
        scopes, self._scopes = self._scopes, {}
        await asyncio.gather(*(service.close() for service in scopes.values()))
        for threads in (self._workers, *self._stores.values()):
            threads.shutdown(wait=False)
