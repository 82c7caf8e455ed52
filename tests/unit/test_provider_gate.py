"""An enterprise's door over links in memory: who comes in, whose things can be named, what passes."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from link_carrier import MemoryCarrier, carriers

from dr_cloud.actors.gate import Gate, Target, relay
from dr_cloud.link.messages import Hello, encode_control
from dr_cloud.link.purpose import LOGS, REPLICATION, replication_arguments
from dr_cloud.link.session import ChannelStream, Session
from dr_cloud.model.cloud import Route
from dr_cloud.model.errors import DrCloudError, ForbiddenError, NotFoundError, UnavailableError
from dr_cloud.model.ids import Scope
from dr_cloud.model.pairing import Renewal
from dr_cloud.model.replication import LogRequest, SiteOrders, SiteReport, SourceOrders, TargetOrders
from dr_cloud.model.rights import GRACE_SECONDS
from dr_cloud.seal.identity import Peer

OURS = Scope("acme", "shop", "east")
TO_SITE = Scope("acme", "back", "hq")
FAR_NS = time.time_ns() + 10**15


def peer_of(enterprise: str = "acme", site: str = "hq", provider: str = "provider", serial: str = "1") -> Peer:
    return Peer(provider, enterprise, site, None, serial, FAR_NS)


def hello(scope: Scope) -> str:
    return encode_control(Hello(scope=scope, stream="0" * 32, connection=0, connections=1))


class Office:
    """A manager that notes what it is asked."""

    def __init__(self) -> None:
        self.good = {"1", "2"}
        self.away = False
        self.denied: dict[Any, str] = {}
        """What policy denies: a serial, a site or a scope, and why."""
        self.sources: list[SourceOrders] = []
        self.targets: list[TargetOrders] = []
        self.revision = 1
        self.noted: list[tuple[Any, ...]] = []

    def _here(self) -> None:
        if self.away:
            raise UnavailableError("the manager is away")

    def _allowed(self, what: Any) -> None:
        self._here()
        if what in self.denied:
            raise ForbiddenError(self.denied[what])

    async def certificate_ok(self, serial: str) -> bool:
        self._allowed(serial)
        return serial in self.good

    async def site_connected(self, site: str, serial: str) -> SiteOrders:
        self._allowed(site)
        self.noted.append(("connected", site, serial))
        return await self.orders_for(site)

    async def site_lost(self, site: str) -> None:
        self.noted.append(("lost", site))

    async def site_report(self, site: str, report: SiteReport) -> None:
        self._here()
        self.noted.append(("report", site, report.revision))

    async def orders_for(self, site: str) -> SiteOrders:
        self._here()
        return SiteOrders(revision=self.revision, hosts=[site], sources=self.sources, targets=self.targets)

    async def renew(self, site: str, serial: str, csr: str) -> Renewal:
        return Renewal(certificate=f"new {csr}", serial=serial + "0")

    async def target(self, scope: Scope) -> Target:
        self._allowed(scope)
        kind = {OURS: "data center", TO_SITE: "site"}.get(scope)
        if kind is None:
            raise NotFoundError("there is no such VPG and target", "Name one of your own.")
        route = Route.model_validate(
            {"scope": scope, "kind": kind, "site": scope.target, "host": "h", "store": "s", "jurisdiction": "UK"}
        )
        return Target(route=route, address=f"at {scope.prefix}")


class World:
    """A door, and VDSAs behind it that are memory."""

    def __init__(self) -> None:
        self.office = Office()
        self.vdsas: list[MemoryCarrier] = []
        self.asked: list[str] = []
        self.gate = Gate("provider", "acme", self.office, self.connect)

    async def connect(self, address: str) -> MemoryCarrier:
        self.asked.append(address)
        near, far = carriers()
        self.vdsas.append(far)
        return near

    @asynccontextmanager
    async def site(self, peer: Peer | None = None) -> AsyncIterator[Session]:
        one, other = carriers()
        peer = peer or peer_of()
        await self.gate.admit(peer)
        served = asyncio.create_task(self.gate.serve(Session(other, dialled=False, peer=peer)))
        try:
            async with Session(one, dialled=True) as session:
                yield session
        finally:
            await served


@pytest.fixture
def world() -> World:
    return World()


async def until(what: Any) -> None:
    async with asyncio.timeout(5):
        while not what():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize(
    "peer",
    [
        peer_of(enterprise="evil"),
        peer_of(provider="another"),
        peer_of(serial="9"),
        Peer("provider", None, None, "connector", "1", FAR_NS),
        Peer("provider", "acme", "hq", None, "1", time.time_ns() - 1),
    ],
)
async def test_only_the_enterprises_own_valid_certificates_come_in(world: World, peer: Peer) -> None:
    """R6: another enterprise's, another provider's, an unknown, a service's and an ended certificate are refused."""
    with pytest.raises(ForbiddenError) as refusal:
        await world.gate.admit(peer)
    assert str(refusal.value) == "this certificate opens nothing here"


