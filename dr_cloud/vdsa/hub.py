"""The source hub of a site: where all its taps connect, and from where each goes to the source of its VPG.

Purpose
    Listens for each host of the site, learns from a tap's HELLO which server and which copy it is, and hands its
    connection to the one source (VPG and target) that has that server as a member with that copy. A tap whose server
    no order names is kept connected and unread: it goes on by its bitmap, and costs a socket.

Orders
    `configure` takes all of them, as often as one likes. Sources start, stop and change; a tap whose VPG or disks have
    changed is let go and comes back by itself, with what is missing in its bitmap. So it is when a server moves to
    another host, or a disk is added, removed or resized there: its tap says HELLO anew. While two taps speak for one
    server, the later one counts, and the earlier one waits.

Consistency, retries, crash recovery: those of the sources (`dr_cloud.vdsa.source`) and taps. The hub keeps nothing.

Cost
    One ticker and a few threads for all sources.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from dr_cloud.link.messages import Durable
from dr_cloud.link.stream import MessageStream
from dr_cloud.model.errors import ConflictError, DrCloudError, NotFoundError
from dr_cloud.model.ids import Scope
from dr_cloud.model.replication import SeenServer, SourceOrders, SourceReport
from dr_cloud.seal.keyring import Keyring
from dr_cloud.tap import wire
from dr_cloud.vdsa.analysis.analyzers import Analyzers
from dr_cloud.vdsa.feed import Record
from dr_cloud.vdsa.ports import TapConnection
from dr_cloud.vdsa.source_io import ReplacedError, SourceVdsa
from dr_cloud.vdsa.taps import Announced

_HELLO_SECONDS: Final = 30.0
_MATCH_SECONDS: Final = 1.0
_SUCCESSOR_SECONDS: Final = 30.0
_ANALYSED_COPY: Final = 0
_AGAIN_SECONDS: Final = 5.0
"""So long after a failure a source is started again."""

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Replication:
    """One VPG to one target, by its orders."""

    orders: SourceOrders
    source: SourceVdsa | None = None
    problem: str = ""
    replaced: bool = False
    again_at: float = 0.0
    """Event loop time from which it may be started."""
    last: SourceReport | None = None
    """Of its last source, while it has none."""
    analysed_cut: tuple[int, bool] = (0, False)
    """The last one that the analyzers were told of."""
    analysed_bytes: tuple[int, int] = (0, 0)
    """What was sealed up to it (`SourceCore.sealed_bytes`)."""


class SourceHub:
    """See the module's docstring. All methods belong to one event loop."""

    def __init__(
        self,
        keyring: Keyring,
        connect: Callable[[Scope], Awaitable[MessageStream]],
        *,
        connections: int = 1,
        analyzers: Analyzers | None = None,
    ) -> None:
        """Prepare; `listen` and `configure` make it work.

        Args:
            keyring: The enterprises' keys.
            connect: Makes one connection to the target VDSA of a scope. `OSError` or `DrCloudError`: tried again.
            connections: How many connections each stream uses.
            analyzers: Look at what the first copy of each tap sends, and at each checkpoint of it.
        """
        self._analyzers = analyzers
        self._keyring = keyring
        self._connect = connect
        self._connection_count = connections
        self._threads = ThreadPoolExecutor(max(2, min(4, os.cpu_count() or 2)), "seal")
        self._numbers = itertools.count(1)
        self._servers: dict[str, asyncio.Server] = {}
        self._ports: dict[int, TapConnection] = {}
        self._attached: dict[int, tuple[_Replication, Announced]] = {}
        self._replications: dict[Scope, _Replication] = {}
        self._by_copy: dict[tuple[str, int], _Replication] = {}
        self._speakers: dict[tuple[str, int], dict[str, float]] = {}
        """By server and copy: the taps that have spoken for it, the newest last, and when it was last heard of."""
        self._configuring = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None

    # Hosts.

    async def listen(self, host: str, address: str, context: ssl.SSLContext | None = None) -> str:
        """Take the taps of a host; return the address, with the real port where 0 was asked for.

        Args:
            host: Its name.
            address: unix:/path/to/socket, or tls:HOST:PORT.
            context: For tls: a server's, which asks the taps for their certificates.

        Raises:
            DrCloudError: The host is listened for already, or the address is none.
            OSError: The address cannot be used.
        """
        if host in self._servers:
            raise ConflictError(f"the taps of host {host} are taken already", "Call unlisten first.")
        loop = asyncio.get_running_loop()
        scheme, _, rest = address.partition(":")
        name, _, port = rest.rpartition(":")

        def make() -> TapConnection:
            port = TapConnection(self, next(self._numbers), host)
            self._ports[port.number] = port
            return port

        if scheme == "unix" and rest:
            Path(rest).unlink(missing_ok=True)
            self._servers[host] = await loop.create_unix_server(make, rest)
            return address
        if scheme != "tls" or not name or not port.isdecimal() or context is None:
            raise DrCloudError(f"{address!r} is no address for taps", "Write unix:/path/to/socket or tls:HOST:PORT.")
        server = self._servers[host] = await loop.create_server(make, name.strip("[]"), int(port), ssl=context)
        return f"tls:{name}:{server.sockets[0].getsockname()[1]}"

    async def unlisten(self, host: str) -> None:
        """Let the taps of a host go, and take no more. The socket's file stays: it may be another's by now."""
        server = self._servers.pop(host, None)
        if server is not None:
            server.close()
        for port in list(self._ports.values()):
            if port.host == host:
                port.abort("the host has no VDSA any more")

    # Orders.

    async def configure(self, sources: Sequence[SourceOrders]) -> None:
        """Make the sources so. An order that cannot be followed is told in its report, and stops no other."""
        async with self._configuring:
            if self._ticker is None:
                self._ticker = asyncio.create_task(self._tick_for_ever(), name="source hub")
            wanted = {orders.scope: orders for orders in sources}
            closing = []
            for scope, known in list(self._replications.items()):
                orders = wanted.get(scope)
                if orders is None:
                    del self._replications[scope]
                    closing.append(self._stop(known, "the VPG is replicated no more"))
                elif orders.paused:
                    closing.append(self._stop(known, "the VPG is paused"))
                    known.orders = orders
                elif orders != known.orders:
                    self._change(known, orders)
            await asyncio.gather(*(source.close() for source in closing if source is not None))
            for scope, orders in wanted.items():
                self._start(self._replications.setdefault(scope, _Replication(orders)))
            self._match_all()
            if self._analyzers is not None:
                members = {server for orders in sources for server in orders.members}
                for server in set(self._analyzers.servers()) - members:
                    self._analyzers.forget(server)

    def _change(self, known: _Replication, orders: SourceOrders) -> None:
        """Follow other orders of a scope: taps whose part of it is another now are let go."""
        before, known.orders = known.orders, orders
        known.problem, known.replaced, known.again_at = "", False, 0.0
        for number, (owner, announced) in list(self._attached.items()):
            disks = orders.members.get(announced.server)
            if owner is known and (
                orders.copy_number != before.copy_number or disks != before.members.get(announced.server)
            ):
                self._detach(number, "the VPG has changed")
        if known.source is not None:
            known.source.configure(orders)

    def _stop(self, known: _Replication, reason: str) -> SourceVdsa | None:
        """Let the source and its taps go; return it, to be closed."""
        for number, (owner, _) in list(self._attached.items()):
            if owner is known:
                self._detach(number, reason)
        source, known.source = known.source, None
        if source is not None:
            known.last = source.report()
        return source

    def _start(self, known: _Replication) -> None:
        """Start the source, if it is to run and does not."""
        loop = asyncio.get_running_loop()
        if known.source is not None or known.orders.paused or known.replaced or loop.time() < known.again_at:
            return
        scope = known.orders.scope
        try:
            keys = self._keyring.vpg_keys(scope)
        except DrCloudError as error:
            known.problem = f"{error}. {error.remedy}".strip()
            known.again_at = loop.time() + _AGAIN_SECONDS
            return
        source = SourceVdsa(
            keys,
            known.orders,
            lambda: self._connect(scope),
            self._threads,
            connections=self._connection_count,
        )
        known.source, known.problem = source, ""
        source.stopped.add_done_callback(lambda _: self._stopped(known, source))
        _log.info("vdsa.source", scope=scope.prefix)

    def _stopped(self, known: _Replication, source: SourceVdsa) -> None:
        """A source has ended by itself."""
        if source.stopped.cancelled() or (error := source.stopped.exception()) is None or known.source is not source:
            return
        known.replaced = isinstance(error, ReplacedError)
        known.problem = str(error) or repr(error)
        known.again_at = asyncio.get_running_loop().time() + _AGAIN_SECONDS
        _log.error(
            "vdsa.source_stopped",
            scope=known.orders.scope.prefix,
            reason=known.problem,
            exc_info=None if known.replaced else error,
        )
        self._stop(known, "the source has stopped")

    def _detach(self, number: int, reason: str) -> None:
        known, _ = self._attached.pop(number)
        port = self._ports.get(number)
        if port is not None:
            if known.source is not None:
                known.source.detach(port)
            port.abort(reason)

    # Taps.

    def tap_greeted(self, port: TapConnection) -> None:
        """A tap has said who it is."""
        hello = port.hello
        assert hello is not None
        _log.info("vdsa.tap", host=port.host, server=hello.server, copy=hello.copy_number, disks=len(hello.disks))
        self._match(port)

    def tap_sent(self, port: TapConnection, records: list[Record]) -> None:
        """A tap sent records."""
        attached = self._attached.get(port.number)
        if attached is None or (source := attached[0].source) is None:
            return
        source.tap_sent(port, records)
        if self._analyzers is not None and attached[0].orders.copy_number == _ANALYSED_COPY:
            self._analyzers.take(attached[1].server, records)

    def _analyse_cut(self, known: _Replication, source: SourceVdsa) -> None:
        """Tell the analyzers of a checkpoint that has been made."""
        if not source.core.cut_sent:
            return
        cut = source.core.last_cut
        if self._analyzers is not None and cut != known.analysed_cut and known.orders.copy_number == _ANALYSED_COPY:
            raw, sealed = (now - then for now, then in zip(source.core.sealed_bytes, known.analysed_bytes, strict=True))
            known.analysed_cut, known.analysed_bytes = cut, source.core.sealed_bytes
            # A source that was begun anew counts from zero again.
            self._analyzers.interval(known.orders.members, cut[0], max(raw, 0), max(sealed, 0), cut[1])

    def tap_lost(self, port: TapConnection) -> None:
        """A tap's connection is gone."""
        self._ports.pop(port.number, None)
        known, _ = self._attached.pop(port.number, (None, None))
        if known is not None and known.source is not None:
            known.source.detach(port)

    def _match_all(self) -> None:
        self._by_copy = {}
        for known in self._replications.values():
            for server in known.orders.members if known.source is not None else ():
                self._by_copy.setdefault((server, known.orders.copy_number), known)
        for port in list(self._ports.values()):
            self._match(port)

    def _match(self, port: TapConnection) -> None:
        """Hand a tap that waits to the source that wants it."""
        hello = port.hello
        if hello is None or port.closed or port.number in self._attached:
            return
        known = self._by_copy.get((hello.server, hello.copy_number))
        if known is None or known.source is None or not self._speaks(port, hello):
            return
        indexes = known.orders.members[hello.server]
        disks = {
            disk.index: disk.model_copy(update={"index": indexes[disk.name], "name": f"{hello.server}/{disk.name}"})
            for disk in hello.disks
            if disk.name in indexes
        }
        if hello.disks and not disks:
            return  # the manager learns of its disks from here: a checkpoint without them would be none of this server
        # A copy's bits say nothing of another copy of the same tap, so it counts as another tap.
        tap_id = f"{int(hello.tap, 16) ^ hello.copy_number:032x}"
        announced = Announced(tap_id, hello.server, port.host, hello.durable, disks)
        self._attached[port.number] = known, announced
        port.attach({own: disk.index for own, disk in disks.items()})
        if self._analyzers is not None and hello.copy_number == _ANALYSED_COPY:
            plain = [disk for disk in hello.disks if disk.name in indexes]
            self._analyzers.announce(
                hello.server, [disk.model_copy(update={"index": indexes[disk.name]}) for disk in plain]
            )
        known.source.attach(port, announced)

    def _speaks(self, port: TapConnection, hello: wire.Hello) -> bool:
        """Whether this tap speaks for its server: the one that was heard of last does.

        One that spoke before (the server has moved away from its host) is heard again only when its successor has been
        away for a while: the server may have moved back.
        """
        now = asyncio.get_running_loop().time()
        key = hello.server, hello.copy_number
        spoken = self._speakers.setdefault(key, {})
        if hello.tap not in spoken or hello.tap == next(reversed(spoken)):
            spoken[hello.tap] = now
            return True
        newest = next(reversed(spoken))
        for other in self._ports.values():
            if other.hello is not None and other.hello.tap == newest and other.hello.copy_number == key[1]:
                spoken[newest] = now
        if now - spoken[newest] < _SUCCESSOR_SECONDS:
            return False
        del spoken[hello.tap]
        spoken[hello.tap] = now
        return True

    # Time.

    async def _tick_for_ever(self) -> None:
        loop = asyncio.get_running_loop()
        match_at = 0.0
        while True:
            now_ns = time.monotonic_ns()
            sources = [known.source for known in self._replications.values() if known.source is not None]
            await asyncio.sleep(min((source.tick_seconds(now_ns) for source in sources), default=_MATCH_SECONDS))
            now_ns = time.monotonic_ns()
            for known in self._replications.values():
                if known.source is not None:
                    known.source.tick(now_ns)
                    self._analyse_cut(known, known.source)
            if loop.time() < match_at:
                continue
            match_at = loop.time() + _MATCH_SECONDS
            for known in self._replications.values():
                self._start(known)
            self._match_all()
            for port in list(self._ports.values()):
                if port.hello is None and loop.time() - port.begun > _HELLO_SECONDS:
                    port.abort("no HELLO")

    # What is told.

    def seen(self) -> list[SeenServer]:
        """Return the servers whose taps are connected, each once for each tap."""
        seen = {}
        for port in self._ports.values():
            if (hello := port.hello) is not None:
                if port.seen is None:
                    port.seen = SeenServer(
                        name=hello.server, host=port.host, tap=hello.tap, disks=hello.disks, connected=True
                    )
                seen[hello.tap] = port.seen
        return list(seen.values())

    def reports(self) -> list[SourceReport]:
        """Return how each replication stands."""
        return [self._report(known) for known in self._replications.values()]

    def _report(self, known: _Replication) -> SourceReport:
        if known.source is not None:
            return known.source.report()
        orders, last = known.orders, known.last
        durable_ns = last.durable_ns if last else 0
        return SourceReport(
            scope=orders.scope,
            linked=False,
            problem=known.problem,
            paused=orders.paused,
            taps=dict.fromkeys(orders.members, "absent"),
            kept_bytes=0,
            durable_ns=durable_ns,
            lag_seconds=max(0.0, (time.time_ns() - durable_ns) / 1e9) if durable_ns else 0.0,
            checkpoints=last.checkpoints if last else 0,
            skipped=last.skipped if last else 0,
            resyncs=last.resyncs if last else 0,
        )

    def replaced(self, scope: Scope) -> bool:
        """Whether another source has taken this one's place for good."""
        known = self._replications.get(scope)
        return known is not None and known.replaced

    async def checkpoint(self, scope: Scope, tag: str, description: str = "", wait_seconds: float = 30.0) -> Durable:
        """Make a checkpoint by hand and wait until it is durable. Raises `DrCloudError`."""
        known = self._replications.get(scope)
        if known is None or known.source is None:
            raise NotFoundError(f"{scope.prefix} is not replicated from here now", "Look at the VPG's status.")
        return await known.source.checkpoint(tag, description, wait_seconds)

    async def close(self) -> None:
        """Stop everything. The taps go on by their bitmaps."""
        # Not forgotten: the servers are protected still.
        self._analyzers = None
        await self.configure([])
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.wait([self._ticker])
        for host in list(self._servers):
            await self.unlisten(host)
        self._threads.shutdown(wait=False, cancel_futures=True)
