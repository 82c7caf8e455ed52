"""An enterprise's only door into the provider: what a connector does, without Ray.

Purpose
    Sites of one enterprise dial in. Over each link they ask for orders, report and renew; over channels they replicate.
    A channel is joined to a stream to the VDSA (or to the site) that the manager names for its scope. Nothing but its
    first message is decoded: frames are sealed, and pass as they came.

The wall
    A link counts only for the enterprise this door belongs to. Every scope is checked against it: in the channel's
    arguments, in the first message, and by the manager. What is another's is "not found".

Flow
    A message is taken from one side when the other has taken the one before: a slow VDSA slows its own channel, and the
    windows of `dr_cloud.link.channels` keep the others apart.

Retries
    The manager is asked over and over by those who need it; while it is away links that stand go on, and new channels
    go where the manager last said. Orders are whole states: sent when they change, and compared every ten seconds, so
    that a lost notice is made good.

Revocation
    A revoked certificate's links are closed when the manager says so (`disconnect`), and again looked for every ten
    seconds. While the manager is away only certificates that it has accepted before are let in: it cannot revoke then.

Policy
    What the manager denies is told with its reasons: a site at its dial, a replication when its channel is opened. What
    becomes denied ends at once: links by `disconnect`, channels with the orders that no longer let them run. While the
    manager is away, what it last allowed may begin anew for `GRACE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

import structlog
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from dr_cloud.link.messages import Hello, decode_control
from dr_cloud.link.purpose import LOGS, REPLICATION, replication_arguments, replication_scope
from dr_cloud.link.rpc import Params
from dr_cloud.link.session import ChannelStream, Session, refuse_channels
from dr_cloud.link.stream import Message, MessageStream
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import DrCloudError, ForbiddenError, NotFoundError, ProtocolError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import Renewal
from dr_cloud.model.replication import LogAnswer, LogRequest, SiteOrders, SiteReport
from dr_cloud.model.rights import GRACE_SECONDS
from dr_cloud.seal.identity import Peer

LOOK_SECONDS: Final = 10.0
HELLO_SECONDS: Final = 10.0
ORDERS_SECONDS: Final = 30.0
LOGS_SECONDS: Final = 110.0
_LAST_WORDS_SECONDS: Final = 1.0
"""So long after a site was told why it may not connect, its link is closed."""
ARCHIVE_BYTES_MAX: Final = 128 << 20

_log = structlog.get_logger(__name__)


class Target(BaseModel):
    """Where the target of a scope is, and how its VDSA is reached from within."""

    model_config = ConfigDict(frozen=True)

    route: Route
    address: str
    """`dr_cloud.actors.inner`: of the data center's VDSA, or of the door behind which the site is."""


class Flow(NamedTuple):
    """A replication that passes the door now."""

    scope: Scope
    source: str
    """The site it comes from; empty for a data center."""
    target: str
    """The site it goes to; empty for a data center."""
    one: MessageStream
    other: MessageStream


Ask = Callable[..., Awaitable[Any]]
"""Asks the manager: the operation's name, its arguments. Raises `UnavailableError` while the manager is away."""


class Office:
    """The manager, as far as the door of one enterprise needs it."""

    def __init__(self, enterprise: str, ask: Ask) -> None:
        """Ask for `enterprise`."""
        self._enterprise = enterprise
        self._ask = ask

    async def certificate_ok(self, serial: str) -> bool:
        """Whether a certificate was issued and is not revoked."""
        return bool(await self._ask("certificate_ok", serial))

    async def site_connected(self, site: str, serial: str) -> SiteOrders:
        """Note that a site is there; return its orders."""
        orders: SiteOrders = await self._ask("site_connected", self._enterprise, site, serial)
        return orders

    async def site_lost(self, site: str) -> None:
        """Note that a site is gone."""
        await self._ask("site_lost", self._enterprise, site)

    async def site_report(self, site: str, report: SiteReport) -> None:
        """Take a site's report."""
        await self._ask("site_report", self._enterprise, site, report)

    async def orders_for(self, site: str) -> SiteOrders:
        """Return a site's orders."""
        orders: SiteOrders = await self._ask("orders_for", self._enterprise, site)
        return orders

    async def renew(self, site: str, serial: str, csr: str) -> Renewal:
        """Issue a new certificate."""
        renewal: Renewal = await self._ask("renew", self._enterprise, site, serial, csr)
        return renewal

    async def target(self, scope: Scope) -> Target:
        """Return where the target of a scope is, ready to serve it. Raises `NotFoundError`."""
        target: Target = await self._ask("target", scope)
        return target