async def test_without_the_manager_only_known_certificates_come_in(world: World) -> None:
    await world.gate.admit(peer_of(serial="1"))
    world.office.away = True
    await world.gate.admit(peer_of(serial="1"))
    with pytest.raises(ForbiddenError):
        await world.gate.admit(peer_of(serial="2"))
    world.gate.disconnect("hq", "revoked")
    with pytest.raises(ForbiddenError):
        await world.gate.admit(peer_of(serial="1"))


async def test_orders_reports_and_renewal_are_of_the_certificates_site(world: World) -> None:
    async with world.site() as site:
        assert (await site.call("orders"))["hosts"] == ["hq"]  # type: ignore[index,call-overload]
        await site.call("report", SiteReport(revision=1, time_ns=1, version="1").model_dump(mode="json"))
        assert (await site.call("renew", {"csr": "x"})) == {"certificate": "new x", "serial": "10"}
        for wrong in ({"revision": "many"}, {}):
            with pytest.raises(DrCloudError, match="bad SiteReport"):
                await site.call("report", wrong)  # type: ignore[arg-type]
    assert world.office.noted == [("connected", "hq", "1"), ("report", "hq", 1), ("lost", "hq")]


async def test_changed_orders_are_sent_until_they_arrive(world: World) -> None:
    got: list[Any] = []

    async def take(params: Any) -> Any:
        got.append(params["revision"])
        return {}

    async with world.site() as site:
        site.methods["orders"] = take
        await site.call("orders")
        world.office.revision, world.office.away = 2, True
        world.gate.orders_changed("hq")
        await asyncio.sleep(0.05)
        assert got == []
        world.office.away = False
        await until(lambda: got == [2])


async def test_messages_pass_unchanged_both_ways(world: World) -> None:
    """R10: what a site sends reaches the VDSA that the manager names, byte by byte, and the answers come back."""
    async with world.site() as site:
        stream = await site.open(REPLICATION, replication_arguments(OURS))
        await stream.send(hello(OURS))
        (vdsa,) = await _some(world.vdsas)
        assert world.asked == ["at acme/shop/east"]
        assert await vdsa.receive() == hello(OURS)
        await vdsa.send("welcome")
        assert await stream.receive() == "welcome"
        frame = bytes(range(256)) * 4096
        await stream.send(frame)
        assert bytes(await vdsa.receive()) == frame  # type: ignore[arg-type]
        stream.end()
        assert await vdsa.receive() is None


async def _some(found: list[Any]) -> list[Any]:
    await until(lambda: found)
    return found


@pytest.mark.parametrize(
    "scope", [Scope("evil", "shop", "east"), Scope("acme", "other", "east"), ["acme", "shop"], "acme/shop/east", None]
)
async def test_what_is_anothers_is_not_found_exactly_as_what_is_missing(world: World, scope: Any) -> None:
    """R6: a scope of another enterprise, one that is missing and one that is no scope get the same answer."""
    async with world.site() as site:
        with pytest.raises(NotFoundError) as refusal:
            await site.open(REPLICATION, {"scope": list(scope) if isinstance(scope, Scope) else scope})
        assert str(refusal.value) == "there is no such VPG and target"
    assert world.vdsas == []


@pytest.mark.parametrize("first", [hello(Scope("evil", "shop", "east")), hello(TO_SITE), "{}", b"frame"])
async def test_the_first_message_must_say_the_channels_scope(world: World, first: Any) -> None:
    """R6: a channel opened for one's own scope cannot be used for another's; nothing reaches the VDSA."""
    async with world.site() as site:
        stream = await site.open(REPLICATION, replication_arguments(OURS))
        await stream.send(first)
        with pytest.raises(OSError):
            assert await stream.receive() is None
            raise ConnectionResetError
        (vdsa,) = await _some(world.vdsas)
        assert await vdsa.receive() is None


async def test_other_channels_and_calls_are_refused(world: World) -> None:
    async with world.site() as site:
        with pytest.raises(NotFoundError):
            await site.open("shell", {})
        with pytest.raises(NotFoundError):
            await site.open(LOGS, {"id": "nobody-asked"})
        with pytest.raises(NotFoundError):
            await site.call("route", {})


async def test_unpairing_closes_the_link_at_once(world: World) -> None:
    """R7: a revoked certificate's link is closed, with its channels."""
    async with world.site() as site:
        stream = await site.open(REPLICATION, replication_arguments(OURS))
        world.gate.disconnect("hq", "the certificate is revoked")
        assert "revoked" in await site.wait_closed()
        with pytest.raises(OSError):
            await stream.receive()


async def test_replication_to_a_site(world: World) -> None:
    """R9: a VDSA of the provider replicates to a site over the link that the site dialled."""
    taken: list[Any] = []

    async def serve(purpose: str, arguments: dict[str, Any], stream: ChannelStream) -> None:
        taken.extend([purpose, arguments, await stream.receive(), bytes(await stream.receive())])  # type: ignore[arg-type]
        await stream.send("durable")

    async with world.site() as site:
        site.on_channel = serve
        await site.call("orders")
        near, far = carriers()
        serving = asyncio.create_task(world.gate.serve_inner(far))
        await near.send(hello(TO_SITE))
        await near.send(b"frame")
        assert await near.receive() == "durable"
        assert await near.receive() is None
        await serving
        assert taken == [REPLICATION, {"scope": list(TO_SITE)}, hello(TO_SITE), b"frame"]
        for wrong in (OURS, Scope("evil", "back", "hq")):
            near, far = carriers()
            await near.send(hello(wrong))
            await world.gate.serve_inner(far)
            with pytest.raises(OSError):
                await near.receive()


async def test_logs_arrive_whole_or_not_at_all(world: World) -> None:
    """R20: the archive that a site sends is checked before it is handed on."""
    packed = b"archive" * 100_000
    digest = hashlib.sha256(packed).hexdigest()

    async with world.site() as site:

        async def logs(params: Any) -> Any:
            stream = await site.open(LOGS, {"id": params["id"]})
            await stream.send(packed)
            stream.end()
            return {"size_bytes": len(packed), "sha256": digest}

        site.methods["logs"] = logs
        with pytest.raises(UnavailableError, match="not connected"):
            await world.gate.collect_logs("hq", LogRequest(id="0"))
        await site.call("orders")
        assert await world.gate.collect_logs("hq", LogRequest(id="0")) == packed
        digest = "0" * 64
        with pytest.raises(UnavailableError, match="whole"):
            await world.gate.collect_logs("hq", LogRequest(id="0"))


async def test_a_channel_goes_where_it_went_before_while_the_manager_is_away(world: World) -> None:
    async with world.site() as site:
        (await site.open(REPLICATION, replication_arguments(OURS))).end()
        world.office.away = True
        await site.open(REPLICATION, replication_arguments(OURS))
        with pytest.raises(UnavailableError):
            await site.open(REPLICATION, replication_arguments(TO_SITE))
    assert world.asked == ["at acme/shop/east"] * 2