class Gate:
    """See the module's docstring. All methods belong to one event loop."""

    def __init__(
        self, provider: str, enterprise: str, office: Office, connect: Callable[[str], Awaitable[MessageStream]]
    ) -> None:
        """Prepare.

        Args:
            provider: Whose certificates count.
            enterprise: Whose door it is.
            office: The manager.
            connect: Opens a stream to the inner address of a VDSA. Raises `OSError` or `DrCloudError`.
        """
        self.enterprise = enterprise
        self._provider = provider
        self._office = office
        self._connect = connect
        self._accepted: dict[str, tuple[str, float]] = {}
        """By serial: the site of a certificate that the manager has accepted, and until when that holds without it."""
        self._sessions: set[Session] = set()
        self._control: dict[str, Session] = {}
        """By site: the link on which it asked for its orders."""
        self._sent: dict[str, int] = {}
        self._targets: dict[Scope, tuple[Target, float]] = {}
        """Where the manager said that targets are, and until when that holds without it."""
        self._flows: set[Flow] = set()
        self._archives: dict[str, bytearray] = {}
        self._pushing: dict[str, asyncio.Task[None]] = {}

    # Who may come in.

    async def admit(self, peer: Peer) -> None:
        """Let a peer in, whose certificate TLS has verified. Raises `ForbiddenError`, which says no more than that."""
        refused = ForbiddenError("this certificate opens nothing here", "Pair the site with its provider again.")
        if peer.provider != self._provider or peer.enterprise != self.enterprise or peer.site is None:
            _log.warning("gate.refused", peer=peer.uri, reason="another's certificate")
            raise refused
        if peer.expires_ns <= time.time_ns():
            _log.warning("gate.refused", peer=peer.uri, reason="expired")
            raise refused
        try:
            accepted = await self._office.certificate_ok(peer.serial)
        except UnavailableError:
            if self._accepted.get(peer.serial, ("", 0.0))[1] > time.monotonic():
                return
            accepted = False
        except ForbiddenError as denial:
            self._accepted.pop(peer.serial, None)
            _log.warning("gate.denied", peer=peer.uri, reason=str(denial))
            raise
        if not accepted:
            self._accepted.pop(peer.serial, None)
            _log.warning("gate.refused", peer=peer.uri, reason="revoked or unknown", serial=peer.serial)
            raise refused
        self._accepted[peer.serial] = peer.site, time.monotonic() + GRACE_SECONDS

    async def serve(self, session: Session) -> None:
        """Serve the link of an admitted peer until it is closed."""
        peer = session.peer
        assert peer is not None and peer.site is not None
        site = peer.site
        session.on_channel = functools.partial(self._on_channel, site)
        session.methods.update(
            orders=functools.partial(self._orders, session, site),
            report=functools.partial(self._report, site),
            renew=functools.partial(self._renew, site, peer.serial),
        )
        self._sessions.add(session)
        try:
            async with session:
                reason = await session.wait_closed()
            _log.info("gate.link_closed", site=site, reason=reason)
        finally:
            self._sessions.discard(session)
            if self._control.get(site) is session:
                del self._control[site]
                with contextlib.suppress(DrCloudError):
                    await self._office.site_lost(site)

    def disconnect(self, site: str, reason: str) -> None:
        """Close every link of a site, and forget that it was let in."""
        for serial in [serial for serial, (owner, _) in self._accepted.items() if owner == site]:
            del self._accepted[serial]
        for session in list(self._sessions):
            if session.peer is not None and session.peer.site == site:
                session.close(reason)

    async def watch(self) -> None:
        """Look for revoked certificates and orders that were not told, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for session in list(self._sessions):
                assert session.peer is not None
                try:
                    await self.admit(session.peer)
                except ForbiddenError as error:
                    session.close(str(error))
            for site in self._present():
                with contextlib.suppress(DrCloudError):
                    if (await self._office.orders_for(site)).revision != self._sent.get(site):
                        self.orders_changed(site)

    async def close(self, reason: str) -> None:
        """Close every link."""
        for session in list(self._sessions):
            session.close(reason)
        await asyncio.gather(*(session.wait_closed() for session in list(self._sessions)), return_exceptions=True)

    # Calls from sites.

    async def _orders(self, session: Session, site: str, params: Params) -> JsonValue:
        del params
        assert session.peer is not None
        try:
            orders = await self._office.site_connected(site, session.peer.serial)
        except ForbiddenError as denial:
            _log.warning("gate.denied", site=site, reason=str(denial))
            asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS, session.close, str(denial))
            raise
        self._control[site] = session
        self._sent[site] = orders.revision
        return orders.model_dump(mode="json")

    async def _report(self, site: str, params: Params) -> JsonValue:
        await self._office.site_report(site, _parsed(SiteReport, params))
        return {}

    async def _renew(self, site: str, serial: str, params: Params) -> JsonValue:
        csr = params.get("csr")
        if not isinstance(csr, str):
            raise ProtocolError("`renew` needs a signing request", "Send `csr`, PEM.")
        return (await self._office.renew(site, serial, csr)).model_dump(mode="json")

    # Calls to sites.

    def orders_changed(self, site: str) -> None:
        """Send a site its orders, now and until it has them."""
        former = self._pushing.pop(site, None)
        if former is not None:
            former.cancel()
        self._pushing[site] = asyncio.create_task(self._push(site), name=f"orders {site}")

    async def _push(self, site: str) -> None:
        while site in self._present():
            try:
                orders = await self._office.orders_for(site)
                self._end_flows(site, orders)
                if (session := self._control.get(site)) is None:
                    return
                await session.call("orders", orders.model_dump(mode="json"), ORDERS_SECONDS)
            except DrCloudError as error:
                _log.info("gate.orders_not_sent", site=site, reason=str(error))
                await asyncio.sleep(1.0)
            else:
                self._sent[site] = orders.revision
                return

    async def collect_logs(self, site: str, request: LogRequest) -> bytes:
        """Return the archive of a site's logs. `request` is given an id here. Raises `DrCloudError`."""
        session = self._linked(site)
        request = request.model_copy(update={"id": uuid.uuid4().hex})
        archive = self._archives[request.id] = bytearray()
        try:
            result = await session.call("logs", request.model_dump(mode="json"), LOGS_SECONDS)
            answer = _parsed(LogAnswer, result)
            deadline = time.monotonic() + ORDERS_SECONDS
            while len(archive) < answer.size_bytes and not session.reason and time.monotonic() < deadline:
                await asyncio.sleep(0.02)
        finally:
            del self._archives[request.id]
        if hashlib.sha256(archive).hexdigest() != answer.sha256:
            raise UnavailableError(f"the logs of {site} did not arrive whole", "Collect them again.")
        return bytes(archive)

    def _linked(self, site: str) -> Session:
        session = self._control.get(site)
        if session is None:
            raise UnavailableError(f"site {site} is not connected", "Start it, and look at its log.")
        return session

    # Channels.

    async def _on_channel(
        self, site: str, purpose: str, arguments: dict[str, JsonValue], stream: ChannelStream
    ) -> None:
        if purpose == REPLICATION:
            scope = replication_scope(arguments, self.enterprise)
            target = await self._target(scope)
            inner = await self._open(target)
            try:
                await self._introduce(stream, inner, scope)
                await self._flow(Flow(scope, site, _site_of(target), stream, inner))
            finally:
                inner.end()
        elif purpose == LOGS:
            await self._take_archive(arguments, stream)
        else:
            await refuse_channels(purpose, arguments, stream)

    async def serve_inner(self, stream: MessageStream) -> None:
        """Serve a stream that one of the provider's VDSAs opened, to replicate to a site."""
        try:
            hello, scope = await _hello(stream)
            if scope.enterprise != self.enterprise:
                raise NotFoundError(f"{scope.prefix} has no target behind this door")
            route = (await self._target(scope)).route
            if route.kind != "site":
                raise NotFoundError(f"{scope.prefix} has no target behind this door")
            outer = await self._linked(route.site).open(REPLICATION, replication_arguments(scope))
        except (DrCloudError, OSError, TimeoutError) as error:
            _log.info("gate.not_opened", reason=str(error) or type(error).__name__)
            stream.close()
            return
        try:
            await outer.send(hello)
            await self._flow(Flow(scope, "", route.site, stream, outer))
        except OSError:
            stream.close()
        finally:
            outer.end()

    def _present(self) -> set[str]:
        """Sites that follow orders now, or whose replications pass here."""
        return {*self._control, *(site for flow in self._flows for site in (flow.source, flow.target) if site)}

    async def _flow(self, flow: Flow) -> None:
        self._flows.add(flow)
        try:
            await relay(flow.one, flow.other)
        finally:
            self._flows.discard(flow)

    def _end_flows(self, site: str, orders: SiteOrders) -> None:
        """End what a site's orders no longer let run, whatever the site does about it."""
        sources = {order.scope for order in orders.sources if not order.paused}
        targets = {order.scope for order in orders.targets}
        for flow in list(self._flows):
            if (flow.source == site and flow.scope not in sources) or (
                flow.target == site and flow.scope not in targets
            ):
                _log.info("gate.flow_ended", scope=flow.scope.prefix, site=site)
                flow.one.close()
                flow.other.close()

    async def _open(self, target: Target) -> MessageStream:
        """Open a stream to a target. Raises `DrCloudError`."""
        scope = target.route.scope
        if target.route.kind == "site":
            return await self._linked(target.route.site).open(REPLICATION, replication_arguments(scope))
        try:
            return await self._connect(target.address)
        except OSError as error:
            raise UnavailableError(
                f"the VDSA of {scope.vpg} does not answer: {error}", "It is started again by itself; try again."
            ) from error

    async def _target(self, scope: Scope) -> Target:
        try:
            target = await self._office.target(scope)
        except UnavailableError:
            known = self._targets.get(scope)
            if known is None or known[1] <= time.monotonic():
                raise
            return known[0]
        except (ForbiddenError, NotFoundError) as error:
            self._targets.pop(scope, None)
            _log.warning("gate.denied", scope=scope.prefix, reason=str(error))
            raise
        self._targets[scope] = target, time.monotonic() + GRACE_SECONDS
        return target

    async def _introduce(self, outer: MessageStream, inner: MessageStream, scope: Scope) -> None:
        """Pass the first message on: it must say the scope that the channel was opened for."""
        hello, said = await _hello(outer)
        if said != scope:
            raise ProtocolError("the first message is of another scope than its channel")
        await inner.send(hello)

    async def _take_archive(self, arguments: dict[str, JsonValue], stream: ChannelStream) -> None:
        archive = self._archives.get(str(arguments.get("id")))
        if archive is None:
            raise NotFoundError("nobody has asked for these logs")
        while (part := await stream.receive()) is not None:
            if isinstance(part, str) or len(archive) + len(part) > ARCHIVE_BYTES_MAX:
                raise ProtocolError(f"logs are binary and not over {ARCHIVE_BYTES_MAX >> 20} MiB")
            archive += part


def _site_of(target: Target) -> str:
    return target.route.site if target.route.kind == "site" else ""


def _parsed(kind: Any, document: JsonValue) -> Any:
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ProtocolError(f"bad {kind.__name__}: {where}: {first['msg']}") from None


async def _hello(stream: MessageStream) -> tuple[str, Scope]:
    """Take the first message of a replication stream: its text, and whose it is."""
    message = await asyncio.wait_for(stream.receive(), HELLO_SECONDS)
    if not isinstance(message, str) or not isinstance(hello := decode_control(message), Hello):
        raise ProtocolError("the first message must be hello")
    return message, hello.scope.checked()


async def relay(one: MessageStream, other: MessageStream) -> None:
    """Pass messages on both ways until either side ends or breaks; then neither is of use any more."""

    async def pass_on(source: MessageStream, sink: MessageStream) -> None:
        message: Message | None
        while (message := await source.receive()) is not None:
            await sink.send(message)
        sink.end()

    ways = [asyncio.create_task(pass_on(one, other)), asyncio.create_task(pass_on(other, one))]
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        if any(way.exception() is not None for way in done):
            one.close()
            other.close()
    finally:
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