async def test_a_site_that_policy_denies_is_told_why(world: World) -> None:
    """R13.1: at the dial, and where its orders are asked for; then its link is closed."""
    world.office.denied["1"] = "hq lies in USA: nothing opens USA to UK"
    with pytest.raises(ForbiddenError, match="nothing opens USA to UK"):
        await world.gate.admit(peer_of())
    del world.office.denied["1"]
    async with world.site() as site:
        world.office.denied["hq"] = "hq is closed"
        with pytest.raises(ForbiddenError, match="hq is closed"):
            await site.call("orders")
        assert "hq is closed" in await site.wait_closed()


async def test_what_was_allowed_is_not_allowed_for_ever_without_the_manager(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R13: what the manager last allowed holds for its time only while it is away."""
    async with world.site() as site:
        (await site.open(REPLICATION, replication_arguments(OURS))).end()
        world.office.away = True
        await world.gate.admit(peer_of())
        (await site.open(REPLICATION, replication_arguments(OURS))).end()
        later = time.monotonic() + GRACE_SECONDS
        with monkeypatch.context() as clock:
            clock.setattr("dr_cloud.actors.gate.time.monotonic", lambda: later)
            with pytest.raises(ForbiddenError):
                await world.gate.admit(peer_of())
            with pytest.raises(UnavailableError):
                await site.open(REPLICATION, replication_arguments(OURS))


async def test_a_replication_that_policy_denies_is_refused_alone(world: World) -> None:
    """R13.1: with the reasons; also what was allowed before; another channel of the same link goes on."""
    async with world.site() as site:
        (await site.open(REPLICATION, replication_arguments(OURS))).end()
        other = await site.open(REPLICATION, replication_arguments(OURS))
        world.office.denied[OURS] = "uk-south is closed"
        with pytest.raises(ForbiddenError, match="uk-south is closed"):
            await site.open(REPLICATION, replication_arguments(OURS))
        world.office.away = True
        with pytest.raises(UnavailableError):
            await site.open(REPLICATION, replication_arguments(OURS))
        await other.send(hello(OURS))


@pytest.mark.parametrize("paused", ["", "policy"])
async def test_channels_end_with_the_orders_that_let_them_run(world: World, paused: str) -> None:
    """R13.1: whatever the site does about its orders, what is ordered no more passes no more."""
    running = SourceOrders(scope=OURS, copy_number=0, members={})
    world.office.sources = [running]
    async with world.site() as site:
        stream = await site.open(REPLICATION, replication_arguments(OURS))
        await stream.send(hello(OURS))
        (vdsa,) = await _some(world.vdsas)
        assert await vdsa.receive() == hello(OURS)
        world.gate.orders_changed("hq")
        await asyncio.sleep(0.02)
        await stream.send(b"frame")
        assert bytes(await vdsa.receive()) == b"frame"  # type: ignore[arg-type]
        world.office.sources = [running.model_copy(update={"paused": paused})] if paused else []
        world.gate.orders_changed("hq")
        async with asyncio.timeout(5):
            with pytest.raises(OSError):
                assert await vdsa.receive() is None
                raise ConnectionResetError
            with pytest.raises(OSError):
                await stream.receive()


async def test_a_relay_holds_a_fast_sender_to_a_slow_receiver() -> None:
    """R2: what a slow VDSA has not taken stays with the sender; little is held in between."""
    sender, one = carriers()
    other, receiver = carriers()
    other.open_gate.clear()
    passing = asyncio.create_task(relay(one, other))
    sent = 0

    async def send() -> None:
        nonlocal sent
        while True:
            await sender.send(b"x" * 1000)
            sent += 1

    sending = asyncio.create_task(send())
    await asyncio.sleep(0.05)
    assert sent <= 8
    other.open_gate.set()
    assert bytes(await receiver.receive()) == b"x" * 1000  # type: ignore[arg-type]
    sending.cancel()
    sender.close()
    await passing
